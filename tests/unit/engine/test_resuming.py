"""Going on from pages that are there already: from a tail, by rebuilding a tail that is gone, or without computing
anything. Tokens, logprobs and state are those of a sequence computed from its first token, bit for bit; pages that are
shared are not written; memory is NaN wherever it was not told otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.model.forward import Model
from engine.plan import Restore, Sampled, Segment, StepResult, TailPoint
from engine.runner import SegmentTokens
from kvstore.handover import Part, rebuild_tokens, record_parts
from kvstore.layout import Component, IndexSpace, Numerics
from kvstore.pages import pages_for
from rorqual.model_config import PAGE_TOKENS
from tests.harness.models import CSA, HCA, SWA, random_tokens, raw_config, real_ratios
from tests.harness.speculating import EVERYTHING, Speculating, exact_model

torch.set_num_threads(1)

numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
with_and_without_drafts = pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])

SPARE = 0
"""A record that is written again and again; that of the tail at page boundary k is k."""


class Origin:
    """A rank whose slot 0 has computed `num_tokens` tokens and keeps their pages, and the tail at each page boundary.
    The other slots are for those who go on from there."""

    def __init__(self, model: Model, num_tokens: int, *, drafts: bool, num_slots: int = 2) -> None:
        self.tokens = random_tokens(model.config, num_tokens, seed=num_tokens).tolist()
        options: dict[str, Any] = {} if drafts else {"make_drafter": lambda runner, sampler: None}
        self.drafts = drafts
        self.num_boundaries = num_tokens // PAGE_TOKENS
        self.rank = Speculating(
            model,
            num_slots=num_slots,
            num_pages=4 * pages_for(num_tokens) + num_slots,
            drafts=drafts,
            num_records=self.num_boundaries + 1,
            **options,
        )
        self.span = rebuild_tokens(self.rank.runner.layout)
        rank = self.rank
        rank.begin(0, self.tokens, EVERYTHING)
        rank.step(
            Segment(
                slot=0,
                start=0,
                count=num_tokens,
                pages=rank.pages(0, num_tokens + 1),
                sample=False,
                tails=tuple(
                    TailPoint(num_tokens=PAGE_TOKENS * number, record=number)
                    for number in range(1, self.num_boundaries + 1)
                ),
            )
        )
        self.pages = rank.pages_of(0, num_tokens)
        self._bytes = self._page_bytes()

    def tail(self, boundary: int) -> bytes:
        return self.rank.record(boundary // PAGE_TOKENS, boundary)

    def cold(self, num_prompt: int, num_tokens: int) -> list[Sampled]:
        """What is said after the first `num_prompt` tokens by a sequence that shares nothing."""
        self.open(1, num_prompt)
        self.compute(1, 0, num_prompt, sample=True)
        return self.end(1, num_tokens)

    def open(self, slot: int, num_prompt: int, restore: Restore | None = None) -> None:
        self.poison(slot)
        self.rank.begin(slot, self.tokens[:num_prompt], EVERYTHING, restore=restore)

    def poison(self, slot: int) -> None:
        """Every byte of the slot's rings, and of pages that nobody holds."""
        pools = self.rank.runner.pools
        for item in pools.layout.descriptors:
            units = [slot] if item.space is IndexSpace.SLOT else self.rank.pages_free
            pools[item.component].bytes_ulb[units] = 0xFF

    def resume(self, slot: int, num_prompt: int, boundary: int) -> None:
        """From the tail, which is spoilt as soon as it has been read: whoever evicts it may use its record."""
        records, number = self.rank.runner.records, boundary // PAGE_TOKENS
        kept = records[number].clone()
        pages = self.pages[:number]
        self.open(slot, num_prompt, Restore(num_computed=boundary, pages=pages, record=number))
        records[number] = 0xFF
        self.compute(slot, boundary, num_prompt, sample=True)
        records[number] = kept

    def rebuild(
        self, slot: int, boundary: int, *, num_prompt: int, span: int | None = None, seed: int = 0
    ) -> bytes:
        """Without the tail: the last `span` tokens before the boundary again, cut anyhow. Returns the new tail."""
        first = max(0, boundary - (self.span if span is None else span))
        pages = self.pages[: first // PAGE_TOKENS]
        self.open(slot, num_prompt, Restore(num_computed=first, pages=pages, record=-1))
        self.rank.runner.records[SPARE] = 0xFF
        self.replay(slot, first, boundary, seed=seed)
        return self.rank.record(SPARE, boundary)

    def replay(self, slot: int, first: int, boundary: int, *, seed: int) -> None:
        chance = random.Random(seed)
        # Single tokens, which are computed as decodes, at the beginning. The last chunk is longer than a window: a
        # tail's draft rows are made by the chunk that has it.
        cuts = sorted(
            {first + 1, first + 2, boundary - 250, *chance.sample(range(first + 1, boundary - 250), 2)}
        )
        for start, end in zip((first, *cuts), (*cuts, boundary), strict=True):
            held = self.rank.runner.tables.num_pages[slot]
            self.rank.step(
                Segment(
                    slot=slot,
                    start=start,
                    count=end - start,
                    pages=self.rank.share(slot, self.pages[held : pages_for(end)]),
                    sample=end == len(self.rank.tokens[slot]),
                    replay=True,
                    tails=(TailPoint(num_tokens=end, record=SPARE),) if end == boundary else (),
                )
            )

    def compute(self, slot: int, start: int, end: int, *, sample: bool, **options: Any) -> StepResult:
        return self.rank.step(
            Segment(
                slot=slot,
                start=start,
                count=end - start,
                pages=self.rank.pages(slot, end),
                sample=sample,
                **options,
            )
        )

    def end(self, slot: int, num_tokens: int) -> list[Sampled]:
        """Decode until so many tokens have been sampled, and close the slot: what was said. If there are drafts, they
        are verified."""
        rank, chance = self.rank, random.Random(slot)
        while len(rank.said[slot]) < num_tokens:
            rank.decode({slot: chance.randint(0, 3) if self.drafts else 0})
        assert self._page_bytes() == self._bytes, "a shared page was written"
        rank.close(slot)
        return [_anywhere(item) for item in rank.said[slot][:num_tokens]]

    def _page_bytes(self) -> list[bytes]:
        pools = self.rank.runner.pools
        return [
            pools[item.component].bytes_ulb[page].numpy().tobytes()
            for item in pools.layout.descriptors
            if item.space is IndexSpace.PAGE
            for page in self.pages
        ]


def _anywhere(item: Sampled) -> Sampled:
    """Without its slot."""
    return Sampled(slot=0, token_id=item.token_id, logprob=item.logprob, alternatives=item.alternatives)


NUM_SAID = 10


def check_conformance(model: Model, num_tokens: int, *, drafts: bool) -> None:
    """From every page boundary of a prompt in every way, against a cold sequence."""
    origin = Origin(model, num_tokens, drafts=drafts)
    said = origin.cold(num_tokens, NUM_SAID)
    for boundary in range(PAGE_TOKENS, num_tokens + 1, PAGE_TOKENS):
        at_boundary = origin.cold(boundary, NUM_SAID)
        if boundary < num_tokens:
            origin.resume(1, num_tokens, boundary)
            assert origin.end(1, NUM_SAID) == said, f"resumed at {boundary}"
        assert origin.rebuild(1, boundary, num_prompt=num_tokens, seed=boundary) == origin.tail(boundary)
        if boundary < num_tokens:
            origin.compute(1, boundary, num_tokens, sample=True)
        assert origin.end(1, NUM_SAID) == said, f"rebuilt at {boundary}"
        assert origin.rebuild(1, boundary, num_prompt=boundary, seed=1) == origin.tail(boundary)
        assert origin.end(1, NUM_SAID) == at_boundary, f"rebuilt a prompt of {boundary}"
        number = boundary // PAGE_TOKENS
        restore = Restore(num_computed=boundary, pages=origin.pages[:number], record=number)
        origin.open(1, boundary, restore)
        result = origin.compute(1, boundary, boundary, sample=True)
        assert len(result.sampled) == 1
        assert origin.end(1, NUM_SAID) == at_boundary, f"a full hit at {boundary}"


@numerics_of_both_kinds
@with_and_without_drafts
def test_a_prompt_goes_on_from_every_page_boundary_as_if_it_was_computed(
    numerics: Numerics, drafts: bool
) -> None:
    check_conformance(exact_model(raw_config(), numerics), 2 * PAGE_TOKENS + 40, drafts=drafts)


@pytest.mark.minutes
@numerics_of_both_kinds
@with_and_without_drafts
def test_so_it_does_over_many_pages_that_end_with_one(numerics: Numerics, drafts: bool) -> None:
    """The indexer chooses among 256 rows; a span of three pages begins inside the sequence."""
    model = exact_model(real_ratios(), numerics)
    check_conformance(model, 4 * PAGE_TOKENS, drafts=drafts)


@numerics_of_both_kinds
def test_sequences_resume_rebuild_and_hit_beside_each_other(numerics: Numerics) -> None:
    """In the same steps, from the same pages and the same tail."""
    model = exact_model(raw_config(), numerics)
    origin = Origin(model, 552, drafts=True, num_slots=4)
    wanted = origin.cold(552, 8)
    hit = origin.cold(512, 8)
    rank = origin.rank
    shared = origin.pages[:2]
    origin.open(1, 552, Restore(num_computed=512, pages=shared, record=2))
    origin.open(2, 552, Restore(num_computed=256, pages=shared[:1], record=-1))
    origin.open(3, 512, Restore(num_computed=512, pages=shared, record=2))
    replayed = Segment(
        slot=2, start=256, count=256, pages=rank.share(2, shared[1:]), sample=False, replay=True
    )
    hitting = Segment(slot=3, start=512, count=0, pages=(), sample=True)
    computed = Segment(slot=1, start=512, count=40, pages=rank.pages(1, 552), sample=True)
    result = rank.step(replayed, hitting, computed)
    assert [item.slot for item in result.sampled] == [3, 1]
    last = Segment(slot=2, start=512, count=40, pages=rank.pages(2, 552), sample=True)
    verifying = [
        Segment(slot=slot, start=start, count=1, pages=rank.pages(slot, start + 4), sample=True, drafts=3)
        for slot, start in ((1, 552), (3, 512))
    ]
    rank.step(verifying[1], last, verifying[0])
    for slot, said in ((1, wanted), (2, wanted), (3, hit)):
        assert origin.end(slot, 8) == said, slot


@numerics_of_both_kinds
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 127, 300])
def test_a_record_of_any_length_is_enough_to_sample_the_next_token(
    numerics: Numerics, num_tokens: int
) -> None:
    """Of what a prefill worker packs, too."""
    model = exact_model(raw_config(), numerics)
    origin = Origin(model, 300, drafts=True)
    said = origin.cold(num_tokens, 6)
    rank = origin.rank
    origin.open(1, num_tokens)
    origin.compute(1, 0, num_tokens, sample=True, lend=True, record=SPARE)
    pages = rank.pages_of(1, num_tokens)
    rank.close(1, keep_pages=True)
    origin.poison(1)
    rank.begin(
        1,
        origin.tokens[:num_tokens],
        EVERYTHING,
        restore=Restore(num_computed=num_tokens, pages=pages, record=SPARE),
    )
    origin.compute(1, num_tokens, num_tokens, sample=True)
    assert origin.end(1, 6) == said


