"""A rank with a computable answer that holds its host to the contract of `engine.plan` to the letter.

The next token is a hash of (the token before, its position, seed, choice). `FakeRank` answers plans in the process;
run as a program (`python fake_rank.py --fd N [--step-ms M]`) it is the other end of `engine.worker.rank_link`.
"""

from __future__ import annotations

import argparse
import contextlib
import struct
import time
from dataclasses import dataclass, field

import msgspec

from engine.frames import join_host, read_frame, write_frame
from engine.plan import (
    PromptScores,
    RankFailed,
    RankProgress,
    RankReady,
    RankSettings,
    Sampled,
    Segment,
    Shutdown,
    SlotOpen,
    StepPlan,
    StepResult,
)
from rorqual.sampling import SamplingParams

PAGE_TOKENS = 256
VOCAB_SIZE = 97
EOS = 1
POSITIONS_MAX = 4096


def next_token(last: int, position: int, sampling: SamplingParams) -> int:
    """The token at `position`, which follows `last`. One in 97 ends the sequence."""
    value = (last * 1_000_003 + position * 7919 + sampling.seed * 104_729 + sampling.choice * 31 + 17) % 2**32
    value ^= value >> 15
    value = value * 2_246_822_519 % 2**32
    value ^= value >> 13
    return value % VOCAB_SIZE


def logprob_of(token: int, position: int) -> float:
    """A power of two times a small integer: exact in float32, which is what crosses the wire."""
    return -(token + position % 8 + 1) / 16


