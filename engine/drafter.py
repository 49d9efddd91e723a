"""Drafters: guesses at a sequence's next tokens, which the model's next forward then checks.

Owned by a rank (`engine.rank`), which tells its drafter of every slot and every forward, and asks for drafts at the
beginning of a step. A draft decides nothing about the output, since it is accepted only where the model itself samples
the same token: a drafter may guess as it likes, but writes only to draft components of the pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.runner import Runner, SegmentTokens
from engine.sampler import Continuation, Sampler
from kvstore.layout import DRAFTS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWish:
    """`tokens` i64 [N] are all tokens known of the sequence in `slot`; all but the newest have been computed. It wants
    drafts for positions N .. N+num_drafts-1."""

    slot: int
    tokens: Tensor
    num_drafts: int


class Drafter(Protocol):
    """Slots and pages are the rank's: a wish comes only when pages for all that it asks for are in the slot's table."""

    def open(self, slot: int, *, num_computed: int) -> None:
        """A sequence begins in `slot`; the state of its first `num_computed` tokens, the drafter's own included, has
        just been restored. Or it is rebuilt from there, and more than a window follows before its state is wanted."""
        ...

    def follow(self, work: Sequence[SegmentTokens], streams_TSD: Tensor, prompts: Mapping[int, int]) -> None:
        """The model has computed `work`: `streams_TSD` as `Runner.streams` returned them. Tokens of a sequence come in
        order, but go back to before drafts that were not accepted. `prompts` names the slots whose state must be kept
        up with what was computed, and says of each at how many tokens it may be wanted first, by drafts or by a record;
        in others only single tokens were computed, and the drafter may leave its state behind until it is asked for
        drafts."""
        ...

    def draft(self, wishes: Sequence[DraftWish]) -> list[tuple[int, ...]]:
        """Drafts for each wish, as many as it asks for or fewer. A slot comes at most once."""
        ...


@dataclass(slots=True, kw_only=True)
class _Progress:
    """How far the block has come in a slot. Index i of the block takes the streams at i and the token at i + 1."""

    num_indices: int  # 0 .. num_indices-1 are done, as far as they are wanted
    kept_first: (
        int  # streams of this position and later ones, up to the newest computed, are still in their ring
    )


class MtpDrafter:
    """Drafts with block 0 of the model's MTP blocks; every draft after the first feeds the block its own streams."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        assert runner.drafts, "a runner that does not hand over what drafts are made from"
        self._runner = runner
        self._sampler = sampler
        self._slots: dict[int, _Progress] = {}

    def open(self, slot: int, *, num_computed: int) -> None:
        last = max(num_computed - 1, 0)  # whose streams a record holds, and whose index is not computed yet
        self._slots[slot] = _Progress(num_indices=last, kept_first=last)

    def follow(self, work: Sequence[SegmentTokens], streams_TSD: Tensor, prompts: Mapping[int, int]) -> None:
        """Of a prompt the indices whose rows the first draft sees: a row is made of its own index's streams and token
        alone, so those before them need not be computed."""
        window = self._runner.model.config.sliding_window
        firsts: list[int] = []
        for item in work:
            end = item.start + len(item.tokens)
            if item.slot in prompts:
                least = max(prompts[item.slot] - window, item.start - 1)
                firsts.append(self._advance(item.slot, least, end - 1))
            else:
                firsts.append(end - 1)
            progress = self._slots[item.slot]
            progress.kept_first = max(progress.kept_first, end - DRAFTS_MAX - 1)
        self._runner.advance_drafts(work, streams_TSD, firsts=firsts, rows_only=True)

    def draft(self, wishes: Sequence[DraftWish]) -> list[tuple[int, ...]]:
        """Nothing of a sequence of one token: no streams have been computed."""
        drafts: list[tuple[int, ...]] = [()] * len(wishes)
        active = [index for index, wish in enumerate(wishes) if wish.num_drafts and len(wish.tokens) >= 2]
        if not active:
            return drafts
        streams_RSD = self._catch_up([wishes[index] for index in active])
        while True:
            logits_RV = self._runner.model.draft_logits(0, streams_RSD)
            wanted = [_continuation(wishes[index], drafts[index]) for index in active]
            for index, token_id in zip(active, self._sampler.draft(wanted, logits_RV), strict=True):
                drafts[index] = (*drafts[index], token_id)
            going_on = [
                row for row, index in enumerate(active) if len(drafts[index]) < wishes[index].num_drafts
            ]
            if not going_on:
                return drafts
            active = [active[row] for row in going_on]
            indices = [_speculative_index(wishes[index], drafts[index]) for index in active]
            streams_RSD = self._runner.draft(indices, streams_RSD[going_on])

    def _catch_up(self, wishes: Sequence[DraftWish]) -> Tensor:
        """Compute every index whose streams and token are known. The block's streams [wishes, S, D] at the last."""
        indices: list[SegmentTokens] = []
        last_rows: list[int] = []
        for wish in wishes:
            end = len(wish.tokens) - 1
            # Decodes without drafts have left the block behind, and streams that are gone are rows never made.
            first = self._advance(wish.slot, self._slots[wish.slot].kept_first, end)
            assert first < end, f"slot {wish.slot}: nothing computed since its last drafts"
            indices += [
                SegmentTokens(slot=wish.slot, start=index, tokens=wish.tokens[index + 1 : index + 2])
                for index in range(first, end)
            ]
            last_rows.append(len(indices) - 1)
            self._runner.tables.add_draft_rows(wish.slot, first, end)
        inputs = self._runner.kept_streams([item.slot for item in indices], [item.start for item in indices])
        return self._runner.draft(indices, inputs)[last_rows]

    def _advance(self, slot: int, least: int, end: int) -> int:
        """The first of the indices up to `end` to compute, from `least` on; they count as done."""
        progress = self._slots[slot]
        first = max(progress.num_indices, least)
        if first >= end:
            return end
        progress.num_indices = end
        return first


def _continuation(wish: DraftWish, drafts: tuple[int, ...]) -> Continuation:
    return Continuation(slot=wish.slot, position=len(wish.tokens), drafts=drafts)


def _speculative_index(wish: DraftWish, drafts: tuple[int, ...]) -> SegmentTokens:
    """The index that takes the last draft: its streams are the block's own, of the index before."""
    start = len(wish.tokens) - 2 + len(drafts)
    return SegmentTokens(slot=wish.slot, start=start, tokens=torch.tensor(drafts[-1:]))
