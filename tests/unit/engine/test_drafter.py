"""The MTP drafter: its logits are those of the block run over the whole sequence at once, as far as its rows reach, and
it never reads what was not made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model.batch import build_batch
from engine.model.forward import Model
from engine.model.fresh import FreshState
from engine.plan import Restore, Segment
from engine.runner import Runner, SegmentTokens
from kvstore.layout import DRAFTS_MAX, IndexSpace, Numerics
from kvstore.pages import pages_for
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from tests.harness.models import random_tokens, raw_config, raw_configs, real_ratios
from tests.harness.speculating import (
    EVERYTHING,
    GREEDY,
    Speculating,
    Truth,
    exact_model,
)

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

torch.set_num_threads(1)

numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
FOCUSED = SamplingParams(
    seed=5, temperature=0.7, logit_bias=((1, 30.0), (2, 30.0), (4, 29.0)), logprobs=2, frequency_penalty=0.2
)
"""Three tokens are likely whatever the logits: many drafts are right, and many are not."""


class Reference:
    """The block over a whole sequence, without any kept state: every token's streams come from one pass."""

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        self._model = model
        self._tokens = torch.tensor(tokens)
        with torch.inference_mode():
            batch, _ = build_batch([(0, 0, self._tokens)], decode_together=False)
            self._streams = model.streams(model.begin(batch, FreshState(model.config, batch)))

    @torch.inference_mode()
    def logits(self, num_known: int, drafts: Sequence[int]) -> Tensor:
        """What the draft behind `num_known` tokens and `drafts` is chosen from."""
        streams = self._streams[: num_known - 1]
        next_tokens = self._tokens[1:num_known]
        found = self._draft(streams, next_tokens)
        for draft in drafts:
            streams = torch.cat((streams, found[-1:]))
            next_tokens = torch.cat((next_tokens, torch.tensor([draft])))
            found = self._draft(streams, next_tokens)
        return self._model.draft_logits(0, found[-1:])[0]

    def _draft(self, streams: Tensor, next_tokens: Tensor) -> Tensor:
        batch, _ = build_batch([(0, 0, next_tokens)], decode_together=False)
        run = self._model.begin(batch, FreshState(self._model.config, batch))
        return self._model.draft(run, 0, streams, next_tokens)


def check_heard(rank: Speculating, slots: Sequence[int]) -> None:
    """Every draft so far was chosen from the reference's logits."""
    references = {slot: Reference(rank.model, rank.tokens[slot]) for slot in slots}
    assert rank.sampler.heard
    for (slot, position), (item, logits) in rank.sampler.heard.items():
        assert item.position + len(item.drafts) == position
        wanted = references[slot].logits(item.position, item.drafts)
        assert torch.equal(logits, wanted), (
            f"slot {slot}, position {position}, after {len(item.drafts)} drafts"
        )


@numerics_of_both_kinds
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING, FOCUSED], ids=["greedy", "drawn", "focused"])
def test_any_number_of_drafts_gives_the_same_tokens_and_logprobs(
    numerics: Numerics, sampling: SamplingParams
) -> None:
    """A slot for each number, in the same batches, and one where it changes with every step."""
    model = exact_model(raw_config(), numerics)
    prompt = random_tokens(model.config, 21, seed=2).tolist()
    truth = Truth(model, prompt, sampling, num_tokens=40)
    slots = range(DRAFTS_MAX + 2)
    rank = Speculating(model, num_slots=len(slots), num_pages=len(slots))
    for slot in slots:
        rank.begin(slot, prompt, sampling, tokens_max=len(truth.tokens))
    rank.prefill(slots, chunk=8)
    chance = random.Random(0)
    while going := [slot for slot in slots if len(rank.tokens[slot]) < len(truth.tokens)]:
        rank.decode({slot: slot if slot <= DRAFTS_MAX else chance.randint(0, DRAFTS_MAX) for slot in going})
        for slot in going:
            truth.check(rank, slot)
    accepted = sum(item.num_accepted for items in rank.verified.values() for item in items)
    drafted = sum(item.num_drafts for items in rank.verified.values() for item in items)
    assert drafted > 0
    if sampling is FOCUSED:
        assert 0 < accepted < drafted


