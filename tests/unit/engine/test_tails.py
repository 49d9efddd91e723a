"""Tails inside a step: the bytes are those of a record packed after a chunk that ends there, however the tokens are
cut, and only accepted tokens are in them. So it is with the digests of pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from engine.drafter import MtpDrafter
from engine.model.forward import Model
from engine.plan import Completed, Segment, StepResult, Tailed, TailPoint
from kvstore.handover import record_parts
from kvstore.layout import DRAFTS_MAX, Component, Numerics
from kvstore.pages import pages_for
from rorqual.model_config import PAGE_TOKENS
from tests.harness.models import random_tokens, raw_config, raw_configs, real_ratios
from tests.harness.speculating import EVERYTHING, GREEDY, Oracle, Speculating, Truth, exact_model

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

torch.set_num_threads(1)

numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
with_and_without_drafts = pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])


def a_rank(model: Model, *, drafts: bool, num_slots: int = 1, num_pages: int = 8) -> Speculating:
    options: dict[str, Any] = {} if drafts else {"make_drafter": lambda runner, sampler: None}
    return Speculating(
        model, num_slots=num_slots, num_pages=num_pages, drafts=drafts, num_records=8, **options
    )


def boundaries(start: int, end: int) -> range:
    """Page boundaries that tokens start .. end-1 reach."""
    return range((start // PAGE_TOKENS + 1) * PAGE_TOKENS, end + 1, PAGE_TOKENS)


def cut_tails(model: Model, prompt: Sequence[int], cuts: Sequence[int], *, drafts: bool) -> dict[int, bytes]:
    """The record at every page boundary of a prompt computed in chunks that end at `cuts`."""
    rank = a_rank(model, drafts=drafts)
    rank.begin(0, prompt, GREEDY)
    found: dict[int, bytes] = {}
    for start, end in zip((0, *cuts), cuts, strict=False):
        tails = tuple(TailPoint(num_tokens=at, record=at // PAGE_TOKENS) for at in boundaries(start, end))
        result = rank.step(
            Segment(
                slot=0,
                start=start,
                count=end - start,
                pages=rank.pages(0, end),
                sample=end == len(prompt),
                tails=tails,
            )
        )
        assert [item.num_tokens for item in result.tailed] == [point.num_tokens for point in tails]
        for item, point in zip(result.tailed, tails, strict=True):
            found[point.num_tokens] = rank.record(point.record, point.num_tokens)
            assert len(found[point.num_tokens]) == item.num_bytes
            assert item.digest == rank.rank.digests.of_record(point.record, item.num_bytes)
    return found


def ending_tails(
    model: Model, prompt: Sequence[int], cuts: Sequence[int], *, drafts: bool
) -> dict[int, bytes]:
    """As `cut_tails`, where a chunk ends at every page boundary too, and its record is packed after it. The draft block
    is kept up over the same chunks: what follows a boundary up to the next cut is packed too."""
    rank = a_rank(model, drafts=drafts)
    rank.begin(0, prompt, GREEDY)
    found: dict[int, bytes] = {}
    ends = sorted({*cuts, *boundaries(0, len(prompt))})
    for start, end in zip((0, *ends), ends, strict=False):
        packed = end % PAGE_TOKENS == 0 or (start % PAGE_TOKENS == 0 and start > 0 and start not in cuts)
        segment = Segment(
            slot=0,
            start=start,
            count=end - start,
            pages=rank.pages(0, end),
            sample=end == len(prompt),
            lend=packed,
            record=0 if packed else -1,
        )
        rank.step(segment)
        if end % PAGE_TOKENS == 0:
            found[end] = rank.record(0, end)
    return found


CUTS = [(800,), (256, 800), (300, 800), (250, 270, 800), (255, 256, 257, 700, 768, 800), (767, 768, 769, 800)]


@numerics_of_both_kinds
@with_and_without_drafts
@pytest.mark.parametrize("window", [8, pytest.param(300, marks=pytest.mark.minutes)])
def test_a_tail_inside_a_chunk_is_the_record_of_a_chunk_that_ends_there(
    numerics: Numerics, drafts: bool, window: int
) -> None:
    """With a window longer than a page, some of a tail's rows are of before the chunk."""
    model = exact_model(raw_config(sliding_window=window), numerics)
    prompt = random_tokens(model.config, 800, seed=1).tolist()
    for cuts in CUTS:
        found = cut_tails(model, prompt, cuts, drafts=drafts)
        assert list(found) == [256, 512, 768]
        assert found == ending_tails(model, prompt, cuts, drafts=drafts), cuts


@pytest.mark.slow
@numerics_of_both_kinds
@with_and_without_drafts
def test_so_it_is_with_the_real_window_and_ratios(numerics: Numerics, drafts: bool) -> None:
    model = exact_model(real_ratios(), numerics)
    prompt = random_tokens(model.config, 800, seed=2).tolist()
    for cuts in CUTS:
        found = cut_tails(model, prompt, cuts, drafts=drafts)
        assert found == ending_tails(model, prompt, cuts, drafts=drafts), cuts


