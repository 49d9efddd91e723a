"""Every `hot_rows` and `prefetch_rows` kernel against a naive model, a list in order of use for each request.

With TRITON_INTERPRET=1 in the environment before Python starts, the Triton kernels join (`test_hot_rows_triton`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.hot_rows import (
    HITS,
    MISSES,
    RESIDENT,
    USEFUL,
    WASTED,
    HostRows,
    HotBuffers,
    RowBytes,
    hot_rows_torch,
    make_hot_buffers,
)
from engine.kernels.paging import locate_rows_torch
from engine.kernels.registry import implementations
from kvstore.hisparse import HotShape

torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from engine.kernels import hot_rows_triton  # registers its kernels

    # So small that small cases take several.
    hot_rows_triton.BLOCK, hot_rows_triton.COPY_ROWS, hot_rows_triton.COPY_PROGRAMS = 4, 2, 2


@dataclass(frozen=True, slots=True)
class Kernel:
    hot_rows: Callable[..., tuple[Tensor, Tensor, bool, Tensor]]
    prefetch_rows: Callable[..., Tensor]


def found_kernels() -> list[Any]:
    device = "cuda" if INTERPRETED else "cpu"
    by_name = {item.name: item.function for item in implementations("prefetch_rows", device)}
    return [
        pytest.param(Kernel(item.function, by_name[item.name]), id=item.name)
        for item in implementations("hot_rows", device)
    ]


kernels = pytest.mark.parametrize("kernel", found_kernels())
examples = settings(max_examples=60, deadline=None)
if (
    INTERPRETED
):  # a call takes milliseconds: fewer, and a failure is not made smaller, which would take minutes
    examples = settings(max_examples=12, deadline=None, phases=set(Phase) - {Phase.shrink, Phase.explain})

NUM_LAYERS, LAYER = 2, 1
FIRST_HOST_PAGE = 200  # no device page, whole or thin, has such a number: an id of the wrong kind shows
GONE = 0xEE  # what is in device memory that no longer holds, or never held, anybody's row


@dataclass(slots=True)
class Model:
    """What one request's hot rows hold, in plain Python."""

    num_hot: int
    held: list[int] = field(default_factory=list)  # entries, least recently used first
    unproven: set[int] = field(default_factory=set)  # prefetched, and not wanted yet

    def want(self, entries: Sequence[int], *, prefetch: bool) -> list[int]:
        """Distinct entries, none of them new, in order of appearance. Returns the counts."""
        found = [entry for entry in self.held if entry in entries]
        missing = [entry for entry in entries if entry not in self.held]
        others = [entry for entry in self.held if entry not in entries]
        num_evicted = max(len(self.held) + len(missing) - self.num_hot, 0)
        evicted = others[:num_evicted]
        useful = set() if prefetch else self.unproven & set(found)
        wasted = self.unproven & set(evicted)
        self.unproven -= useful | wasted
        self.unproven |= set(missing) if prefetch else set()
        self.held = others[num_evicted:] + missing + found
        return [len(found), len(missing), len(useful), len(wasted)]