@numerics_of_both_kinds
@pytest.mark.parametrize(("num_prompt", "chunk"), [(2, 9), (7, 1), (8, 3), (9, 9), (40, 16), (41, 40)])
def test_drafts_are_chosen_from_the_logits_of_one_pass(
    numerics: Numerics, num_prompt: int, chunk: int
) -> None:
    """The window is 8: prompts shorter and longer, cut before, in and behind the last window. The block's own rows go
    on as drafts are accepted or not."""
    model = exact_model(raw_config(), numerics)
    rank = Speculating(model, num_slots=2, num_pages=2)
    for slot in range(2):
        rank.begin(slot, random_tokens(model.config, num_prompt + slot, seed=3 + slot).tolist(), FOCUSED)
    rank.prefill(range(2), chunk=chunk)
    for step in range(8):
        rank.decode({0: 3, 1: 1 + step % DRAFTS_MAX})
    check_heard(rank, range(2))
    assert any(item.num_accepted for item in rank.verified[0])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    raw=raw_configs(),
    numerics=st.sampled_from(Numerics),
    num_prompt=st.integers(2, 150),
    chunk=st.integers(3, 150),
    counts=st.lists(st.integers(1, DRAFTS_MAX), min_size=1, max_size=6),
)
def test_so_they_are_with_any_architecture(
    raw: dict[str, Any], numerics: Numerics, num_prompt: int, chunk: int, counts: list[int]
) -> None:
    if raw["index_head_dim"] == 20:
        raw["index_head_dim"] = 16  # served index rows have a power of two
    model = exact_model(raw, numerics)
    rank = Speculating(model)
    rank.begin(0, random_tokens(model.config, num_prompt, seed=num_prompt).tolist(), FOCUSED)
    rank.prefill([0], chunk=chunk)
    for count in counts:
        rank.decode({0: count})
    check_heard(rank, [0])


@numerics_of_both_kinds
def test_a_prompt_longer_than_the_real_window_is_drafted_from_as_in_one_pass(numerics: Numerics) -> None:
    model = exact_model(real_ratios(), numerics)
    rank = Speculating(model, num_slots=1)
    rank.begin(0, random_tokens(model.config, 300, seed=8).tolist(), FOCUSED)
    rank.prefill([0], chunk=110)
    for _ in range(4):
        rank.decode({0: 3})
    check_heard(rank, [0])


@numerics_of_both_kinds
def test_a_prompt_whose_first_indices_are_left_out_reads_nothing_that_was_not_made(
    numerics: Numerics,
) -> None:
    model = exact_model(raw_config(), numerics)
    runner = Runner(model, num_pages=1, num_slots=1, drafts=True)
    runner.pools.fill(0xFF)
    runner.open(0)
    runner.extend(0, [0])
    work = [SegmentTokens(slot=0, start=0, tokens=random_tokens(model.config, 40, seed=1))]
    streams, _ = runner.streams(work)
    runner.tables.draft_first_S[0] = 30
    (found,) = runner.advance_drafts(work, streams, firsts=[30])
    assert len(found) == 9
    assert bool(found.isfinite().all())


def test_a_prompt_of_one_token_has_drafts_from_its_second_step_on() -> None:
    model = exact_model(raw_config(), Numerics.FLOAT32)
    rank = Speculating(model)
    rank.begin(0, [5], GREEDY)
    counts = [len(rank.step(decode(rank, 3, page=0)).sampled), len(rank.step(decode(rank, 3)).sampled)]
    assert [item.num_drafts for item in rank.verified[0]] == [0, 3]
    assert counts[0] == 1
    check_heard(rank, [0])


# --- decodes without drafts leave the block behind ---


@numerics_of_both_kinds
@pytest.mark.parametrize("gap", [*range(8), 13])
@pytest.mark.parametrize("drafts", [1, DRAFTS_MAX])
def test_after_a_gap_drafts_are_made_of_the_streams_that_are_left(
    numerics: Numerics, gap: int, drafts: int
) -> None:
    """Rows of before the gap, and the rings' NaN and stale ones, are out of sight; without a gap all are in sight. The
    streams of five positions are kept, rejected ones included."""
    model = exact_model(raw_config(), numerics)
    prompt = random_tokens(model.config, 30, seed=4).tolist()
    rank = Speculating(model)
    rank.begin(0, prompt, GREEDY)
    rank.prefill([0])
    rank.decode({0: drafts})
    done = len(rank.tokens[0]) - rank.verified[0][0].num_accepted - 2  # indices
    written = done + drafts  # the last position of which streams were put
    for _ in range(gap):
        rank.decode({0: 0})
    rank.sampler.heard.clear()
    known = len(rank.tokens[0])
    rank.decode({0: 3})
    first = max(written, known - 2) - DRAFTS_MAX
    if first <= done:
        check_heard(rank, [0])
    else:
        check_rows_from(first, known, rank)
    rank.decode({0: 2})
    assert rank.verified[0][-1].num_drafts == 2