@pytest.mark.slow
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    raw=raw_configs(),
    numerics=st.sampled_from(Numerics),
    drafts=st.booleans(),
    cuts=st.sets(st.integers(1, 599), max_size=5),
)
def test_so_it_is_with_any_architecture_and_any_cuts(
    raw: dict[str, Any], numerics: Numerics, drafts: bool, cuts: set[int]
) -> None:
    if raw["index_head_dim"] == 20:
        raw["index_head_dim"] = 16  # served index rows have a power of two
    model = exact_model(raw, numerics)
    prompt = random_tokens(model.config, 600, seed=len(cuts)).tolist()
    ends = sorted({*cuts, 600})
    found = cut_tails(model, prompt, ends, drafts=drafts)
    assert found == ending_tails(model, prompt, ends, drafts=drafts)


@with_and_without_drafts
def test_tails_of_several_sequences_in_one_step_are_those_of_each_alone(drafts: bool) -> None:
    """Beside a decode, and a chunk without a tail."""
    model = exact_model(raw_config(), Numerics.SERVED)
    lengths = [530, 9, 257, 40]
    prompts = [random_tokens(model.config, length, seed=length).tolist() for length in lengths]
    wanted = [ending_tails(model, prompts[slot], [lengths[slot]], drafts=drafts) for slot in (0, 2)]
    rank = a_rank(model, drafts=drafts, num_slots=4)
    for slot, prompt in enumerate(prompts):
        rank.begin(slot, prompt, GREEDY)
    rank.prefill([1])
    tails = {
        0: (TailPoint(num_tokens=256, record=3), TailPoint(num_tokens=512, record=0)),
        2: (TailPoint(num_tokens=256, record=5),),
    }
    result = rank.step(
        *(
            Segment(
                slot=slot,
                start=0,
                count=lengths[slot],
                pages=rank.pages(slot, lengths[slot]),
                sample=True,
                tails=tails.get(slot, ()),
            )
            for slot in (3, 2, 0)
        ),
        Segment(slot=1, start=9, count=1, pages=(), sample=True),
    )
    assert [(item.slot, item.num_tokens) for item in result.tailed] == [(2, 256), (0, 256), (0, 512)]
    assert {256: rank.record(3, 256), 512: rank.record(0, 512)} == wanted[0]
    assert {256: rank.record(5, 256)} == wanted[1]


@pytest.mark.parametrize(("start", "count", "at"), [(0, 300, 255), (256, 44, 256), (0, 255, 256)])
def test_a_tail_is_at_a_page_boundary_of_its_own_chunk(start: int, count: int, at: int) -> None:
    model = exact_model(raw_config(), Numerics.FLOAT32)
    rank = a_rank(model, drafts=False)
    rank.begin(0, random_tokens(model.config, 300, seed=1).tolist(), GREEDY)
    if start:
        rank.step(Segment(slot=0, start=0, count=start, pages=rank.pages(0, start), sample=False))
    wrong = Segment(
        slot=0,
        start=start,
        count=count,
        pages=rank.pages(0, start + count),
        sample=False,
        tails=(TailPoint(num_tokens=at, record=0),),
    )
    with pytest.raises(AssertionError, match=f"a tail at {at}"):
        rank.step(wrong)


# --- decodes ---

HITS = [(drafts, hits) for drafts in range(DRAFTS_MAX + 1) for hits in range(drafts + 1)]


def decode(rank: Speculating, slot: int, drafts: int) -> StepResult:
    """With a record for a tail, and digests of what is completed."""
    known = len(rank.tokens[slot])
    segment = Segment(
        slot=slot,
        start=known - 1,
        count=1,
        pages=rank.pages(slot, known + drafts),
        sample=True,
        drafts=drafts,
        digest=True,
        tail_record=slot % 8,
    )
    return rank.step(segment)


