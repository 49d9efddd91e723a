"""How long the router takes to decide who computes a prompt, in a fleet that computes others: for `bench.picture`.

A decision is what `router.dispatch` does with a prompt's page keys until it knows its workers: who may take it, the
look-up in the picture of caches, and the choice. Half of the workers compute prompts, half decode. Between two
decisions workers report other loads, prompts are computed and sequences end, none of which is timed.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from dataclasses import replace

import numpy as np

from kvstore.keys import PageKey
from rorqual.feed import KEY_BYTES
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import FLASH, model_costs
from rorqual.session import Credit, Load, Role, credit_pages
from router.credit import CreditLedger, Ticket
from router.picture import Picture
from router.placement import Demand, FleetTable, Predicted, Split
from router.placement.policies import WorkerModel, make_placement

UNDERWAY_PER_WORKER = 2
"""Prompts on a prefill worker that are not computed yet: what is promised and not there."""

REPORTS_PER_DECISION = 50
"""Every worker reports twenty times a second: with a thousand of them, so many come between two of 400 prompts."""

LIMIT = Credit(sequences=64, pages=64 * credit_pages(100_000))


def measure(
    picture: Picture, prompt: list[bytes], *, rng: np.random.Generator, count: int
) -> tuple[list[float], list[float]]:
    """Seconds of each decision: of the thread's own time, and by the clock. Prompts begin like `prompt` up to a random
    page, and are as long; of each the rest is its own."""
    fleet = _Fleet(picture, rng)
    own: list[float] = []
    clock: list[float] = []
    gc.collect()
    gc.freeze()  # as the router does when it has become ready
    try:
        for _ in range(count + fleet.num_underway_max):
            fleet.go_on()
            cut = int(rng.integers(0, len(prompt) + 1))
            keys = (*prompt[:cut], *(rng.bytes(KEY_BYTES) for _ in range(len(prompt) - cut)))
            own_seconds, clock_seconds = fleet.place(tuple(PageKey(key) for key in keys))
            own.append(own_seconds)
            clock.append(clock_seconds)
    finally:
        gc.unfreeze()
    # The first ones found fewer prompts under way.
    return own[-count:], clock[-count:]


class _Fleet:
    """Workers as a router sees them, without sessions."""

    def __init__(self, picture: Picture, rng: np.random.Generator) -> None:
        num_workers = picture.num_workers
        assert num_workers > 1, "one computes prompts, another decodes"
        self.num_underway_max = UNDERWAY_PER_WORKER * (num_workers + 1) // 2
        self._rng = rng
        self._table = FleetTable(rows_max=picture.workers_max, sequences_outstanding_max=1024)
        self._ledger = CreditLedger(waiting_max=1024, on_use=self._table.set_credit)
        model = WorkerModel(costs=model_costs(FLASH), hardware="h200", num_devices=8)
        self._placement = make_placement("rorqual", caches=picture, workers=model)
        self._underway: deque[tuple[int, int, Predicted]] = deque()
        self._decoding: deque[Ticket] = deque()
        self._tokens = [0] * num_workers
        self._num_sequences = [0] * num_workers
        self._load = Load(
            sequences_running=1,
            sequences_waiting=0,
            tokens_waiting=0,
            pages_free=100,
            pages_total=10_000,
            slots_free=1,
            slots_total=8,
            step_ms=50.0,
        )
        for row in range(num_workers):
            self._connect(row)

    def place(self, keys: tuple[PageKey, ...]) -> tuple[float, float]:
        """Decide, and count what was decided as under way. Seconds of deciding, own and by the clock."""
        prompt_tokens = PAGE_TOKENS * len(keys) + PAGE_TOKENS // 2
        clock, own = time.perf_counter_ns(), time.thread_time_ns()
        workers = self._table.columns
        able_W = workers.able_W(excluded=frozenset())
        demand = Demand(
            prompt_tokens=prompt_tokens,
            tokens_max=500,
            is_queueing=self._ledger.num_waiting > 0,
            keys={"wire": keys},
        )
        placed = self._placement.choose(workers, able_W, demand)
        own, clock = time.thread_time_ns() - own, time.perf_counter_ns() - clock
        assert isinstance(placed, Split), "who computes prompts here does not decode"
        assert placed.decode is not None, "there is credit for all that is under way"
        assert placed.predicted is not None, "our policy predicts"
        ticket = self._ledger.ask(
            credit_pages(prompt_tokens), on_grant=_never, preferred=placed.decode.address
        )
        assert ticket.address == placed.decode.address, "credit is given where it was found"
        self._decoding.append(ticket)
        num_left = prompt_tokens - placed.predicted.tokens_reused
        self._underway.append((placed.prefill.index, num_left, placed.predicted))
        self._count(placed.prefill.index, +1, num_left)
        return own / 1e9, clock / 1e9

    def go_on(self) -> None:
        """What happens between two prompts of a busy router."""
        if len(self._underway) >= self.num_underway_max:
            row, num_tokens, predicted = self._underway.popleft()
            self._placement.finished(predicted)
            self._count(row, -1, num_tokens)
        if len(self._decoding) >= 8 * self.num_underway_max:
            self._ledger.release(self._decoding.popleft())
        num_workers = len(self._tokens)
        for row in self._rng.integers(0, num_workers, REPORTS_PER_DECISION).tolist():
            self._report(row)

    def _connect(self, row: int) -> None:
        role = Role.DECODE if row % 2 else Role.PREFILL
        address = f"10.0.{row // 256}.{row % 256}:9000"
        self._table.join(row, address)
        self._table.connect(
            row, session_number=row + 1, role=role, sequences_max=8, can_share=True, load=self._load
        )
        self._report(row)
        if role is Role.DECODE:
            self._ledger.set_limit(address, LIMIT, session_number=row + 1, is_draining=False)

    def _report(self, row: int) -> None:
        rate = 40_000.0 + float(self._rng.integers(0, 4000))
        waiting = self._tokens[row] + int(self._rng.integers(0, 2)) * 8192
        self._table.set_load(row, replace(self._load, tokens_waiting=waiting, prefill_tokens_per_second=rate))

    def _count(self, row: int, sign: int, num_tokens: int) -> None:
        self._tokens[row] += sign * num_tokens
        self._num_sequences[row] += sign
        self._table.set_outstanding(
            row,
            sequences=self._num_sequences[row],
            tokens=self._tokens[row],
            prompt_tokens=self._tokens[row],
            prompt_tokens_sent=self._tokens[row],
        )


def _never() -> None:
    raise AssertionError("credit that was there had to be waited for")
