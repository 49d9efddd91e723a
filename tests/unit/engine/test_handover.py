"""Hand-over: full pages and one record are all that another rank needs to go on, bit for bit, and nothing in the record
is there for nothing. The other rank's memory is NaN wherever it was not told otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.handover import pack_record, unpack_record
from engine.model.forward import Model
from engine.pager import SlotTables
from engine.runner import Runner, SegmentTokens
from kvstore.handover import OVERLAPPING, Part, record_bytes, record_bytes_max, record_parts
from kvstore.layout import Component, IndexSpace, Numerics, StateLayout, build_layout
from kvstore.pages import pages_for
from kvstore.pools import Pools, plain_memory
from kvstore.transfer.contract import ByteArray
from rorqual.model_config import PAGE_TOKENS
from tests.harness.drive import random_schedule, run_drafting
from tests.harness.models import (
    build_model,
    config_of,
    random_tokens,
    raw_config,
    raw_configs,
    real_ratios,
)
from tests.reference.weights import random_tensors

STEPS = 40
numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
with_and_without_drafts = pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])


def model_of(raw: dict[str, Any], numerics: Numerics, *, drafts: bool = False, exact: bool = True) -> Model:
    config = config_of(raw, num_mtp_blocks=int(drafts))
    return build_model(config, random_tensors(config, seed=3), numerics=numerics, exact=exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a model says after a token: logits [V], and those of the draft block one index behind, if there is one."""

    logits: Tensor
    draft: Tensor | None

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Said)
        if self.draft is None or other.draft is None:
            return self.draft is other.draft and torch.equal(self.logits, other.logits)
        return torch.equal(self.logits, other.logits) and torch.equal(self.draft, other.draft)


def advance(runner: Runner, work: Sequence[SegmentTokens]) -> list[list[Said]]:
    """Compute every item, with drafts if the runner keeps them: what is said after each of its tokens."""
    model = runner.model
    work = [replace(item, all_logits=True) for item in work]
    streams, rows = runner.streams(work)
    with torch.inference_mode():
        logits = [model.logits(streams[part]) for part in rows]
        if not runner.drafts:
            runner.keep_streams(streams)
            return [[Said(logits=row, draft=None) for row in part] for part in logits]
        drafted = runner.advance_drafts(work, streams)
        runner.keep_streams(streams)
        drafts = [list(model.draft_logits(0, part)) if len(part) else [] for part in drafted]
    nothing = torch.empty(0)  # a sequence's first token is no index's next token
    return [
        [Said(logits=row, draft=draft) for row, draft in zip(part, found, strict=True)]
        for part, found in zip(
            logits,
            [
                [nothing] * (len(part) - len(found)) + found
                for part, found in zip(logits, drafts, strict=True)
            ],
            strict=True,
        )
    ]


