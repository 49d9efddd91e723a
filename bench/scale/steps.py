"""What happens between two looks at a simulated fleet: arrivals, prefill steps, decode streams. Compiled by numba.

Called by `bench.scale.world`, which adds and takes workers; here nothing joins or leaves the fleet. Events: a request
arrives, a prefill step ends, a stream ends. A decode worker's streams all get a token a step, so one clock a worker,
counted in tokens, stands for all of them: its speed changes only as a stream joins or leaves, and the next end is the
top of a heap. Arrays: N requests, W workers of a pool, S streams of a worker.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Number = Any
"""Of an array: what is compiled takes one as a plain number."""

NOT_THERE, READY, DRAINING = 0, 1, 2
NOBODY = -1

ARRIVED, ROUTER_HEAD, RETRY_HEAD, RETRY_TAIL, NUM_FIRST, NUM_ENDED, NUM_LOST, CHUNK, P_HIGH, D_HIGH = range(
    10
)
"""Places in `State.counts`."""

CONTEXT_STEP = 4096.0
"""Tokens between two columns of the table of decode steps."""


class State(NamedTuple):
    """All arrays of one run. Seconds are of virtual time; `true_*` hold the hidden speeds."""

    arrive_N: Floats
    prompt_N: Floats  # tokens of the prompt, and of what had been generated before a retry
    left_N: Floats  # tokens still to be computed
    rate_N: Floats  # seconds of arithmetic of one of them
    out_N: Floats  # tokens still to be generated
    pages_N: Ints  # charged
    first_N: Floats  # when the first token came; nan before
    end_N: Floats  # when the last came; nan before
    decode_N: Ints  # the decode worker that is charged
    next_N: Ints  # behind it in the queue of its prefill worker
    retry_N: Ints  # a ring of requests to be started again
    firsts_N: Ints  # requests in the order of their first tokens
    ends_N: Ints  # and of their ends
    counts: Ints
    # prefill workers
    p_state_W: Ints
    p_head_W: Ints
    p_tail_W: Ints
    p_queued_W: Ints
    p_seconds_W: Floats  # of arithmetic queued
    p_step_end_W: Floats
    p_step_done_W: Ints  # prompts that end with the step
    p_step_part_W: Floats  # tokens of the next one
    p_busy_W: Floats  # since the last look
    p_tokens_W: Floats
    p_steps_W: Ints
    p_empty_W: Floats  # since when a draining worker has had nothing to do; nan: it has
    # decode workers
    d_state_W: Ints
    d_charged_W: Ints
    d_pages_W: Ints
    d_running_W: Ints
    d_clock_W: Floats
    d_at_W: Floats  # when the clock was read
    d_step_W: Floats  # seconds
    d_context_W: Floats  # sum over streams
    d_next_W: Floats  # when the next stream ends
    d_busy_W: Floats
    d_tokens_W: Floats
    d_empty_W: Floats
    heap_WS: Floats
    heap_ids_WS: Ints
    # speeds
    decode_step_SC: Floats
    settings: (
        Floats  # slots, pages, patience, weights' seconds (base, experts), missed, step, true prefill factor
    )


@numba.njit(cache=True, nogil=True)
def _step_seconds(s: State, worker: Number) -> Number:
    n = s.d_running_W[worker]
    if n == 0:
        return s.decode_step_SC[0, 0]
    n = min(n, s.decode_step_SC.shape[0] - 1)
    place = s.d_context_W[worker] / s.d_running_W[worker] / CONTEXT_STEP
    last = s.decode_step_SC.shape[1] - 1
    column = min(int(place), last - 1)
    part = min(place - column, 1.0)
    return s.decode_step_SC[n, column] * (1 - part) + s.decode_step_SC[n, column + 1] * part


@numba.njit(cache=True, nogil=True)
def read_clock(s: State, worker: Number, now: Number) -> None:
    """Bring a decode worker's clock to `now`."""
    n = s.d_running_W[worker]
    if n > 0:
        tokens = (now - s.d_at_W[worker]) / s.d_step_W[worker]
        s.d_clock_W[worker] += tokens
        s.d_context_W[worker] += tokens * n
        s.d_tokens_W[worker] += tokens * n
        s.d_busy_W[worker] += now - s.d_at_W[worker]
    s.d_at_W[worker] = now


@numba.njit(cache=True, nogil=True)
def _set_speed(s: State, worker: Number) -> None:
    s.d_step_W[worker] = _step_seconds(s, worker)
    if s.d_running_W[worker] == 0:
        s.d_next_W[worker] = np.inf
        return
    ahead = max(s.heap_WS[worker, 0] - s.d_clock_W[worker], 0.0)
    s.d_next_W[worker] = s.d_at_W[worker] + ahead * s.d_step_W[worker]