def test_served_streams_are_kept_without_loss() -> None:
    """The model leaves them as bf16 values."""
    model = exact_model(raw_config(), Numerics.SERVED)
    origin = Origin(model, 40, drafts=False)
    runner = origin.rank.runner
    work = [SegmentTokens(slot=0, start=40, tokens=torch.tensor([7]))]
    streams, _ = runner.streams(work)
    runner.keep_streams(streams)
    assert bool(streams.any())
    assert torch.equal(streams.bfloat16().float(), streams)
    assert torch.equal(runner.kept_streams([0], [40]), streams)


# --- how far back a rebuild must begin ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    component: Component
    layer: int
    position: int


def differing(origin: Origin, found: bytes, wanted: bytes, boundary: int) -> set[Row]:
    """Rows of two records that are not the same; f32, so there are no scales."""
    rows: set[Row] = set()
    layout = origin.rank.runner.layout
    for part in record_parts(layout, boundary, drafts=True):
        layers = origin.rank.runner.pools[part.component].descriptor.layers
        size = part.num_bytes // (len(layers) * part.count)
        for index, (layer, row) in enumerate((layer, row) for layer in layers for row in range(part.count)):
            piece = slice(part.offset + index * size, part.offset + (index + 1) * size)
            if found[piece] != wanted[piece]:
                rows.add(Row(component=part.component, layer=layer, position=part.first + row))
    return rows