class World:
    """One layer of a device's pages, spilled and resident requests in them, host pages, and the naive models beside.

    Requests 0, 1, ... are spilled, each with the hot buffer of its number; the `num_resident` after them are resident.
    Their slots are in another order. All entries of all requests exist."""

    def __init__(
        self,
        *,
        num_requests: int = 1,
        num_resident: int = 1,
        num_hot_pages: int = 2,
        per_page: int = 2,
        num_pages: int = 4,
        bytes_: tuple[int, int] = (12, 4),
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.per_page, self.num_pages, self.num_hot = per_page, num_pages, num_hot_pages * per_page
        self.shape = HotShape(num_hot=self.num_hot, num_entries=num_pages * per_page)
        num_slots = num_requests + num_resident
        self.slot_of = self._shuffled(num_slots).tolist()
        num_whole = num_slots * num_pages + num_requests * num_hot_pages
        whole = self._shuffled(num_whole)
        self.num_whole, self.next_thin = num_whole, num_whole
        self.pages_SP = whole[: num_slots * num_pages].view(num_slots, num_pages).clone()
        self.hot = make_hot_buffers(
            self._pool(num_whole, per_page, bytes_),
            self.shape,
            unit_rows=per_page * NUM_LAYERS,
            pages_RG=whole[num_slots * num_pages :].view(num_requests, num_hot_pages).clone(),
        )
        self.host = HostRows(
            rows=self._pool(FIRST_HOST_PAGE + num_requests * num_pages, per_page, bytes_, first_byte=8),
            pages_RP=FIRST_HOST_PAGE + self._shuffled(num_requests * num_pages).view(num_requests, num_pages),
            first_new_R=torch.zeros(num_requests, dtype=torch.int64),
        )
        sizes = (num_slots, num_pages, per_page)
        self.content = [  # of all entries of each request, by page
            torch.randint(0, 256, (*sizes, size), generator=self.generator, dtype=torch.uint8)
            for size in bytes_
        ]
        self.models = [Model(self.num_hot) for _ in range(num_requests)]
        for request, slot in enumerate(self.slot_of):
            for part, content in zip(self.parts(self.hot.rows), self.content, strict=True):
                part[self.pages_SP[slot]] = content[request]

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    @staticmethod
    def _pool(num_units: int, num_rows: int, bytes_: Sequence[int], first_byte: int = 0) -> RowBytes:
        """One layer's rows of units that hold more before and behind; in a layer all data come first, as in pools."""
        layer_bytes = num_rows * sum(bytes_)
        memory = torch.full((num_units, first_byte + NUM_LAYERS * layer_bytes + 4), GONE, dtype=torch.uint8)
        layer = memory[:, first_byte + LAYER * layer_bytes :][:, :layer_bytes]
        split = num_rows * bytes_[0]
        return RowBytes(
            data_Urb=layer[:, :split].unflatten(1, (num_rows, bytes_[0])),
            scales_Urb=layer[:, split:].unflatten(1, (num_rows, bytes_[1])),
        )

    def parts(self, rows: RowBytes) -> tuple[Tensor, Tensor]:
        return rows.data_Urb, rows.scales_Urb

    def finish_page(self, request: int) -> bool:
        """The first page that is not on the host goes there, and leaves the device. False when there is none."""
        number = int(self.host.first_new_R[request]) // self.per_page
        if number == self.num_pages:
            return False
        table, host_page = self.pages_SP[self.slot_of[request]], int(self.host.pages_RP[request, number])
        for target, source in zip(self.parts(self.host.rows), self.parts(self.hot.rows), strict=True):
            target[host_page] = source[table[number]]
            source[table[number]] = GONE
        if number < self.hot.pages_RG.shape[1]:
            table[number] = self.hot.pages_RG[request, number]
        else:
            table[number], self.next_thin = self.next_thin, self.next_thin + 1
        self.host.first_new_R[request] += self.per_page
        return True

    def finish_pages(self, count: int) -> World:
        for request in range(len(self.models)):
            for _ in range(count):
                assert self.finish_page(request)
        return self

    def is_spilled(self, request: int) -> bool:
        return request < len(self.models)

    def first_new(self, request: int) -> int:
        return int(self.host.first_new_R[request]) if self.is_spilled(request) else 0

    def that_fit(self, request: int, row: list[int], wanted: set[int]) -> list[int]:
        """The entries of a row that the buffer has room for beside those that are `wanted`, which they join."""
        kept: list[int] = []
        for entry in row:
            if entry < self.first_new(request):
                if len(wanted | {entry}) > self.num_hot:
                    continue
                wanted.add(entry)
            kept.append(entry)
        return kept

    def call(
        self,
        kernel: Kernel,
        requests: Sequence[int],
        entries: Sequence[Sequence[int]],
        *,
        prefetch: bool = False,
    ) -> list[list[int]]:
        """Calls a kernel, checks all there is to check, and returns the counts."""
        slots_B, buffers_B, entries_BK = self.arguments(requests, entries)
        host_before = [part.clone() for part in self.parts(self.host.rows)]
        rows_before = [part.clone() for part in self.parts(self.hot.rows)]
        expected = self.expected_counts(requests, entries, prefetch=prefetch)
        if prefetch:
            counts = kernel.prefetch_rows(self.hot, self.host, buffers_B, entries_BK)
        else:
            ids, bias, any_empty, counts = kernel.hot_rows(
                self.hot, self.host, self.pages_SP, slots_B, buffers_B, entries_BK
            )
            self.check_answer(requests, entries, ids, bias)
            assert any_empty == any(all(entry < 0 for entry in row) for row in entries)
        assert counts.dtype is torch.int64
        assert counts.tolist() == expected
        for part, old in zip(self.parts(self.host.rows), host_before, strict=True):
            assert torch.equal(part, old), "host memory was written"
        others = torch.ones(self.num_whole, dtype=torch.bool)
        others[self.hot.pages_RG[[request for request in set(requests) if self.is_spilled(request)]]] = False
        for part, old in zip(self.parts(self.hot.rows), rows_before, strict=True):
            assert torch.equal(part[others], old[others]), "a page of somebody else was written"
        self.check_state()
        return expected

    def arguments(self, requests: Sequence[int], entries: Sequence[Sequence[int]]) -> list[Tensor]:
        slots = [self.slot_of[request] for request in requests]
        buffers = [request if self.is_spilled(request) else RESIDENT for request in requests]
        entries_BK = torch.tensor(entries, dtype=torch.int64).view(len(requests), -1 if entries else 3)
        return [torch.tensor(slots).long(), torch.tensor(buffers).long(), entries_BK]

    def hot_rows(self, kernel: Kernel, requests: list[int], entries: list[list[int]]) -> None:
        """A call that is expected to fail."""
        kernel.hot_rows(self.hot, self.host, self.pages_SP, *self.arguments(requests, entries))

    def expected_counts(
        self, requests: Sequence[int], entries: Sequence[Sequence[int]], *, prefetch: bool
    ) -> list[list[int]]:
        counts: list[list[int]] = []
        for request, model in enumerate(self.models):
            first_new = self.first_new(request)
            rows = [row for owner, row in zip(requests, entries, strict=True) if owner == request]
            wanted = [entry for row in rows for entry in row if 0 <= entry < first_new]
            counts.append(model.want(list(dict.fromkeys(wanted)), prefetch=prefetch))
        return counts

    def check_answer(
        self, requests: Sequence[int], entries: Sequence[Sequence[int]], ids: Tensor, bias: Tensor
    ) -> None:
        assert (ids.dtype, bias.dtype) == (torch.int64, torch.float32)
        assert bias.tolist() == [[[-math.inf if entry < 0 else 0.0 for entry in row]] for row in entries]
        slots_B, _, entries_BK = self.arguments(requests, entries)
        located = locate_rows_torch(self.pages_SP, slots_B, entries_BK, self.per_page, self.hot.unit_rows)
        rows = zip(requests, entries, ids.tolist(), located[0].tolist(), strict=True)
        for request, row, row_ids, table_ids in rows:
            there = {row_id for entry, row_id in zip(row, row_ids, strict=True) if entry >= 0}
            for entry, row_id, table_id in zip(row, row_ids, table_ids, strict=True):
                page, place = divmod(row_id, self.hot.unit_rows)
                assert 0 <= page < self.num_whole
                assert place < self.per_page
                if not self.is_spilled(request) or entry >= self.first_new(request):
                    assert row_id == table_id
                elif entry < 0:
                    assert row_id in there or not there
                else:
                    assert page in self.hot.pages_RG[request]
                if entry >= 0:
                    number = divmod(entry, self.per_page)
                    for part, content in zip(self.parts(self.hot.rows), self.content, strict=True):
                        assert torch.equal(part[page, place], content[request][number])

    def check_state(self) -> None:
        hot = self.hot
        for request, model in enumerate(self.models):
            held, order = hot.entries_RH[request].tolist(), hot.order_RH[request].tolist()
            assert sorted(order) == list(range(self.num_hot))
            assert [held[row] for row in order if held[row] >= 0] == model.held
            rows = {entry: row for row, entry in enumerate(held) if entry >= 0}
            assert hot.lookup_RE[request].tolist() == [rows.get(e, -1) for e in range(self.shape.num_entries)]
            flags = hot.flags_RH[request].tolist()
            assert set(flags) <= {0, 1}
            assert {held[row] for row, flag in enumerate(flags) if flag} == model.unproven


@kernels
@examples
@given(data=st.data())
def test_wanted_rows_are_on_the_device_and_the_state_is_that_of_a_list_in_order_of_use(
    kernel: Kernel, data: st.DataObject
) -> None:
    num_requests = data.draw(st.integers(1, 3), label="requests")
    world = World(
        num_requests=num_requests,
        num_hot_pages=data.draw(st.sampled_from((1, 2, 5, 9)), label="pages of hot rows"),
        per_page=data.draw(st.sampled_from((1, 2, 4)), label="rows of a page"),
        num_pages=data.draw(st.integers(1, 9), label="pages"),
        bytes_=data.draw(st.sampled_from(((12, 4), (16, 0), (5, 3))), label="bytes"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    for request in range(num_requests):
        for _ in range(data.draw(st.integers(0, 8), label="full pages")):
            world.finish_page(request)
    for _ in range(data.draw(st.integers(1, 6), label="calls")):
        requests = data.draw(st.lists(st.integers(0, num_requests), max_size=5), label="requests of rows")
        width = data.draw(st.integers(1, 7), label="entries")
        wanted: list[set[int]] = [set() for _ in range(num_requests + 1)]
        rows: list[list[int]] = []
        for request in requests:
            entry = st.integers(0, world.shape.num_entries - 1)
            row = data.draw(st.lists(entry, unique=True, max_size=width), label="entries of a row")
            row = world.that_fit(request, row, wanted[request])
            rows.append(data.draw(st.permutations(row + [-1] * (width - len(row))), label="row"))
        world.call(kernel, requests, rows, prefetch=data.draw(st.booleans(), label="prefetch"))
        request = data.draw(st.integers(0, num_requests - 1), label="goes on")
        match data.draw(st.sampled_from(("nothing", "page", "clear")), label="then"):
            case "page":
                world.finish_page(request)
            case "clear":
                assert world.hot.clear(request) == len(world.models[request].unproven)
                world.models[request] = Model(world.num_hot)
                world.check_state()
            case _:
                pass


@kernels
def test_the_least_recently_used_row_goes_and_never_one_that_is_wanted_now(kernel: Kernel) -> None:
    world = World(per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0], [[0, 1, 2, 3]]) == [[0, 4, 0, 0]]
    assert world.call(kernel, [0], [[0, 1]]) == [[2, 0, 0, 0]]
    assert world.call(kernel, [0], [[2, 5]]) == [[1, 1, 0, 0]]
    assert world.models[0].held == [0, 1, 5, 2]  # not the oldest, 2, which is wanted, but 3 went
    assert world.call(kernel, [0], [[0, 1, 2, 5]]) == [[4, 0, 0, 0]]


@kernels
def test_a_request_may_want_as_many_rows_as_its_buffer_has_and_no_more(kernel: Kernel) -> None:
    world = World(per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0, 0], [[0, 1, 2], [1, 2, 3]]) == [[0, 4, 0, 0]]
    assert world.call(kernel, [0, 0], [[4, 5, 3], [3, 6, -1]]) == [[1, 3, 0, 0]]
    assert world.call(kernel, [0, 0], [[9, 8, 7], [0, 9, 8]]) == [[0, 4, 0, 0]]
    # The newest, 10 and 11, need no hot row, and nor do those of a resident request.
    assert world.call(kernel, [0, 0, 1], [[10, 11, 0], [1, 9, 8], [2, 3, 4]]) == [[3, 1, 0, 0]]
    with pytest.raises(AssertionError, match="hot rows"):
        world.hot_rows(kernel, [0, 0], [[0, 1, 2], [3, 4, -1]])


@kernels
def test_drafts_share_what_they_have_in_common_wherever_their_rows_stand(kernel: Kernel) -> None:
    world = World(num_requests=2, num_hot_pages=3, per_page=2, num_pages=6).finish_pages(5)
    rows = [[0, 4, 2], [0, 4, 2], [4, 2, 6], [2, 9, 0], [6, 4, 11]]
    assert world.call(kernel, [1, 0, 1, 0, 1], rows) == [[0, 4, 0, 0], [0, 4, 0, 0]]
    assert world.call(kernel, [1, 0], [[6, 0, 3], [1, 5, 7]]) == [[0, 3, 0, 0], [2, 1, 0, 0]]


@kernels
def test_a_request_that_is_not_asked_for_stays_as_it_was(kernel: Kernel) -> None:
    world = World(num_requests=3, per_page=2, num_pages=6).finish_pages(5)
    world.call(kernel, [0, 1, 2], [[0, 1], [2, 3], [4, 5]])
    rows = world.hot.rows.data_Urb[world.hot.pages_RG[::2]]
    world.call(kernel, [1], [[7, 8]])
    world.call(kernel, [1], [[-1, -1]])
    world.call(kernel, [], [])
    assert torch.equal(world.hot.rows.data_Urb[world.hot.pages_RG[::2]], rows)


@kernels
def test_rows_of_a_page_come_from_the_host_once_its_copy_is_made(kernel: Kernel) -> None:
    world = World(per_page=2, num_pages=6)
    assert world.call(kernel, [0], [[0, 1, 6, 11]]) == [[0, 0, 0, 0]]
    world.finish_page(0)
    assert world.call(kernel, [0], [[1, 2, 3]]) == [[0, 1, 0, 0]]
    world.finish_page(0)
    assert world.call(kernel, [0], [[1, 2, 4]]) == [[1, 1, 0, 0]]
    world.finish_page(0)  # its place in the page table has a thin page now
    assert world.call(kernel, [0], [[0, 4, 6, 7]]) == [[0, 2, 0, 0]]
    assert world.call(kernel, [0, 0], [[-1, -1], [-1, 7]]) == [[0, 0, 0, 0]]


@kernels
def test_a_resident_request_is_looked_up_as_it_is_alone(kernel: Kernel) -> None:
    world = World(num_resident=2, per_page=2, num_pages=6).finish_pages(5)
    requests, entries = [1, 0, 2, 1], [[-1, 5, 11], [0, -1, 3], [-1, -1, -1], [4, 5, 6]]
    assert world.call(kernel, requests, entries, prefetch=True) == [[0, 2, 0, 0]]
    assert world.call(kernel, requests, entries) == [[2, 0, 2, 0]]
    assert world.call(kernel, [2, 1], [[0, 1], [9, -1]]) == [[0, 0, 0, 0]]


@kernels
def test_a_prefetched_row_is_useful_once_or_wasted_when_it_goes_unwanted(kernel: Kernel) -> None:
    world = World(per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0], [[0, 1, 2]], prefetch=True) == [[0, 3, 0, 0]]
    assert world.call(kernel, [0], [[0, 1, 2]], prefetch=True) == [[3, 0, 0, 0]]
    assert world.call(kernel, [0, 0], [[0, 3], [0, 11]]) == [[1, 1, 1, 0]]
    assert world.call(kernel, [0], [[0, 3]]) == [[2, 0, 0, 0]]
    assert world.call(kernel, [0], [[4, 5]], prefetch=True) == [[0, 2, 0, 2]]
    assert world.call(kernel, [0], [[0, 4]]) == [[2, 0, 1, 0]]
    assert world.hot.clear(0) == 1