@numerics_of_both_kinds
@pytest.mark.parametrize("num_prompt", [252, 255, 256])
def test_a_decode_that_reaches_a_page_boundary_leaves_its_tail_and_page_and_no_other_does(
    numerics: Numerics, num_prompt: int
) -> None:
    """Whatever is drafted and accepted on both sides of the boundary."""
    model = exact_model(real_ratios(), numerics)
    prompt = random_tokens(model.config, num_prompt, seed=3).tolist()
    truth = Truth(model, prompt, EVERYTHING, num_tokens=16)
    beyond = [*truth.tokens, *[0] * DRAFTS_MAX]
    now = [(0, 0)]
    rank = Speculating(
        model,
        num_slots=len(HITS),
        num_pages=2 * len(HITS),
        make_drafter=lambda runner, sampler: Oracle(
            None, dict.fromkeys(range(len(HITS)), beyond), lambda slot, known: now[0][1]
        ),
        drafts=False,
        num_records=8,
    )
    for slot, pattern in enumerate(HITS):
        now[0] = pattern
        rank.begin(slot, prompt, EVERYTHING)
        rank.prefill([slot])
        while len(rank.tokens[slot]) < num_prompt + 8:
            before = len(rank.tokens[slot]) - 1
            rank.runner.records.fill_(0xFF)
            result = decode(rank, slot, pattern[0])
            reached = list(boundaries(before, len(rank.tokens[slot]) - 1))
            truth.check(rank, slot)
            assert [item.num_tokens for item in result.tailed] == reached
            if not reached:
                assert result.completed == ()
                assert bool((rank.runner.records == 0xFF).all())
                continue
            record = rank.record(slot % 8, 256)
            digests = tuple(rank.rank.digests.of_pages(rank.pages_of(slot, 256)))
            size, digest = len(record), rank.rank.digests.of_record(slot % 8, len(record))
            assert result.tailed == (Tailed(slot=slot, num_tokens=256, num_bytes=size, digest=digest),)
            assert result.completed == (Completed(slot=slot, first=0, page_digests=digests),)
            assert state_at(truth, 256).endswith(record)
            assert b"".join(pages_bytes(rank, rank.pages_of(slot, 256))) + record == state_at(truth, 256)


def state_at(truth: Truth, num_tokens: int) -> bytes:
    return truth.states[num_tokens]


def pages_bytes(rank: Speculating, pages: Sequence[int]) -> list[bytes]:
    return [
        pool.bytes_ulb[page].numpy().tobytes()
        for item in rank.runner.layout.descriptors
        if item.component in (Component.C4, Component.C4_INDEX, Component.C128)
        for pool in [rank.runner.pools[item.component]]
        for page in pages
    ]


@numerics_of_both_kinds
@pytest.mark.parametrize("accepted", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("gap", [0, 1, 7])
def test_draft_rows_that_a_tail_lacks_are_zeros(numerics: Numerics, gap: int, accepted: bool) -> None:
    """Rows of indices that steps without drafts have left out, and of those that have no true streams yet: here the
    drafts are given, and the block has made none since the prompt. The ring holds NaN and rejected drafts' rows there.
    """
    model = exact_model(raw_config(sliding_window=16), numerics)
    prompt = random_tokens(model.config, 251 - gap, seed=4).tolist()
    truth = Truth(model, prompt, GREEDY, num_tokens=20).tokens if accepted else []
    rank = Speculating(
        model,
        make_drafter=lambda runner, sampler: (
            Oracle(MtpDrafter(runner, sampler), {0: truth}, lambda slot, known: 3)
            if accepted
            else MtpDrafter(runner, sampler)
        ),
        num_records=8,
    )
    rank.begin(0, prompt, GREEDY)
    rank.prefill([0])
    for _ in range(gap):
        rank.decode({0: 0})
    tailed: tuple[Tailed, ...] = ()
    while not tailed:
        tailed = decode(rank, 0, 3).tailed
    made = (int(rank.runner.tables.draft_first_S[0]), rank.runner.tables.draft_end[0])
    (part,) = [
        part
        for part in record_parts(rank.runner.layout, 256, drafts=True)
        if part.component is Component.DRAFT_WINDOW
    ]
    size = part.num_bytes // part.count
    content = rank.record(0, 256)[part.offset : part.offset + part.num_bytes]
    item = rank.runner.pools[Component.DRAFT_WINDOW].descriptor
    assert size == item.row_bytes
    rows = [
        content[row * item.data_bytes : (row + 1) * item.data_bytes]
        + content[part.count * item.data_bytes :][row * item.scale_bytes : (row + 1) * item.scale_bytes]
        for row in range(part.count)
    ]
    there = [any(row) for row in rows]
    assert there == [made[0] <= part.first + row < made[1] for row in range(part.count)]
    assert any(there)
    assert all(there) == (not accepted and gap < 7)


# --- digests ---


@pytest.mark.parametrize("chunk", [100, 256, 300, 1000])
def test_completed_pages_are_reported_with_digests_once(chunk: int) -> None:
    model = exact_model(raw_config(), Numerics.SERVED)
    rank = a_rank(model, drafts=False, num_slots=2)
    prompt = random_tokens(model.config, 700, seed=5).tolist()
    rank.begin(0, prompt, GREEDY)
    found: dict[int, int] = {}
    for start in range(0, 700, chunk):
        count = min(chunk, 700 - start)
        last = start + count == 700
        lend = random.Random(start).random() < 0.5
        result = rank.step(
            Segment(
                slot=0,
                start=start,
                count=count,
                pages=rank.pages(0, start + count),
                sample=last,
                digest=True,
                lend=lend,
            )
        )
        for item in result.completed:
            assert item.first == len(found) // 3
            found.update(enumerate(item.page_digests, start=len(found)))
        assert [item.page_digests for item in result.lent] == (
            [result.completed[0].page_digests if result.completed else ()] if lend else []
        )
    pages = rank.pages_of(0, 700)[:2]
    assert list(found.values()) == rank.rank.digests.of_pages(pages)
    assert pages_for(700) == 3