@numba.njit(cache=True, nogil=True)
def join(s: State, worker: Number, request: Number, now: Number) -> None:
    """A computed prompt becomes a stream."""
    read_clock(s, worker, now)
    heap, ids = s.heap_WS[worker], s.heap_ids_WS[worker]
    place = s.d_running_W[worker]
    end = s.d_clock_W[worker] + s.out_N[request]
    while place > 0:
        parent = (place - 1) >> 1
        if heap[parent] <= end:
            break
        heap[place] = heap[parent]
        ids[place] = ids[parent]
        place = parent
    heap[place] = end
    ids[place] = request
    s.d_running_W[worker] += 1
    s.d_context_W[worker] += s.prompt_N[request]
    _set_speed(s, worker)


@numba.njit(cache=True, nogil=True)
def _pop(s: State, worker: Number) -> Number:
    heap, ids = s.heap_WS[worker], s.heap_ids_WS[worker]
    found = ids[0]
    s.d_running_W[worker] -= 1
    n = s.d_running_W[worker]
    end, request = heap[n], ids[n]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= end:
            break
        heap[place] = heap[child]
        ids[place] = ids[child]
        place = child
    heap[place] = end
    ids[place] = request
    return found


@numba.njit(cache=True, nogil=True)
def release(s: State, request: Number, now: Number) -> None:
    """The decode worker is charged for it no longer."""
    worker = s.decode_N[request]
    if worker == NOBODY:
        return
    s.decode_N[request] = NOBODY
    s.d_charged_W[worker] -= 1
    s.d_pages_W[worker] -= s.pages_N[request]
    if s.d_charged_W[worker] == 0:
        s.d_empty_W[worker] = now


@numba.njit(cache=True, nogil=True)
def _end_stream(s: State, worker: Number, now: Number) -> None:
    read_clock(s, worker, now)
    request = _pop(s, worker)
    s.d_context_W[worker] -= s.prompt_N[request] + s.out_N[request]
    if s.d_running_W[worker] == 0:
        s.d_context_W[worker] = 0.0
    _set_speed(s, worker)
    _finish(s, request, now)


@numba.njit(cache=True, nogil=True)
def _finish(s: State, request: Number, now: Number) -> None:
    s.end_N[request] = now
    s.ends_N[s.counts[NUM_ENDED]] = request
    s.counts[NUM_ENDED] += 1
    release(s, request, now)


@numba.njit(cache=True, nogil=True)
def start_again(s: State, request: Number) -> None:
    """Back to the router, ahead of whoever has not been started yet."""
    s.retry_N[s.counts[RETRY_TAIL] % len(s.retry_N)] = request
    s.counts[RETRY_TAIL] += 1


@numba.njit(cache=True, nogil=True)
def _begin_step(s: State, worker: Number, now: Number) -> None:
    """Whole prompts in the order they came, and a part of the next, up to the tokens of a chunk."""
    room = float(s.counts[CHUNK])
    arithmetic, tokens, done, part = 0.0, 0.0, 0, 0.0
    request = s.p_head_W[worker]
    while request != NOBODY and room > 0:
        left = s.left_N[request]
        take = min(room, left)
        arithmetic += take * s.rate_N[request]
        tokens += take
        room -= take
        if take < left:
            part = take
            break
        done += 1
        request = s.next_N[request]
    base, experts, missed = s.settings[3], s.settings[4], s.settings[5]
    weights = base + experts * (1 - missed**tokens)
    seconds = (max(arithmetic, weights) + s.settings[6]) * s.settings[7]
    s.p_step_end_W[worker] = now + seconds
    s.p_step_done_W[worker] = done
    s.p_step_part_W[worker] = part
    s.p_busy_W[worker] += seconds
    s.p_tokens_W[worker] += tokens
    s.p_steps_W[worker] += 1


@numba.njit(cache=True, nogil=True)
def _end_step(s: State, worker: Number, now: Number) -> None:
    for _ in range(s.p_step_done_W[worker]):
        request = s.p_head_W[worker]
        s.p_head_W[worker] = s.next_N[request]
        s.p_queued_W[worker] -= 1
        s.p_seconds_W[worker] -= s.left_N[request] * s.rate_N[request]
        s.left_N[request] = 0.0
        if np.isnan(s.first_N[request]):
            s.first_N[request] = now
            s.firsts_N[s.counts[NUM_FIRST]] = request
            s.counts[NUM_FIRST] += 1
        s.out_N[request] -= 1
        s.prompt_N[request] += 1
        decode = s.decode_N[request]
        if s.out_N[request] <= 0:
            _finish(s, request, now)
        elif decode == NOBODY:  # it died as the last of its pool: all over again
            s.left_N[request] = s.prompt_N[request]
            start_again(s, request)
        else:
            join(s, decode, request, now)
    if s.p_head_W[worker] == NOBODY:
        s.p_tail_W[worker] = NOBODY
        s.p_seconds_W[worker] = 0.0
        s.p_step_end_W[worker] = np.inf
        s.p_empty_W[worker] = now
        return
    part = s.p_step_part_W[worker]
    if part > 0:
        request = s.p_head_W[worker]
        s.left_N[request] -= part
        s.p_seconds_W[worker] -= part * s.rate_N[request]
    _begin_step(s, worker, now)


