"""How many tokens to draft for each sequence of a step: fixed, or as much as pays.

`engine.worker.drafts.speculation` asks a `DraftPolicy` before each step with decodes and tells it what became of the
drafts and what the step took. Pure: no clock, no randomness. What is chosen decides how fast tokens come, not which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.worker.drafts.costs import BatchCosts, StepCosts
from engine.worker.events import SequenceKey

DraftsOption = int | Literal["auto"]
"""What `--drafts` says: a fixed number, 0 for none, or "auto"."""

FIRST_STEPS = 9
"""So many timed steps of a size of batch try everything before anything is chosen."""
TRIES_MAX = 36
"""So many steps of it try everything at most. Where every step computes prompts too, none is ever timed: then the guess
of what drafts cost, and the rates that were seen, have to do."""
PROBE_SHARE = 0.01
"""Of all time: what may be lost by trying something else than what is best."""
PROBE_EVERY = 12
"""Steps between two such tries, at least."""
HYSTERESIS = 0.03
GAIN_MIN = 0.05
"""What drafting must promise over not drafting, in speed, before it is begun; what it promises on average, steps give
unevenly, and what costs the host and the router more work for nothing is not worth it."""
GAIN_KEPT = 0.02
"""What it must promise to go on."""
RATE_KEPT = 0.97
"""What a draft counts when the next step is chosen: about 33 steps are remembered."""
RATE_PULL = 3.0
"""Drafts of its own that a sequence needs to count as much as all others together."""
RATE_TRIALS = 1.5
"""The rate of all sequences is remembered as if it was at least so many drafts, however long ago they were."""
RATE_GUESS = 0.6
RATE_MAX = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRoom:
    """A sequence that is about to decode, and the drafts it has a use for."""

    key: SequenceKey
    drafts_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the drafts of one sequence in one step."""

    key: SequenceKey
    num_drafts: int
    num_accepted: int


class DraftPolicy(Protocol):
    def choose(self, rooms: Sequence[DraftRoom], *, rows_max: int) -> list[int]:
        """Drafts for each of the sequences that decode in the next step, together at most `rows_max`. Up to two
        steps are under way whose outcome is not known yet."""
        ...

    def learn(self, outcomes: Sequence[Outcome], *, num_sequences: int, step_ms: float | None) -> None:
        """A step is done that decoded so many sequences; `outcomes` of those with drafts. `step_ms` is what it took,
        None when it did other things too."""
        ...

    def forget(self, key: SequenceKey) -> None:
        """The sequence has ended; outcomes of it may still come."""
        ...


def make_policy(option: DraftsOption, *, drafts_max: int) -> DraftPolicy:
    """`drafts_max`: of the rank."""
    return AdaptiveDrafts(drafts_max) if option == "auto" and drafts_max else FixedDrafts(drafts_max)