def answer(
    prompt: list[int], max_tokens: int, sampling: SamplingParams, *, ignore_eos: bool = False
) -> list[int]:
    """The whole completion, one token after another."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens[-1], len(tokens), sampling))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class Slot:
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)


class FakeRank:
    def __init__(self, *, num_pages: int, num_slots: int, prefill_tokens_max: int) -> None:
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.prefill_tokens_max = prefill_tokens_max
        self.slots: dict[int, Slot] = {}
        self.num_steps = 0
        self.num_tokens_computed = 0

    def ready(self) -> RankReady:
        return RankReady(
            num_pages=self.num_pages,
            num_slots=self.num_slots,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=POSITIONS_MAX,
            eos_token_ids=(EOS,),
            model_fingerprint="fake",
            numerics="float32",
            kernels=(("attention", "fake"), ("argmax", "torch")),
            weight_bytes=0,
            state_bytes=0,
            has_mtp=False,
            notices=("no MTP weights: served without drafts",),
        )

    def step(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        assert plan.number == self.num_steps, f"plan {plan.number} is the {self.num_steps}th"
        assert plan.closes or plan.opens or plan.segments, "empty plan"
        for slot in plan.closes:
            assert slot in self.slots, f"close of slot {slot}, which is not open"
            del self.slots[slot]
        for item in plan.opens:
            self._open(item)
        slots = [segment.slot for segment in plan.segments]
        assert len(slots) == len(set(slots)), "two segments of one slot in a plan"
        assert {item.slot for item in plan.opens} <= set(slots), "a slot is opened and not computed"
        prefill = sum(segment.count for segment in plan.segments if segment.count > 1)
        assert prefill <= self.prefill_tokens_max, f"{prefill} prefill tokens in one step"
        # All page tables first: a page must belong to one sequence among all of the step.
        for segment in plan.segments:
            self._map(segment)
        self._check_pages()
        sampled, scores = [], []
        for segment in plan.segments:
            self._compute(segment, sampled, scores)
        return StepResult(
            number=plan.number, sampled=tuple(sampled), prompt_scores=tuple(scores), step_ms=1.0
        )

    def _open(self, item: SlotOpen) -> None:
        assert 0 <= item.slot < self.num_slots, f"slot {item.slot} of {self.num_slots}"
        assert item.slot not in self.slots, f"slot {item.slot} opened while open"
        tokens = [token for (token,) in struct.iter_unpack("<i", item.tokens)]
        assert 1 <= item.num_prompt <= len(tokens)
        self.slots[item.slot] = Slot(tokens=tokens, num_prompt=item.num_prompt, sampling=item.sampling)

    def _map(self, segment: Segment) -> None:
        slot = self.slots[segment.slot]
        slot.pages.extend(segment.pages)
        end = segment.start + segment.count
        assert segment.start == slot.num_computed, f"start {segment.start}, computed {slot.num_computed}"
        assert segment.count >= 1
        assert end <= len(slot.tokens), "computes tokens that are not known"
        assert len(slot.pages) == -(-end // PAGE_TOKENS), f"{len(slot.pages)} pages for {end} tokens"
        assert end % PAGE_TOKENS == 0 or end == len(slot.tokens), (
            "chunk ends neither at a page nor at the end"
        )
        assert segment.sample == (end == len(slot.tokens)), "sample flag is wrong"

    def _check_pages(self) -> None:
        owned = [page for slot in self.slots.values() for page in slot.pages]
        assert len(owned) == len(set(owned)), "a page belongs to two sequences"
        assert all(0 <= page < self.num_pages for page in owned), "a page beyond the pool"

    def _compute(self, segment: Segment, sampled: list[Sampled], scores: list[PromptScores]) -> None:
        slot = self.slots[segment.slot]
        end = segment.start + segment.count
        self.num_tokens_computed += segment.count
        slot.num_computed = end
        wanted = slot.sampling.prompt_logprobs
        last_scored = min(end + 1, slot.num_prompt)
        if wanted is not None and segment.start + 1 < last_scored:
            positions = range(segment.start + 1, last_scored)
            scores.append(
                PromptScores(
                    slot=segment.slot,
                    first=segment.start + 1,
                    logprobs=tuple(logprob_of(slot.tokens[position], position) for position in positions),
                    alternatives=tuple(
                        tuple((rank, -float(rank)) for rank in range(wanted)) for _ in positions
                    ),
                )
            )
        if segment.sample:
            token = next_token(slot.tokens[-1], end, slot.sampling)
            slot.tokens.append(token)
            count = slot.sampling.logprobs
            sampled.append(
                Sampled(
                    slot=segment.slot,
                    token_id=token,
                    logprob=None if count is None else logprob_of(token, end),
                    alternatives=tuple((rank, -float(rank)) for rank in range(count or 0)),
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument(
        "--fail", choices=["at-load", "at-step", "exit-at-step", "hang-at-step", "ignore-shutdown"]
    )
    args = parser.parse_args()
    connection = join_host(args.fd)
    settings = read_frame(connection)
    assert isinstance(settings, RankSettings), settings
    if args.fail == "at-load":
        write_frame(connection, RankFailed(message=f"{settings.model}/config.json: no such file"))
        return
    rank = FakeRank(
        num_pages=settings.num_pages or 64,
        num_slots=settings.num_slots,
        prefill_tokens_max=settings.prefill_tokens_max,
    )
    write_frame(connection, RankProgress(stage="weights", done=1.0, total=2.0, unit="GB"))
    write_frame(connection, rank.ready())
    while (message := read_frame(connection)) is not None:
        if isinstance(message, Shutdown):
            if args.fail == "ignore-shutdown":
                time.sleep(60)
            return
        assert isinstance(message, StepPlan), message
        if message.segments and args.fail == "at-step":
            write_frame(connection, RankFailed(message="out of memory"))
            return
        if message.segments and args.fail == "exit-at-step":
            raise SystemExit(3)
        if args.fail == "hang-at-step":
            time.sleep(60)
        time.sleep(args.step_ms / 1000)
        try:
            result = rank.step(message)
        except AssertionError as error:
            write_frame(
                connection, RankFailed(message=f"contract: {error} {msgspec.json.encode(message)[:300]!r}")
            )
            return
        write_frame(connection, result)


if __name__ == "__main__":
    # Like the real one: a host that is gone while it is written to is not worth a traceback.
    with contextlib.suppress(ConnectionError):
        main()