class Source:
    """A rank that computes one sequence, `tokens`, in slot 1 on scattered pages, with a record packed at each cut."""

    def __init__(self, model: Model, tokens: Tensor, cuts: Sequence[int], *, drafts: bool = False) -> None:
        num_pages = pages_for(len(tokens))
        self.pages = [2 * page + 1 for page in reversed(range(num_pages))]
        self.runner = Runner(
            model, num_pages=2 * num_pages, num_slots=3, num_records=len(cuts), drafts=drafts
        )
        self.runner.pools.fill(0xFF)
        self.runner.records.fill_(0xFF)
        self.tokens = tokens
        self.records: dict[int, Tensor] = {}
        self.said: list[Said] = []  # after each token
        self.runner.open(1)
        self.runner.extend(1, self.pages)
        self.computed = 0
        for index, cut in enumerate(cuts):
            self.compute_until(cut)
            num_bytes = self.runner.pack(1, cut, index)
            self.records[cut] = self.runner.records[index, :num_bytes]

    def compute_until(self, until: int) -> None:
        tokens = self.tokens[self.computed : until]
        if len(tokens):
            (said,) = advance(self.runner, [SegmentTokens(slot=1, start=self.computed, tokens=tokens)])
            self.said += said
            self.computed = until

    def full_pages(self, num_tokens: int) -> list[int]:
        return self.pages[: num_tokens // PAGE_TOKENS]


class Target:
    """Another rank of the same model: everything is NaN but what is handed over. One slot for each hand-over."""

    def __init__(self, source: Source, num_slots: int, *, layout: StateLayout | None = None) -> None:
        runner = source.runner
        self._per_slot = pages_for(len(source.tokens))
        self.source = source
        self.runner = Runner(
            runner.model,
            num_pages=num_slots * self._per_slot,
            num_slots=num_slots,
            num_records=1,
            drafts=runner.drafts,
        )
        if layout is not None:
            self.runner.pools = Pools(layout, num_pages=num_slots * self._per_slot, num_slots=num_slots)
            self.runner.tables = SlotTables(self.runner.pools, pages_per_slot_max=self._per_slot)
        self.runner.pools.fill(0xFF)
        self._starts: list[int] = []

    def take(self, num_tokens: int, record: Tensor | None = None) -> int:
        """Hand over at `num_tokens` into the next slot: its full pages, by id, and a record."""
        slot = len(self._starts)
        self._starts.append(num_tokens)
        pages = list(range(slot * self._per_slot, slot * self._per_slot + pages_for(num_tokens)))
        for page, target in zip(self.source.full_pages(num_tokens), pages, strict=False):
            for item in self.runner.pools.layout.descriptors:
                if item.space is IndexSpace.PAGE:
                    read = self.source.runner.pools[item.component].bytes_ulb[page]
                    self.runner.pools[item.component].bytes_ulb[target] = read
        record = self.source.records[num_tokens] if record is None else record
        self.runner.records.fill_(0xFF)
        self.runner.records[0, : len(record)] = record
        self.runner.restore(slot, num_tokens, pages, 0)
        self.runner.extend(slot, range(slot * self._per_slot + len(pages), (slot + 1) * self._per_slot))
        return slot

    def decode(self, num_steps: int) -> list[list[Said]]:
        """Token by token, all slots in one batch: what each slot says after each."""
        said: list[list[Said]] = [[] for _ in self._starts]
        for step in range(num_steps):
            work = [
                SegmentTokens(slot=slot, start=start + step, tokens=self.source.tokens[start + step :][:1])
                for slot, start in enumerate(self._starts)
            ]
            for found, item in zip(said, advance(self.runner, work), strict=True):
                found += item
        return said


def check(source: Source, target: Target, cuts: Sequence[int], *, num_steps: int = STEPS) -> None:
    for cut in cuts:
        target.take(cut)
    source.compute_until(cuts[-1] + num_steps)
    for cut, found in zip(cuts, target.decode(num_steps), strict=True):
        wanted = [source.said[cut + step] for step in range(num_steps)]
        assert all(bool(torch.isfinite(item.logits).all()) for item in wanted)
        wrong = [step for step in range(num_steps) if found[step] != wanted[step]]
        assert not wrong, f"handed over at {cut}, step {wrong[0]} differs"


FEW_CUTS = (1, 3, 12, 47, 250, 261)
EVERY_CUT = (*range(1, 20), 31, 32, 33, 63, 64, 127, 128, 240, 252, *range(254, 261), 271, 272)
REAL_CUTS = (1, 2, 3, 4, 5, 63, 64, 126, 127, 128, 129, 130, 131, 191, 255, 256, 257, 258, 259, 300, 319, 383)


@numerics_of_both_kinds
@with_and_without_drafts
def test_a_sequence_goes_on_bit_for_bit_from_pages_and_record(numerics: Numerics, drafts: bool) -> None:
    model = model_of(raw_config(), numerics, drafts=drafts)
    tokens = random_tokens(model.config, FEW_CUTS[-1] + 20, seed=1)
    source = Source(model, tokens, FEW_CUTS, drafts=drafts)
    check(source, Target(source, len(FEW_CUTS)), FEW_CUTS, num_steps=20)


@pytest.mark.slow
@numerics_of_both_kinds
@with_and_without_drafts
@pytest.mark.parametrize(
    ("raw", "cuts"),
    [
        pytest.param(raw_config(), EVERY_CUT, id="small"),
        pytest.param(real_ratios(), REAL_CUTS, id="real ratios"),
    ],
)
def test_it_does_at_any_remainder_of_windows_and_pages(
    numerics: Numerics, drafts: bool, raw: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    model = model_of(raw, numerics, drafts=drafts)
    source = Source(model, random_tokens(model.config, cuts[-1] + STEPS, seed=2), cuts, drafts=drafts)
    check(source, Target(source, len(cuts)), cuts)


@numerics_of_both_kinds
def test_it_does_without_exact_arithmetic_when_both_take_the_same_steps(numerics: Numerics) -> None:
    model = model_of(raw_config(), numerics, drafts=True, exact=False)
    tokens = random_tokens(model.config, 61 + 20, seed=4)
    source = Source(model, tokens, [50, 61], drafts=True)
    while source.computed < len(tokens):
        source.compute_until(source.computed + 1)
    check(source, Target(source, 1), [61], num_steps=20)


@numerics_of_both_kinds
def test_the_other_rank_may_have_rings_of_another_size(numerics: Numerics) -> None:
    model = model_of(raw_config(), numerics, drafts=True)
    cuts = [2, 47, 259, 261, 266]
    source = Source(model, random_tokens(model.config, 266 + 20, seed=5), cuts, drafts=True)
    check(source, Target(source, len(cuts), layout=other_rings(source.runner.layout)), cuts, num_steps=20)


@numerics_of_both_kinds
def test_a_used_slot_and_used_pages_serve_a_hand_over_as_if_they_were_new(numerics: Numerics) -> None:
    model = model_of(raw_config(), numerics)
    source = Source(model, random_tokens(model.config, 2 + 20, seed=6), [2])
    target = Target(source, 1)
    target.runner.open(0)
    target.runner.extend(0, [0])
    earlier = random_tokens(model.config, 200, seed=7)
    target.runner.run([SegmentTokens(slot=0, start=0, tokens=earlier)])
    check(source, target, [2], num_steps=20)


def other_rings(layout: StateLayout) -> StateLayout:
    """As with drafts of another length: rows stand elsewhere in every ring, and wrap elsewhere."""
    descriptors = tuple(
        item if item.space is IndexSpace.PAGE else replace(item, num_rows=item.num_rows + 3)
        for item in layout.descriptors
    )
    return replace(layout, descriptors=descriptors)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    raw=raw_configs(),
    numerics=st.sampled_from(Numerics),
    drafts=st.booleans(),
    cut=st.integers(1, 300),
    lengths=st.lists(st.sampled_from((1, 1, 2, 3, 9, 40)), min_size=1, max_size=8),
)
def test_any_architecture_goes_on_after_any_token_in_chunks_and_single_tokens(
    raw: dict[str, Any], numerics: Numerics, drafts: bool, cut: int, lengths: list[int]
) -> None:
    if raw["index_head_dim"] == 20:
        raw["index_head_dim"] = 16  # served index rows have a power of two
    model = model_of(raw, numerics, drafts=drafts)
    tokens = random_tokens(model.config, cut + sum(lengths), seed=cut)
    source = Source(model, tokens, [cut], drafts=drafts)
    target = Target(source, 1)
    target.take(cut)
    source.compute_until(len(tokens))
    start = cut
    for length in lengths:
        work = SegmentTokens(slot=0, start=start, tokens=tokens[start : start + length])
        (found,) = advance(target.runner, [work])
        assert found == source.said[start : start + length]
        start += length


def broken(record: Tensor, layout: StateLayout, part: Part, layer: int, row: int) -> Tensor:
    """The record with one row of one layer never written."""
    item = layout.find(part.component)
    assert item is not None
    data_bytes = item.data_bytes // 2 if part.halves else item.data_bytes
    first = part.offset + layer * (part.num_bytes // len(item.layers))
    scales = first + part.count * data_bytes + row * item.scale_bytes
    changed = record.clone()
    changed[first + row * data_bytes :][:data_bytes] = 0xFF
    changed[scales : scales + item.scale_bytes] = 0xFF
    return changed


@pytest.mark.slow
@numerics_of_both_kinds
def test_every_row_of_every_part_in_every_layer_is_needed(numerics: Numerics) -> None:
    cut = PAGE_TOKENS + 27
    # Nearly all rows are picked, but not all: the index has something to decide, and every row is read.
    model = model_of(raw_config(index_topk=66), numerics, drafts=True)
    source = Source(model, random_tokens(model.config, cut + 24, seed=1), [cut], drafts=True)
    layout = source.runner.layout
    parts = record_parts(layout, cut, drafts=True)
    assert {part.component for part in parts} == set(Component), "a component is not in the record"
    mutants = [
        (part, layer, row)
        for part in parts
        for layer in range(len(source.runner.pools[part.component].descriptor.layers))
        for row in range(part.count)
    ]
    target = Target(source, len(mutants) + 1)
    for part, layer, row in mutants:
        target.take(cut, broken(source.records[cut], layout, part, layer, row))
    target.take(cut)
    source.compute_until(cut + 24)
    *found, untouched = target.decode(24)
    wanted = source.said[cut:]
    assert untouched == wanted
    unneeded = [
        (part.component.value, part.halves, layer, row)
        for (part, layer, row), said in zip(mutants, found, strict=True)
        if said == wanted
    ]
    assert not unneeded


# --- bytes ---


def noise(pools: Pools, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for item in pools.layout.descriptors:
        memory = pools[item.component].bytes_ulb
        memory.copy_(torch.randint(256, memory.shape, generator=generator, dtype=torch.uint8))


def rows_of(
    tables: SlotTables, slot: int, num_tokens: int, part: Part
) -> list[list[tuple[list[Tensor], Tensor]]]:
    """Views of a part's rows, [layer][row]: pieces of data, then scales; found one by one from what the layout says."""
    item = tables.pools[part.component].descriptor
    unit = int(tables.pages_SP[slot, num_tokens // PAGE_TOKENS]) if item.space is IndexSpace.PAGE else slot
    found: list[list[tuple[list[Tensor], Tensor]]] = []
    for layer in range(len(item.layers)):
        block = tables.pools[part.component].bytes_ulb[unit, layer]
        rows: list[tuple[list[Tensor], Tensor]] = []
        for position in range(part.first, part.first + part.count):
            row = position % item.num_rows
            data = block[row * item.data_bytes :][: item.data_bytes]
            quarter = item.data_bytes // 4
            pieces = [data[:quarter], data[2 * quarter : 3 * quarter]] if part.halves else [data]
            scales = block[item.num_rows * item.data_bytes + row * item.scale_bytes :][: item.scale_bytes]
            rows.append((pieces, scales))
        found.append(rows)
    return found


def tables_of(layout: StateLayout, pages: Sequence[int], slot: int) -> SlotTables:
    tables = SlotTables(Pools(layout, num_pages=6, num_slots=3), pages_per_slot_max=4)
    tables.append(slot, pages)
    return tables


@numerics_of_both_kinds
@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(1, 3 * PAGE_TOKENS + 5))
def test_a_record_is_rows_in_order_of_position_data_before_scales(
    numerics: Numerics, num_tokens: int
) -> None:
    layout = build_layout(config_of(raw_config(), num_mtp_blocks=1), numerics)
    source = tables_of(layout, [5, 0, 3, 2], slot=2)
    source.add_draft_rows(2, 0, num_tokens - 1)
    noise(source.pools, num_tokens)
    record = torch.full((record_bytes(layout, num_tokens, drafts=True) + 8,), 0xAB, dtype=torch.uint8)
    num_bytes = pack_record(source, 2, num_tokens, record, drafts=True)
    wanted: list[Tensor] = []
    for part in record_parts(layout, num_tokens, drafts=True):
        for rows in rows_of(source, 2, num_tokens, part):
            wanted += [piece for pieces, _ in rows for piece in pieces] + [scales for _, scales in rows]
    content = torch.cat(wanted)
    assert torch.equal(record[: len(content)], content)
    assert not bool(record[len(content) : num_bytes].any())
    assert bool((record[num_bytes:] == 0xAB).all()), "bytes beyond the record were written"


@numerics_of_both_kinds
@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(1, 3 * PAGE_TOKENS + 5), drafts=st.booleans())
def test_unpacking_writes_the_rows_of_the_record_and_no_others(
    numerics: Numerics, num_tokens: int, drafts: bool
) -> None:
    layout = build_layout(config_of(raw_config(), num_mtp_blocks=1), numerics)
    source, target = (
        tables_of(layout, [5, 0, 3, 2], slot=2),
        tables_of(other_rings(layout), [1, 4, 0, 2], slot=1),
    )
    noise(source.pools, num_tokens)
    source.add_draft_rows(2, 0, num_tokens - 1)
    target.pools.fill(0xCD)
    record = torch.empty(record_bytes(layout, num_tokens, drafts=drafts), dtype=torch.uint8)
    pack_record(source, 2, num_tokens, record, drafts=drafts)
    unpack_record(target, 1, num_tokens, record, drafts=drafts)
    for part in record_parts(layout, num_tokens, drafts=drafts):
        rows_there, rows_here = (
            [row for rows in rows_of(tables, slot, num_tokens, part) for row in rows]
            for tables, slot in ((source, 2), (target, 1))
        )
        for (pieces, scales), (pieces_here, scales_here) in zip(rows_there, rows_here, strict=True):
            assert torch.equal(torch.cat([*pieces, scales]), torch.cat([*pieces_here, scales_here]))
            for view in (*pieces_here, scales_here):
                view.fill_(0xCD)
    for component in OVERLAPPING:
        item = target.pools[component].descriptor
        if num_tokens < item.ratio:  # no window before: it pools to nothing
            for layer in item.layers:
                ids = item.unit_rows + torch.arange(-item.ratio, 0) % item.num_rows
                keys, scores = target.pools[component].rows_f32(layer)[ids].chunk(2, dim=1)
                assert bool((keys == 0).all())
                assert bool((scores == -torch.inf).all())
                target.pools[component].rows_f32(layer).view(torch.uint8)[ids] = 0xCD
    for item in target.pools.layout.descriptors:
        assert bool((target.pools[item.component].bytes_ulb == 0xCD).all()), item.component


def test_a_record_needs_the_pages_of_its_tokens_and_room() -> None:
    model = model_of(raw_config(), Numerics.FLOAT32)
    runner = Runner(model, num_pages=3, num_slots=1, num_records=1)
    with pytest.raises(AssertionError, match="2 pages for 256 computed tokens, not 1"):
        runner.restore(0, 256, [0, 1], 0)
    runner.open(0)
    runner.extend(0, [2])
    with pytest.raises(AssertionError, match=r"a record of [0-9]+ bytes in a buffer of 8"):
        pack_record(runner.tables, 0, 9, torch.empty(8, dtype=torch.uint8), drafts=False)


@pytest.mark.parametrize("num_records", [0, 2])
def test_pages_and_records_lie_in_the_memory_that_is_given(num_records: int) -> None:
    asked: dict[str, tuple[int, int]] = {}
    memory: dict[str, Any] = {}

    def allocate(name: str, unit_bytes: int, num_units: int) -> ByteArray:
        asked[name] = unit_bytes, num_units
        memory[name] = plain_memory(name, unit_bytes, num_units)
        return memory[name]

    model = model_of(raw_config(), Numerics.SERVED, drafts=True)
    runner = Runner(model, num_pages=3, num_slots=2, num_records=num_records, drafts=True, allocate=allocate)
    paged = [item for item in runner.layout.descriptors if item.space is IndexSpace.PAGE]
    wanted = {item.component.value: (item.unit_bytes, 3) for item in paged}
    if num_records:
        wanted["records"] = record_bytes_max(runner.layout, drafts=True), num_records
    assert asked == wanted
    runner.open(1)
    runner.extend(1, [2])
    advance(runner, [SegmentTokens(slot=1, start=0, tokens=random_tokens(model.config, 250, seed=0))])
    for item in paged:
        assert [bool(page.any()) for page in memory[item.component.value].reshape(3, -1)] == [
            False,
            False,
            True,
        ]
    if num_records:
        num_bytes = runner.pack(1, 250, 1)
        first, second = memory["records"].reshape(2, -1)
        assert not first.any()
        assert second[:num_bytes].any()
        assert runner.records.shape == (2, wanted["records"][0])


# --- drafts ---


@numerics_of_both_kinds
@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_follow_the_model_step_by_step_are_those_of_one_pass(
    numerics: Numerics, seed: int
) -> None:
    """Two sequences, cut anyhow, in the same batches, against the block run over each whole."""
    model = model_of(raw_config(), numerics, drafts=True)
    lengths = [41, 30]
    prompts = [random_tokens(model.config, length, seed=length) for length in lengths]
    runner = Runner(model, num_pages=2, num_slots=2, drafts=True)
    runner.pools.fill(0xFF)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, [slot])
    found: list[list[Said]] = [[], []]
    for step in random_schedule(lengths, random.Random(seed)):
        work = [
            SegmentTokens(slot=slot, start=len(found[slot]), tokens=prompts[slot][len(found[slot]) :][:count])
            for slot, count in step
        ]
        for item, said in zip(work, advance(runner, work), strict=True):
            found[item.slot] += said
    wanted = run_drafting(model, prompts, [[(0, 40), (1, 29)]])
    for (logits, _), (first, *others) in zip(wanted, found, strict=True):
        assert first.draft is not None
        assert not len(first.draft)
        assert torch.equal(logits, torch.stack([item.draft for item in others if item.draft is not None]))