def made_of(part: Part, layer: int, num_layers: int) -> int:
    """How many layers stand below a row of a record."""
    return num_layers if part.component in (Component.LAST_STREAMS, Component.DRAFT_WINDOW) else layer


@pytest.mark.parametrize(
    ("layers", "window"),
    [((SWA, CSA), 128), ((SWA, CSA, HCA), 128), ((CSA, HCA, CSA, SWA), 100), ((CSA, CSA), 200)],
)
@pytest.mark.parametrize("num_pages", [1, 2, 3])
def test_a_row_is_right_exactly_as_far_behind_an_empty_window_as_layers_and_windows_say(
    layers: Sequence[str], window: int, num_pages: int
) -> None:
    """So a rebuild of so many tokens as the formula says makes every row, and one page less does not."""
    raw = raw_config(
        layers, num_hash=1, sliding_window=window, compress_rates={CSA: 4, HCA: 128}, index_topk=16
    )
    origin = Origin(exact_model(raw, Numerics.FLOAT32), 4 * PAGE_TOKENS, drafts=True)
    origin.rank.runner.rebuilt_at = lambda slot: 0  # type: ignore[method-assign]  # it forbids what is tried here
    boundary, span = 4 * PAGE_TOKENS, num_pages * PAGE_TOKENS
    found = origin.rebuild(1, boundary, num_prompt=boundary, span=span)
    first = boundary - span
    wanted = {
        Row(component=part.component, layer=layer, position=position)
        for part in record_parts(origin.rank.runner.layout, boundary, drafts=True)
        for layer in origin.rank.runner.pools[part.component].descriptor.layers
        for position in range(part.first, part.first + part.count)
        if position < first + made_of(part, layer, len(layers)) * (window - 1)
    }
    assert differing(origin, found, origin.tail(boundary), boundary) == wanted
    assert (not wanted) == (span >= origin.span)


def test_nothing_is_made_of_a_sequence_that_is_not_rebuilt_yet() -> None:
    model = exact_model(real_ratios(), Numerics.FLOAT32)
    origin = Origin(model, 5 * PAGE_TOKENS, drafts=False)
    assert origin.span == 3 * PAGE_TOKENS
    pages = origin.pages[:1]
    for number, wrong in enumerate(
        (
            {"replay": False},
            {"replay": True, "tails": (TailPoint(num_tokens=512, record=SPARE),)},
            {"replay": True, "lend": True, "record": SPARE},
        )
    ):
        origin.open(1, 1024, Restore(num_computed=256, pages=pages, record=-1))
        segment = Segment(
            slot=1, start=256, count=256, pages=origin.rank.share(1, origin.pages[1:2]), sample=False, **wrong
        )
        with pytest.raises(AssertionError, match="slot 1 is not rebuilt before 1024"):
            origin.rank.step(segment)
        origin.rank.close(1)
        assert number < 3
