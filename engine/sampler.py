"""The sampler: from a row of logits to a token, as a pure function of the row and of the sequence's own
history.

Owns, for each open slot, the sampling parameters and, only where a penalty asks for them, the counts of
tokens seen. The rank (`engine.rank`) calls `open` and `close` as a step plan says and `verify` once after
each forward; the drafter (`engine.drafter`) calls `draft`, which chooses by the same function and counts
nothing. It may never keep anything that cannot be rebuilt from the slot's tokens, never read a random
generator, and never let a row's answer depend on the other rows of the batch.

What happens to a row of raw logits, in this order:

1. logit_bias is added;
2. repetition penalty, for tokens of prompt or output: positive logits are divided by it, others multiplied;
3. frequency penalty times the token's count in the output, and presence penalty if that is not 0, are
   subtracted;
4. temperature: at 0 the largest logit wins and nothing below happens; otherwise logits are divided by it;
5. min-p, then top-k, then top-p of what is left (`engine.kernels.truncate`);
6. the largest of logit + Gumbel noise of (seed, choice, position, token id) wins (`engine.kernels.gumbel`).

Ties go to the lowest token id everywhere. Logprobs are of the raw logits, before all of this.

A row behind drafts is sampled as if they were the sequence's newest output: `assumed` below.

Shapes: R rows of a call, V vocabulary, B rows of a block, K alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

# Imported for what it registers: argmax and gumbel_argmax.
import engine.kernels.gumbel  # noqa: F401  # pyright: ignore[reportUnusedImport]
from engine.kernels.registry import Implementation
from engine.kernels.truncate import VOCAB_SIZE_MAX
from engine.plan import PromptScores, Sampled, SlotOpen
from rorqual.sampling import SamplingParams
from rorqual.session import TokenArray

TEMPERATURE_MIN = 1e-5
"""Below it a row is greedy: dividing by less could take finite logits to infinity, and would decide nothing
more."""

REPETITION_PENALTY_MIN = 1e-6
"""A smaller repetition penalty acts as this one, so that dividing by it stays finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Where a slot's next token is asked for: at `position`, the tokens that the slot has counted, and `drafts` after
    it, which may turn out not to be the sequence's."""

    slot: int
    position: int
    drafts: tuple[int, ...] = ()