def check_rows_from(first: int, known: int, rank: Speculating) -> None:
    """What the drafts behind `known` tokens were chosen from is what a runner says that knows nothing of indices
    before `first`."""
    model, tokens = rank.model, torch.tensor(rank.tokens[0])
    plain = Runner(model, num_pages=1, num_slots=1, drafts=True)
    plain.pools.fill(0xFF)
    plain.open(0)
    plain.extend(0, [0])
    work = [SegmentTokens(slot=0, start=0, tokens=tokens[: known - 1])]
    streams, _ = plain.streams(work)
    plain.tables.draft_first_S[0] = first
    found = streams[:0]
    for index in range(first, known - 1):
        item = SegmentTokens(slot=0, start=index, tokens=tokens[index + 1 : index + 2])
        found = plain.draft([item], streams[index : index + 1])
    for count in range(3):
        continuation, logits = rank.sampler.heard[0, known + count]
        with torch.inference_mode():
            assert torch.equal(logits, model.draft_logits(0, found)[0])
        if count < 2:
            draft = rank.sampler.heard[0, known + count + 1][0].drafts[-1:]
            item = SegmentTokens(slot=0, start=known - 1 + count, tokens=torch.tensor(draft))
            found = plain.draft([item], found)
    assert continuation.position == known


# --- hand-over ---


@numerics_of_both_kinds
@pytest.mark.parametrize(
    ("raw", "num_prompt", "chunk"),
    [
        (raw_config(), 1, 9),
        (raw_config(), 2, 9),
        (raw_config(), 9, 8),  # the last chunk is one token, as a decode is
        (raw_config(), 30, 7),
        (real_ratios(), 257, 256),
        (real_ratios(), 300, 200),
    ],
)
def test_the_first_step_after_a_hand_over_verifies_drafts_as_if_nothing_had_moved(
    numerics: Numerics, raw: dict[str, object], num_prompt: int, chunk: int
) -> None:
    model = exact_model(raw, numerics)
    prompt = random_tokens(model.config, num_prompt, seed=6).tolist()
    truth = Truth(model, prompt, FOCUSED, num_tokens=24)
    lender = Speculating(model, num_records=1)
    lender.begin(0, prompt, FOCUSED)
    for start in range(0, num_prompt, chunk):
        count = min(chunk, num_prompt - start)
        last = start + count == num_prompt
        result = lender.step(
            Segment(
                slot=0,
                start=start,
                count=count,
                pages=lender.pages(0, start + count),
                sample=last,
                lend=True,
                record=0 if last else -1,
            )
        )
    [lent] = result.lent
    borrower = Speculating(model, num_records=1, num_pages=4)
    pages = tuple(range(pages_for(num_prompt)))
    for index, page in enumerate(pages[: num_prompt // PAGE_TOKENS]):
        source = int(lender.runner.tables.pages_SP[0, index])
        for item in lender.runner.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                read = lender.runner.pools[item.component].bytes_ulb[source]
                borrower.runner.pools[item.component].bytes_ulb[page] = read
    borrower.runner.records[0, : lent.record_bytes] = lender.runner.records[0, : lent.record_bytes]
    borrower.begin(
        0,
        lender.tokens[0],
        FOCUSED,
        num_prompt=num_prompt,
        restore=Restore(num_computed=num_prompt, pages=pages, record=0),
    )
    borrower.said[0] += lender.said[0]
    while len(borrower.tokens[0]) < num_prompt + 20:
        borrower.decode({0: 3})
        truth.check(borrower, 0)
    assert borrower.verified[0][0].num_drafts == 3
    check_heard(borrower, [0])


def test_a_slot_knows_nothing_of_the_sequence_before() -> None:
    """A long one with drafts, then a short one in the same rings."""
    model = exact_model(raw_config(), Numerics.SERVED)
    rank = Speculating(model)
    rank.begin(0, random_tokens(model.config, 200, seed=1).tolist(), GREEDY)
    rank.prefill([0])
    rank.decode({0: 4})
    rank.decode({0: 0})
    rank.step(closes=(0,))
    rank.sampler.heard.clear()
    rank.begin(0, random_tokens(model.config, 4, seed=2).tolist(), GREEDY)
    rank.prefill([0])
    for _ in range(6):
        rank.decode({0: 3})
    check_heard(rank, [0])


def decode(rank: Speculating, drafts: int, *, page: int | None = None) -> Segment:
    return Segment(
        slot=0,
        start=len(rank.tokens[0]) - 1,
        count=1,
        pages=() if page is None else (page,),
        sample=True,
        drafts=drafts,
    )