@numba.njit(cache=True, nogil=True)
def give_up(s: State, now: Number) -> None:
    """Requests that nobody started within the patience of their users are lost."""
    patience = s.settings[2]
    counts = s.counts
    while counts[ROUTER_HEAD] < counts[ARRIVED] and now - s.arrive_N[counts[ROUTER_HEAD]] > patience:
        counts[ROUTER_HEAD] += 1
        counts[NUM_LOST] += 1


@numba.njit(cache=True, nogil=True)
def dispatch(s: State, now: Number) -> None:
    """The router: starts requests while a decode worker has credit for the first of them; retries come first. On the
    prefill worker with the least work queued."""
    give_up(s, now)
    counts, size = s.counts, len(s.retry_N)
    slots, pages = s.settings[0], s.settings[1]
    while True:
        is_retry = counts[RETRY_HEAD] < counts[RETRY_TAIL]
        if is_retry:
            request = s.retry_N[counts[RETRY_HEAD] % size]
        elif counts[ROUTER_HEAD] < counts[ARRIVED]:
            request = counts[ROUTER_HEAD]
        else:
            return
        decode, least = NOBODY, np.inf
        for worker in range(counts[D_HIGH]):
            if s.d_state_W[worker] != READY or s.d_charged_W[worker] >= slots:
                continue
            if s.d_charged_W[worker] > 0 and s.d_pages_W[worker] + s.pages_N[request] > pages:
                continue
            if s.d_charged_W[worker] < least:
                decode, least = worker, float(s.d_charged_W[worker])
        prefill, wait = NOBODY, np.inf
        for worker in range(counts[P_HIGH]):
            if s.p_state_W[worker] == READY and s.p_seconds_W[worker] < wait:
                prefill, wait = worker, s.p_seconds_W[worker]
        if decode == NOBODY or prefill == NOBODY:
            return
        counts[RETRY_HEAD if is_retry else ROUTER_HEAD] += 1
        s.decode_N[request] = decode
        s.d_charged_W[decode] += 1
        s.d_pages_W[decode] += s.pages_N[request]
        _enqueue(s, prefill, request, now)


@numba.njit(cache=True, nogil=True)
def _enqueue(s: State, worker: Number, request: Number, now: Number) -> None:
    s.next_N[request] = NOBODY
    if s.p_head_W[worker] == NOBODY:
        s.p_head_W[worker] = request
    else:
        s.next_N[s.p_tail_W[worker]] = request
    s.p_tail_W[worker] = request
    s.p_queued_W[worker] += 1
    s.p_seconds_W[worker] += s.left_N[request] * s.rate_N[request]
    if s.p_step_end_W[worker] == np.inf:
        _begin_step(s, worker, now)


@numba.njit(cache=True, nogil=True)
def advance(s: State, now: Number, until: Number) -> None:
    """All events up to `until`, in the order of their times."""
    num_requests = len(s.arrive_N)
    counts = s.counts
    dispatch(s, now)
    while True:
        arrived = counts[ARRIVED]
        at = s.arrive_N[arrived] if arrived < num_requests else np.inf
        prefill, decode = NOBODY, NOBODY
        for worker in range(counts[P_HIGH]):
            if s.p_step_end_W[worker] < at:
                at, prefill = s.p_step_end_W[worker], worker
        for worker in range(counts[D_HIGH]):
            if s.d_next_W[worker] < at:
                at, decode = s.d_next_W[worker], worker
        if at > until:
            break
        if decode != NOBODY:
            _end_stream(s, decode, at)
        elif prefill != NOBODY:
            _end_step(s, prefill, at)
        else:
            counts[ARRIVED] += 1
        if counts[RETRY_HEAD] < counts[RETRY_TAIL] or counts[ROUTER_HEAD] < counts[ARRIVED]:
            dispatch(s, at)
    for worker in range(counts[D_HIGH]):
        read_clock(s, worker, until)
    give_up(s, until)