class Sampler:
    """One per rank. Memory: 4 bytes x vocabulary for each open slot with a frequency or presence penalty, and
    1 byte x vocabulary for each with a repetition penalty; next to nothing for any other."""

    def __init__(
        self, *, vocab_size: int, device: torch.device, kernels: Mapping[str, Implementation]
    ) -> None:
        """`kernels` is what `engine.kernels.registry.choose` gave for the device."""
        assert 0 < vocab_size <= VOCAB_SIZE_MAX, f"vocab_size {vocab_size} is not in 1..{VOCAB_SIZE_MAX}"
        self._vocab_size = vocab_size
        self._device = device
        self._argmax = kernels["argmax"].function
        self._gumbel_argmax = kernels["gumbel_argmax"].function
        self._truncate = kernels["truncate"].function
        self._slots: dict[int, _SlotState] = {}

    @property
    def num_open(self) -> int:
        return len(self._slots)

    def warm_up(self) -> None:
        """Compile and touch every kernel, so that the first request does not wait seconds for it."""
        rows_RV = torch.zeros(1, self._vocab_size, dtype=torch.float32, device=self._device)
        zero_R = self._integers([0])
        self._argmax(rows_RV)
        self._gumbel_argmax(rows_RV, zero_R, zero_R, zero_R)
        self._truncate(rows_RV, self._doubles([-math.inf]), self._integers([1]), self._doubles([0.5]))
        _logprobs(rows_RV, zero_R, 1)

    def open(self, slot_open: SlotOpen) -> None:
        """Give the slot to a sequence. For one that resumes after preemption, the state comes out equal to
        what it would be had the sequence never stopped: it is a function of the tokens."""
        assert slot_open.slot not in self._slots, f"slot {slot_open.slot} opened twice"
        tokens = np.frombuffer(slot_open.tokens, dtype="<i4")
        assert 0 <= slot_open.num_prompt <= len(tokens), f"slot {slot_open.slot}: {len(tokens)} tokens"
        self._slots[slot_open.slot] = self._new_state(slot_open.sampling, tokens, slot_open.num_prompt)

    def close(self, slot: int) -> None:
        assert slot in self._slots, f"slot {slot} closed but not open"
        del self._slots[slot]

    def sample(self, slots: Sequence[int], positions: Sequence[int], logits_RV: Tensor) -> list[Sampled]:
        """`verify` without drafts: one token for each row, row r of `slots[r]` at `positions[r]`."""
        wanted = [
            Continuation(slot=slot, position=position)
            for slot, position in zip(slots, positions, strict=True)
        ]
        return [sampled for (sampled,) in self.verify(wanted, logits_RV)]

    def verify(self, wanted: Sequence[Continuation], logits_RV: Tensor) -> list[tuple[Sampled, ...]]:
        """Sample behind each slot's newest token and behind each of its drafts; accept what is sampled up to and with
        the first token that is not the draft at its place, and count that as the slot's newest output.

        The rows of a continuation, one more than it has drafts, follow those of the one before; each slot comes at
        most once. Returns the accepted tokens of each, at least one, those of `position` .. in order. `logits_RV` is
        float32 and only read. A row with NaN or infinity breaks an invariant of the model and ends the process.
        """
        assert len({item.slot for item in wanted}) == len(wanted), "a slot was sampled twice in one call"
        rows = [
            self._row(item.slot, item.position + index, item.drafts[:index])
            for item in wanted
            for index in range(len(item.drafts) + 1)
        ]
        token_ids = self._choose(rows, logits_RV)
        accepted: list[int] = []  # rows
        counts: list[int] = []
        first = 0
        for item in wanted:
            chosen = token_ids[first : first + len(item.drafts) + 1]
            count = 1 + _num_equal(chosen, item.drafts)
            for token_id in chosen[:count]:
                self._slots[item.slot].count_output(token_id)
            accepted += range(first, first + count)
            counts.append(count)
            first += len(chosen)
        reports = iter(
            self._report(
                [rows[row] for row in accepted],
                [token_ids[row] for row in accepted],
                self._rows(logits_RV, accepted),
            )
        )
        return [tuple(islice(reports, count)) for count in counts]

    def draft(self, wanted: Sequence[Continuation], logits_RV: Tensor) -> list[int]:
        """The token that `verify` would sample after all drafts of each continuation, were row r the model's logits
        there. Counts nothing. A slot may come more than once."""
        rows = [self._row(item.slot, item.position + len(item.drafts), item.drafts) for item in wanted]
        return self._choose(rows, logits_RV)

    def prompt_scores(
        self,
        slot: int,
        *,
        first_position: int,
        logits_RV: Tensor,
        token_ids: Sequence[int] | TokenArray,
        num_alternatives: int,
    ) -> PromptScores:
        """Score the prompt tokens at `first_position`, `first_position` + 1, ...

        Row r holds the logits computed at position `first_position` + r - 1, which predict `token_ids[r]`.
        """
        assert first_position >= 1, "the first token of a prompt has no logits that predict it"
        assert logits_RV.shape == (len(token_ids), self._vocab_size), (
            f"logits of shape {tuple(logits_RV.shape)}"
        )
        token_ids_R = torch.from_numpy(np.array(token_ids, dtype=np.int64)).to(self._device)
        logprobs, alternatives = _logprobs(logits_RV, token_ids_R, num_alternatives)
        return PromptScores(
            slot=slot, first=first_position, logprobs=tuple(logprobs), alternatives=tuple(alternatives)
        )

    def _row(self, slot: int, position: int, assumed: tuple[int, ...]) -> _Row:
        return _Row(slot=slot, state=self._slots[slot], position=position, assumed=assumed)

    def _choose(self, rows: list[_Row], logits_RV: Tensor) -> list[int]:
        assert logits_RV.shape == (len(rows), self._vocab_size), f"logits of shape {tuple(logits_RV.shape)}"
        assert logits_RV.dtype == torch.float32, f"logits are {logits_RV.dtype}"
        if not rows:
            return []
        scores_RV = self._edited(rows, logits_RV)
        chosen = [-1] * len(rows)
        greedy = [index for index, row in enumerate(rows) if row.state.is_greedy]
        if greedy:
            greedy_ids: list[int] = self._argmax(self._rows(scores_RV, greedy)).tolist()
            for index, token_id in zip(greedy, greedy_ids, strict=True):
                chosen[index] = token_id
        drawn = [index for index, row in enumerate(rows) if not row.state.is_greedy]
        if drawn:
            drawn_ids = self._draw([rows[index] for index in drawn], self._rows(scores_RV, drawn))
            for index, token_id in zip(drawn, drawn_ids, strict=True):
                chosen[index] = token_id
        for row, token_id in zip(rows, chosen, strict=True):
            assert token_id >= 0, f"slot {row.slot}, position {row.position}: logits hold NaN or infinity"
        return chosen

    def _draw(self, rows: list[_Row], scores_RV: Tensor) -> list[int]:
        """Steps 4 to 6 for rows that all have a temperature."""
        states = [row.state for row in rows]
        if any(state.params.temperature != 1.0 for state in states):
            scores_RV = scores_RV / self._column([state.params.temperature for state in states])
        truncated = [row for row, state in enumerate(states) if state.is_truncated]
        if truncated:
            kept_RV = self._truncate(
                self._rows(scores_RV, truncated),
                self._doubles([states[row].log_min_p for row in truncated]),
                self._integers([states[row].top_k for row in truncated]),
                self._doubles([states[row].params.top_p for row in truncated]),
            )
            scores_RV = self._with_rows(scores_RV, truncated, kept_RV)
        seeds_R = self._integers([state.params.seed for state in states])
        choices_R = self._integers([state.params.choice for state in states])
        positions_R = self._integers([row.position for row in rows])
        return self._gumbel_argmax(scores_RV, seeds_R, choices_R, positions_R).tolist()

    def _edited(self, rows: list[_Row], logits_RV: Tensor) -> Tensor:
        """Steps 1 to 3. The rows themselves, when none asks for any of it."""
        states = [row.state for row in rows]
        biased = [(index, state.bias) for index, state in enumerate(states) if state.bias is not None]
        if biased:
            logits_RV = self._with_bias(biased, logits_RV)
        repeated = [index for index, state in enumerate(states) if state.seen_V is not None]
        if repeated:
            penalty_R1 = self._column([states[index].repetition_penalty for index in repeated])
            seen_RV = torch.stack([_present(states[index].seen_V) for index in repeated])
            seen_RV[self._assumed([rows[index] for index in repeated])] = True
            rows_RV = self._rows(logits_RV, repeated)
            penalised_RV = torch.where(rows_RV > 0, rows_RV / penalty_R1, rows_RV * penalty_R1)
            logits_RV = self._with_rows(logits_RV, repeated, torch.where(seen_RV, penalised_RV, rows_RV))
        counted = [index for index, state in enumerate(states) if state.output_counts_V is not None]
        if counted:
            frequency_R1 = self._column([states[index].params.frequency_penalty for index in counted])
            presence_R1 = self._column([states[index].params.presence_penalty for index in counted])
            counts_RV = torch.stack([_present(states[index].output_counts_V) for index in counted])
            assumed = self._assumed([rows[index] for index in counted])
            counts_RV.index_put_(assumed, counts_RV.new_ones(()), accumulate=True)
            rows_RV = self._rows(logits_RV, counted)
            rows_RV = rows_RV - frequency_R1 * counts_RV - presence_R1 * (counts_RV > 0)
            logits_RV = self._with_rows(logits_RV, counted, rows_RV)
        return logits_RV

    def _assumed(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """Indices (row, token id) of every token assumed."""
        return (
            self._integers([index for index, row in enumerate(rows) for _ in row.assumed]),
            self._integers([token_id for row in rows for token_id in row.assumed]),
        )

    def _with_bias(self, biased: list[tuple[int, _Bias]], logits_RV: Tensor) -> Tensor:
        rows_N = self._integers([row for row, bias in biased for _ in range(len(bias.token_ids_N))])
        token_ids_N = torch.cat([bias.token_ids_N for _, bias in biased])
        values_N = torch.cat([bias.values_N for _, bias in biased])
        logits_RV = logits_RV.clone()
        # A slot's token ids are distinct, so no element is named twice: the order of additions cannot matter.
        logits_RV[rows_N, token_ids_N] += values_N
        return logits_RV

    def _report(self, rows: list[_Row], token_ids: list[int], logits_RV: Tensor) -> list[Sampled]:
        wanted = {
            index: row.state.params.logprobs
            for index, row in enumerate(rows)
            if row.state.params.logprobs is not None
        }
        scores: dict[int, tuple[float, _Pairs]] = {}
        if wanted:
            indices = list(wanted)
            logprobs, alternatives = _logprobs(
                self._rows(logits_RV, indices),
                self._integers([token_ids[index] for index in indices]),
                max(wanted.values()),
            )
            for index, logprob, pairs in zip(indices, logprobs, alternatives, strict=True):
                scores[index] = (logprob, pairs[: wanted[index]])
        reports: list[Sampled] = []
        for index, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
            logprob, pairs = scores.get(index, (None, ()))
            reports.append(Sampled(row.slot, token_id, logprob, pairs))
        return reports

    def _new_state(self, params: SamplingParams, tokens: TokenArray, num_prompt: int) -> _SlotState:
        top_k = min(params.top_k, self._vocab_size) or self._vocab_size
        penalises_output = params.frequency_penalty != 0 or params.presence_penalty != 0
        return _SlotState(
            params=params,
            is_greedy=params.temperature < TEMPERATURE_MIN,
            is_truncated=params.min_p > 0 or top_k < self._vocab_size or params.top_p < 1,
            log_min_p=math.log(params.min_p) if params.min_p > 0 else -math.inf,
            top_k=top_k,
            repetition_penalty=max(params.repetition_penalty, REPETITION_PENALTY_MIN),
            bias=self._new_bias(params.logit_bias),
            seen_V=self._count(tokens) > 0 if params.repetition_penalty != 1 else None,
            output_counts_V=self._count(tokens[num_prompt:]) if penalises_output else None,
        )

    def _new_bias(self, logit_bias: Sequence[tuple[int, float]]) -> _Bias | None:
        values: dict[int, float] = {}
        for token_id, value in logit_bias:
            values[token_id] = values.get(token_id, 0.0) + value
        if not values:
            return None
        return _Bias(
            token_ids_N=self._integers(list(values)),
            values_N=torch.tensor(list(values.values()), dtype=torch.float32, device=self._device),
        )

    def _count(self, tokens: TokenArray) -> Tensor:
        counts_V = np.bincount(tokens, minlength=self._vocab_size)
        assert len(counts_V) == self._vocab_size, f"token {tokens.max()} is outside the vocabulary"
        return torch.from_numpy(counts_V).to(device=self._device, dtype=torch.int32)

    def _integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _doubles(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]

    def _rows(self, matrix: Tensor, rows: list[int]) -> Tensor:
        """Those rows; the matrix itself, uncopied, when they are all of them."""
        return matrix if len(rows) == len(matrix) else matrix[self._integers(rows)]

    def _with_rows(self, matrix: Tensor, rows: list[int], replacement: Tensor) -> Tensor:
        """A copy of the matrix in which those rows are replaced."""
        if len(rows) == len(matrix):
            return replacement
        return matrix.index_copy(0, self._integers(rows), replacement)


_Pairs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bias:
    token_ids_N: Tensor
    values_N: Tensor


@dataclass(slots=True, kw_only=True)
class _SlotState:
    """What an open slot needs besides logits. Only `seen_V` and `output_counts_V` ever change."""

    params: SamplingParams
    is_greedy: bool
    is_truncated: bool
    log_min_p: float
    top_k: int  # the vocabulary's size when all are kept
    repetition_penalty: float
    bias: _Bias | None
    seen_V: Tensor | None  # bool: in prompt or output; None without a repetition penalty
    output_counts_V: Tensor | None  # int32; None without a frequency or presence penalty

    def count_output(self, token_id: int) -> None:
        if self.seen_V is not None:
            self.seen_V[token_id] = True
        if self.output_counts_V is not None:
            self.output_counts_V[token_id] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What a row of logits is to be sampled with."""

    slot: int
    state: _SlotState
    position: int  # of the token to choose
    assumed: tuple[int, ...]  # output after what the state has counted


def _num_equal(token_ids: Sequence[int], drafts: Sequence[int]) -> int:
    """How many drafts, from the first on, are the tokens at their places."""
    for index, draft in enumerate(drafts):
        if token_ids[index] != draft:
            return index
    return len(drafts)


def _present(counts_V: Tensor | None) -> Tensor:
    assert counts_V is not None
    return counts_V


_BLOCK_ELEMENTS = 2**21
"""Of a block of rows being scored: about 16 MB of log-probabilities, and twice that of keys, whatever the
chunk."""


def _logprobs(
    logits_RV: Tensor, token_ids_R: Tensor, num_alternatives: int
) -> tuple[list[float], list[_Pairs]]:
    """The logprob of each row's token and the row's best alternatives, best first, ties to the lowest id."""
    logprobs: list[float] = []
    alternatives: list[_Pairs] = []
    rows_per_block = max(1, _BLOCK_ELEMENTS // logits_RV.shape[1])
    for first in range(0, len(logits_RV), rows_per_block):
        block_BV = logits_RV[first : first + rows_per_block]
        # Not logsumexp: the shape of the whole tensor splits its sum, while log_softmax reduces row by row.
        logprobs_BV = torch.log_softmax(block_BV, dim=-1)
        chosen_B1 = token_ids_R[first : first + rows_per_block, None]
        logprobs += logprobs_BV.gather(1, chosen_B1)[:, 0].tolist()
        if num_alternatives == 0:
            alternatives += [()] * len(block_BV)
            continue
        ids_BK = _best_token_ids(block_BV, num_alternatives)
        values_BK = logprobs_BV.gather(1, ids_BK)
        for ids, values in zip(ids_BK.tolist(), values_BK.tolist(), strict=True):
            alternatives.append(tuple(zip(ids, values, strict=True)))
    return logprobs, alternatives


def _best_token_ids(logits_RV: Tensor, num: int) -> Tensor:
    """The `num` best tokens of every row, best first. topk breaks ties as it likes, so the keys have none:
    the logit's bits, made to order as the float does, above the complement of the token id."""
    vocab_size = logits_RV.shape[1]
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    order_RV = (bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)).to(torch.int64)
    token_ids_V = torch.arange(vocab_size, device=logits_RV.device)
    keys_RV = order_RV * VOCAB_SIZE_MAX + (VOCAB_SIZE_MAX - 1 - token_ids_V)
    best_RK = keys_RV.topk(min(num, vocab_size), dim=-1).values
    return VOCAB_SIZE_MAX - 1 - best_RK % VOCAB_SIZE_MAX