@kernels
def test_more_entries_on_the_host_than_buffers_are_made_for_are_a_broken_invariant(kernel: Kernel) -> None:
    world = World(per_page=2, num_pages=6).finish_pages(6)
    world.host.first_new_R.add_(2)
    with pytest.raises(AssertionError, match="made for"):
        world.hot_rows(kernel, [1, 0], [[1, 2], [3, 4]])


def test_the_reference_refuses_an_entry_twice_in_a_row() -> None:
    world = World(per_page=2, num_pages=6).finish_pages(2)
    with pytest.raises(AssertionError, match="twice"):
        hot_rows_torch(world.hot, world.host, world.pages_SP, *world.arguments([0], [[1, 2, 1]]))


@pytest.mark.parametrize("num_entries", [64, 262_144])
def test_state_takes_the_bytes_that_the_shape_says(num_entries: int) -> None:
    shape = HotShape(num_hot=4096, num_entries=num_entries)
    rows, pages_RG = World._pool(128, 64, (4, 0)), torch.arange(128).view(2, 64)
    hot: HotBuffers = make_hot_buffers(rows, shape, unit_rows=1, pages_RG=pages_RG)
    parts = (hot.entries_RH, hot.order_RH, hot.lookup_RE, hot.flags_RH)
    assert sum(part.numel() * part.element_size() for part in parts) == 2 * shape.state_bytes
    assert (HITS, MISSES, USEFUL, WASTED) == (0, 1, 2, 3)