class FixedDrafts:
    """The same number for every sequence; fewer where all of them together would be too many rows."""

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def choose(self, rooms: Sequence[DraftRoom], *, rows_max: int) -> list[int]:
        num_drafts = min(self._num_drafts, rows_max // max(1, len(rooms)))
        return [min(num_drafts, room.drafts_max) for room in rooms]

    def learn(self, outcomes: Sequence[Outcome], *, num_sequences: int, step_ms: float | None) -> None:
        pass

    def forget(self, key: SequenceKey) -> None:
        pass


class AdaptiveDrafts:
    """As many drafts for each sequence as give the most tokens per time.

    A draft is accepted if all before it were: with a rate a of acceptance, draft number d gives a^d tokens. What it
    costs is learned (`engine.worker.drafts.costs`), and so are the rates: of all sequences, and of each one, which a
    new sequence takes over from all. The drafts of a step are chosen all at once, so that the cost of a round is
    shared by those who pay for it together.

    What is not tried is not known. So the first steps try everything, in vain where none is timed, and later a step now
    and then does something else than what is best, as seldom as that may cost: `PROBE_SHARE` of the time.
    """

    def __init__(self, drafts_max: int) -> None:
        self._drafts_max = drafts_max
        self._costs = BatchCosts(rounds_max=drafts_max)
        self._all = _Acceptance(num_trials=RATE_TRIALS, num_accepted=RATE_TRIALS * RATE_GUESS)
        self._own: dict[SequenceKey, _Track] = {}
        self._step = 0
        self._allowance_ms = 0.0
        self._num_probes = 0
        self._last_probe = 0

    def choose(self, rooms: Sequence[DraftRoom], *, rows_max: int) -> list[int]:
        self._step += 1
        tracks = [self._own.setdefault(room.key, _Track()) for room in rooms]
        limits = [min(room.drafts_max, self._drafts_max) for room in rooms]
        costs = self._costs.of(len(rooms))
        costs.num_asked += 1
        if costs.num_learned < FIRST_STEPS and costs.num_asked <= TRIES_MAX:
            counts = self._try(limits, rows_max)
        else:
            counts = self._choose_best(tracks, limits, rows_max)
        for track, count in zip(tracks, counts, strict=True):
            track.num_drafts = count
            track.num_plain = 0 if count else track.num_plain + 1
        return counts

    def learn(self, outcomes: Sequence[Outcome], *, num_sequences: int, step_ms: float | None) -> None:
        for outcome in outcomes:
            self._all.learn(outcome, step=self._step)
            if (track := self._own.get(outcome.key)) is not None:
                track.acceptance.learn(outcome, step=self._step)
        self._all.keep_trials(RATE_TRIALS)
        if step_ms is not None and num_sequences:
            counts = [outcome.num_drafts for outcome in outcomes]
            self._costs.of(num_sequences).learn(
                num_sequences=num_sequences,
                rounds=max(counts, default=0),
                num_drafts=sum(counts),
                step_ms=step_ms,
            )

    def forget(self, key: SequenceKey) -> None:
        self._own.pop(key, None)

    @property
    def num_tracked(self) -> int:
        """Sequences it remembers."""
        return len(self._own)

    def _try(self, limits: list[int], rows_max: int) -> list[int]:
        """Nothing, one draft each, and many for few: enough to tell apart what rounds and drafts cost."""
        match self._step % 3:
            case 0:
                return [0] * len(limits)
            case 1:
                level = min(1, rows_max // len(limits))
                return [min(limit, level) for limit in limits]
            case _:
                num_few = max(1, min(len(limits) // 4, rows_max // self._drafts_max))
                return [min(limit, rows_max) for limit in limits[:num_few]] + [0] * (len(limits) - num_few)

    def _choose_best(self, tracks: list[_Track], limits: list[int], rows_max: int) -> list[int]:
        overall = self._all.rate(pull=0.0, towards=0.0)
        rates = [track.acceptance.rate_at(self._step, pull=RATE_PULL, towards=overall) for track in tracks]
        before = [track.num_drafts for track in tracks]
        best = best_counts(rates, limits, before, self._costs.of(len(tracks)), rows_max=rows_max)
        tokens, ms = self._expected(best, rates)
        self._allowance_ms += PROBE_SHARE * ms
        if self._step - self._last_probe < PROBE_EVERY:
            return best
        probe = self._probe(tracks, best, limits, rows_max)
        tokens_probed, ms_probed = self._expected(probe, rates)
        # What the same tokens would have taken otherwise.
        loss_ms = max(0.0, ms_probed - tokens_probed * ms / tokens)
        if loss_ms > self._allowance_ms:
            # What cheap tries have left over is not saved up.
            self._allowance_ms = min(self._allowance_ms, max(ms, loss_ms))
            return best
        self._allowance_ms = min(self._allowance_ms - loss_ms, ms)
        self._last_probe = self._step
        self._num_probes += 1
        return probe

    def _probe(self, tracks: list[_Track], best: list[int], limits: list[int], rows_max: int) -> list[int]:
        """Something else than the best, by turns."""
        turn = self._num_probes
        if not any(best):
            if turn % 2:
                # A newcomer rather than others: drafts know little of the tokens between that were not drafted.
                one = min(range(len(best)), key=lambda index: tracks[index].num_plain)
                return [min(limit, 1) if index == one else 0 for index, limit in enumerate(limits)]
            level = min(1, rows_max // len(best))
            return [min(limit, level) for limit in limits]
        match turn % 3:
            case 0:
                return [0] * len(best)
            case 1:
                return [max(0, count - 1) for count in best]
            case _:
                more = [min(count + 1, limit) for count, limit in zip(best, limits, strict=True)]
                return more if sum(more) <= rows_max else [0] * len(best)

    def _expected(self, counts: list[int], rates: list[float]) -> tuple[float, float]:
        """Tokens, and milliseconds."""
        tokens = sum(
            (1 - rate ** (count + 1)) / (1 - rate) for rate, count in zip(rates, counts, strict=True)
        )
        return tokens, self._costs.of(len(counts)).step_ms(len(counts), max(counts), sum(counts))


def best_counts(
    rates: Sequence[float],
    limits: Sequence[int],
    before: Sequence[int],
    costs: StepCosts,
    *,
    rows_max: int,
) -> list[int]:
    """Drafts for each sequence, most tokens per time. With so many rounds paid for, one draft costs what any other
    does, so those that give most come first; and a draft is less likely to be accepted than the one before it. What
    was drafted `before` counts a little more, so that near a tie the choice stays what it is; and drafting at all must
    promise more than a little."""
    gains: list[tuple[float, int, int]] = []
    for index, (rate, limit, kept) in enumerate(zip(rates, limits, before, strict=True)):
        gain = 1.0
        for depth in range(1, limit + 1):
            gain *= rate
            gains.append((gain * (1 + HYSTERESIS) if depth <= kept else gain, depth, index))
    gains.sort(key=lambda item: (-item[0], item[1]))
    num_sequences = len(rates)
    gain_least = GAIN_KEPT if any(before) else GAIN_MIN
    best_speed = (1 + gain_least) * num_sequences / costs.base_ms(num_sequences, 0)
    best_rounds = best_drafts = 0
    for rounds in range(1, max(limits, default=0) + 1):
        tokens, ms, draft_ms = (
            float(num_sequences),
            costs.base_ms(num_sequences, rounds),
            costs.draft_ms(rounds),
        )
        num_drafts = 0
        for gain, depth, _ in gains:
            if depth > rounds:
                continue
            # Gains fall: once a draft lowers the speed, so does every later one.
            if num_drafts == rows_max or gain * ms <= tokens * draft_ms:
                break
            tokens, ms, num_drafts = tokens + gain, ms + draft_ms, num_drafts + 1
        if tokens / ms > best_speed:
            best_speed, best_rounds, best_drafts = tokens / ms, rounds, num_drafts
    counts = [0] * num_sequences
    for _, depth, index in gains:
        if best_drafts and depth <= best_rounds:
            counts[index] += 1
            best_drafts -= 1
    return counts


@dataclass(slots=True, kw_only=True)
class _Acceptance:
    """Drafts tried and accepted, those of long ago counting less. One after a rejected one was not tried."""

    num_trials: float = 0.0
    num_accepted: float = 0.0
    step: int = 0  # up to which they are counted down

    def learn(self, outcome: Outcome, *, step: int) -> None:
        self._count_down(step)
        self.num_accepted += outcome.num_accepted
        self.num_trials += outcome.num_accepted + (outcome.num_accepted < outcome.num_drafts)

    def keep_trials(self, least: float) -> None:
        """However long ago: the rate stays what it is."""
        if 0 < self.num_trials < least:
            self.num_accepted *= least / self.num_trials
            self.num_trials = least

    def rate_at(self, step: int, *, pull: float, towards: float) -> float:
        self._count_down(step)
        return self.rate(pull=pull, towards=towards)

    def rate(self, *, pull: float, towards: float) -> float:
        """As if `pull` more had been tried, of which a share of `towards` was accepted."""
        return min(RATE_MAX, (self.num_accepted + pull * towards) / (self.num_trials + pull))

    def _count_down(self, step: int) -> None:
        # Never to nothing: the rate of all sequences must survive any pause.
        kept = max(RATE_KEPT ** (step - self.step), 1e-9)
        self.num_trials *= kept
        self.num_accepted *= kept
        self.step = step


@dataclass(slots=True, kw_only=True)
class _Track:
    acceptance: _Acceptance = field(default_factory=_Acceptance)
    num_drafts: int = 0  # chosen last
    num_plain: int = 0  # steps without any since
