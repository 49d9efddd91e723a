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
    USEFUL,
    WASTED,
    HostRows,
    HotBuffers,
    RowBytes,
    make_hot_buffers,
)
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
FIRST_HOST_PAGE = 40  # no hot buffer has such a number: an id of the wrong kind shows


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
    """Hot buffers of one layer with requests in them, host pages in shuffled order, and the naive model beside."""

    def __init__(
        self,
        *,
        num_requests: int = 1,
        num_hot: int = 4,
        per_page: int = 2,
        num_pages: int = 4,
        bytes_=(12, 4),
        seed=0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.per_page, self.num_pages, self.num_hot = per_page, num_pages, num_hot
        self.shape = HotShape(num_hot=num_hot, num_newest=2 * per_page, num_entries=num_pages * per_page)
        num_rows = num_hot + self.shape.num_newest
        self.hot = make_hot_buffers(
            self._pool(num_requests, num_rows, bytes_), self.shape, unit_rows=num_rows * NUM_LAYERS
        )
        num_host = FIRST_HOST_PAGE + num_requests * num_pages
        host_rows = self._pool(num_host, per_page, bytes_, first_byte=8)
        pages = FIRST_HOST_PAGE + torch.randperm(num_requests * num_pages, generator=self.generator)
        self.host = HostRows(
            rows=host_rows,
            pages_RP=pages.view(num_requests, num_pages),
            first_new_R=torch.zeros(num_requests, dtype=torch.int64),
        )
        self.content_RE = [
            torch.randint(
                0,
                256,
                (num_requests, self.shape.num_entries, size),
                generator=self.generator,
                dtype=torch.uint8,
            )
            for size in bytes_
        ]
        self.models = [Model(num_hot) for _ in range(num_requests)]
        for request in range(num_requests):
            self.write_newest(request)

    @staticmethod
    def _pool(num_units: int, num_rows: int, bytes_: Sequence[int], first_byte: int = 0) -> RowBytes:
        """One layer's rows of units that hold more before and behind; in a layer all data come first, as in pools."""
        layer_bytes = num_rows * sum(bytes_)
        memory = torch.full((num_units, first_byte + NUM_LAYERS * layer_bytes + 4), 0xEE, dtype=torch.uint8)
        layer = memory[:, first_byte + LAYER * layer_bytes :][:, :layer_bytes]
        split = num_rows * bytes_[0]
        return RowBytes(
            data_Urb=layer[:, :split].unflatten(1, (num_rows, bytes_[0])),
            scales_Urb=layer[:, split:].unflatten(1, (num_rows, bytes_[1])),
        )

    def parts(self, rows: RowBytes) -> tuple[Tensor, Tensor]:
        return rows.data_Urb, rows.scales_Urb

    def write_newest(self, request: int) -> None:
        """The ring holds what it can of the entries before the end of the page after `first_new`."""
        first = int(self.host.first_new_R[request])
        for entry in range(first, min(first + self.per_page, self.shape.num_entries)):
            for part, content in zip(self.parts(self.hot.rows), self.content_RE, strict=True):
                part[request, self.num_hot + entry % self.shape.num_newest] = content[request, entry]

    def finish_page(self, request: int) -> bool:
        """The newest page goes to the host, and the next one begins. Returns False when there is no next one."""
        first = int(self.host.first_new_R[request])
        if first + self.per_page >= self.shape.num_entries:
            return False
        page = int(self.host.pages_RP[request, first // self.per_page])
        ring = self.num_hot + first % self.shape.num_newest
        for target, source in zip(self.parts(self.host.rows), self.parts(self.hot.rows), strict=True):
            target[page] = source[request, ring : ring + self.per_page]
        self.host.first_new_R[request] += self.per_page
        self.write_newest(request)
        return True

    def finish_pages(self, count: int) -> World:
        for request in range(len(self.models)):
            for _ in range(count):
                assert self.finish_page(request)
        return self

    def that_fit(self, request: int, row: list[int], wanted: set[int]) -> list[int]:
        """The entries of a row that the buffer has room for beside those that are `wanted`, which they join."""
        first_new, kept = int(self.host.first_new_R[request]), []
        for entry in row:
            if entry < first_new:
                if len(wanted | {entry}) > self.num_hot:
                    continue
                wanted.add(entry)
            kept.append(entry)
        return kept

    def end(self, request: int) -> int:
        """Entries that the request may want are those before."""
        return min(int(self.host.first_new_R[request]) + self.per_page, self.shape.num_entries)

    def call(
        self,
        kernel: Kernel,
        requests: Sequence[int],
        entries: Sequence[Sequence[int]],
        *,
        prefetch: bool = False,
    ) -> list[list[int]]:
        """Calls a kernel, checks all there is to check, and returns the counts."""
        requests_B = torch.tensor(requests, dtype=torch.int64)
        entries_BK = torch.tensor(entries, dtype=torch.int64).view(len(requests), -1 if entries else 3)
        before = [part.clone() for part in self.parts(self.host.rows)]
        expected = self.expected_counts(requests, entries, prefetch=prefetch)
        if prefetch:
            counts = kernel.prefetch_rows(self.hot, self.host, requests_B, entries_BK)
        else:
            ids, bias, any_empty, counts = kernel.hot_rows(self.hot, self.host, requests_B, entries_BK)
            self.check_answer(requests, entries, ids, bias)
            assert any_empty == any(all(entry < 0 for entry in row) for row in entries)
        assert counts.dtype is torch.int64
        assert counts.tolist() == expected
        for part, old in zip(self.parts(self.host.rows), before, strict=True):
            assert torch.equal(part, old), "host memory was written"
        self.check_state()
        return expected

    def hot_rows(self, kernel: Kernel, requests: list[int], entries: list[list[int]]) -> None:
        """A call that is expected to fail."""
        kernel.hot_rows(self.hot, self.host, torch.tensor(requests), torch.tensor(entries))

    def expected_counts(
        self, requests: Sequence[int], entries: Sequence[Sequence[int]], *, prefetch: bool
    ) -> list[list[int]]:
        counts: list[list[int]] = []
        for request, model in enumerate(self.models):
            first_new = int(self.host.first_new_R[request])
            rows = [row for owner, row in zip(requests, entries, strict=True) if owner == request]
            wanted = [entry for row in rows for entry in row if 0 <= entry < first_new]
            counts.append(model.want(list(dict.fromkeys(wanted)), prefetch=prefetch))
        return counts

    def check_answer(
        self, requests: Sequence[int], entries: Sequence[Sequence[int]], ids: Tensor, bias: Tensor
    ) -> None:
        assert (ids.dtype, bias.dtype) == (torch.int64, torch.float32)
        assert bias.tolist() == [[[-math.inf if entry < 0 else 0.0 for entry in row]] for row in entries]
        for request, row, row_ids in zip(requests, entries, ids.tolist(), strict=True):
            there = {row_id for entry, row_id in zip(row, row_ids, strict=True) if entry >= 0}
            for entry, row_id in zip(row, row_ids, strict=True):
                unit, place = divmod(row_id, self.hot.unit_rows)
                assert (unit, place < self.num_hot + self.shape.num_newest) == (request, True)
                assert entry >= 0 or row_id in there or not there
                if entry < 0:
                    continue
                for part, content in zip(self.parts(self.hot.rows), self.content_RE, strict=True):
                    assert torch.equal(part[request, place], content[request, entry])

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
        num_hot=data.draw(st.sampled_from((1, 2, 5, 9, 17)), label="hot rows"),
        per_page=data.draw(st.sampled_from((1, 2, 4)), label="rows of a page"),
        num_pages=data.draw(st.integers(1, 9), label="pages"),
        bytes_=data.draw(st.sampled_from(((12, 4), (16, 0), (5, 3))), label="bytes"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    for request in range(num_requests):
        for _ in range(data.draw(st.integers(0, 8), label="full pages")):
            world.finish_page(request)
    for _ in range(data.draw(st.integers(1, 6), label="calls")):
        requests = data.draw(st.lists(st.integers(0, num_requests - 1), max_size=4), label="requests of rows")
        width = data.draw(st.integers(1, 7), label="entries")
        wanted: list[set[int]] = [set() for _ in range(num_requests)]
        rows: list[list[int]] = []
        for request in requests:
            entry = st.integers(0, world.end(request) - 1)
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
    world = World(num_hot=4, per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0], [[0, 1, 2, 3]]) == [[0, 4, 0, 0]]
    assert world.call(kernel, [0], [[0, 1]]) == [[2, 0, 0, 0]]
    assert world.call(kernel, [0], [[2, 5]]) == [[1, 1, 0, 0]]
    assert world.models[0].held == [0, 1, 5, 2]  # not the oldest, 2, which is wanted, but 3 went
    assert world.call(kernel, [0], [[0, 1, 2, 5]]) == [[4, 0, 0, 0]]


@kernels
def test_a_request_may_want_as_many_rows_as_its_buffer_has_and_no_more(kernel: Kernel) -> None:
    world = World(num_hot=4, per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0, 0], [[0, 1, 2], [1, 2, 3]]) == [[0, 4, 0, 0]]
    assert world.call(kernel, [0, 0], [[4, 5, 3], [3, 6, -1]]) == [[1, 3, 0, 0]]
    assert world.call(kernel, [0, 0], [[9, 8, 7], [0, 9, 8]]) == [[0, 4, 0, 0]]
    # The newest, 10 and 11, need no hot row.
    assert world.call(kernel, [0, 0], [[10, 11, 0], [1, 9, 8]]) == [[3, 1, 0, 0]]
    with pytest.raises(AssertionError, match="hot rows"):
        world.hot_rows(kernel, [0, 0], [[0, 1, 2], [3, 4, -1]])


@kernels
def test_drafts_share_what_they_have_in_common_wherever_their_rows_stand(kernel: Kernel) -> None:
    world = World(num_requests=2, num_hot=6, per_page=2, num_pages=6).finish_pages(5)
    rows = [[0, 4, 2], [0, 4, 2], [4, 2, 6], [2, 9, 0], [6, 4, 11]]
    assert world.call(kernel, [1, 0, 1, 0, 1], rows) == [[0, 4, 0, 0], [0, 4, 0, 0]]
    assert world.call(kernel, [1, 0], [[6, 0, 3], [1, 5, 7]]) == [[0, 3, 0, 0], [2, 1, 0, 0]]


@kernels
def test_a_request_that_is_not_asked_for_stays_as_it_was(kernel: Kernel) -> None:
    world = World(num_requests=3, num_hot=4, per_page=2, num_pages=6).finish_pages(5)
    world.call(kernel, [0, 1, 2], [[0, 1], [2, 3], [4, 5]])
    rows = world.hot.rows.data_Urb.clone()
    world.call(kernel, [1], [[7, 8]])
    world.call(kernel, [1], [[-1, -1]])
    world.call(kernel, [], [])
    assert torch.equal(world.hot.rows.data_Urb[::2], rows[::2])


@kernels
def test_rows_of_a_finished_page_come_from_the_host_only_when_their_page_has_left(kernel: Kernel) -> None:
    world = World(num_hot=4, per_page=2, num_pages=6)
    assert world.call(kernel, [0], [[0, 1]]) == [[0, 0, 0, 0]]
    world.finish_page(0)
    assert world.call(kernel, [0], [[1, 2, 3]]) == [[0, 1, 0, 0]]
    world.finish_page(0)
    assert world.call(kernel, [0], [[1, 2, 4]]) == [[1, 1, 0, 0]]
    world.finish_page(0)  # the ring's first rows are written anew
    assert world.call(kernel, [0], [[0, 6, 7]]) == [[0, 1, 0, 0]]


@kernels
def test_a_prefetched_row_is_useful_once_or_wasted_when_it_goes_unwanted(kernel: Kernel) -> None:
    world = World(num_hot=4, per_page=2, num_pages=6).finish_pages(5)
    assert world.call(kernel, [0], [[0, 1, 2]], prefetch=True) == [[0, 3, 0, 0]]
    assert world.call(kernel, [0], [[0, 1, 2]], prefetch=True) == [[3, 0, 0, 0]]
    assert world.call(kernel, [0, 0], [[0, 3], [0, 11]]) == [[1, 1, 1, 0]]
    assert world.call(kernel, [0], [[0, 3]]) == [[2, 0, 0, 0]]
    assert world.call(kernel, [0], [[4, 5]], prefetch=True) == [[0, 2, 0, 2]]
    assert world.call(kernel, [0], [[0, 4]]) == [[2, 0, 1, 0]]
    assert world.hot.clear(0) == 1


@kernels
@pytest.mark.parametrize(
    ("entries", "complaint"),
    [([[4, 8]], "beyond"), ([[100, 1]], "beyond")],
)
def test_an_entry_beyond_the_ring_is_a_broken_invariant(
    kernel: Kernel, entries: list[list[int]], complaint: str
) -> None:
    world = World(num_hot=4, per_page=2, num_pages=6).finish_pages(2)
    with pytest.raises(AssertionError, match=complaint):
        world.hot_rows(kernel, [0], entries)


def test_the_reference_refuses_an_entry_twice_in_a_row() -> None:
    world = World(num_hot=4, per_page=2, num_pages=6).finish_pages(2)
    reference = next(item.function for item in implementations("hot_rows", "cpu") if item.name == "torch")
    with pytest.raises(AssertionError, match="twice"):
        reference(world.hot, world.host, torch.tensor([0]), torch.tensor([[1, 2, 1]]))


@pytest.mark.parametrize("num_entries", [64, 262_144])
def test_state_takes_the_bytes_that_the_shape_says(num_entries: int) -> None:
    shape = HotShape(num_hot=4096, num_newest=128, num_entries=num_entries)
    rows = World._pool(2, 4096 + 128, (4, 0))
    hot: HotBuffers = make_hot_buffers(rows, shape, unit_rows=1)
    parts = (hot.entries_RH, hot.order_RH, hot.lookup_RE, hot.flags_RH)
    assert sum(part.numel() * part.element_size() for part in parts) == 2 * shape.state_bytes
    assert (HITS, MISSES, USEFUL, WASTED) == (0, 1, 2, 3)
