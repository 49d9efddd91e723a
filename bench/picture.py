"""The router's picture of all caches: memory, look-ups, changes and loading, at several sizes.

Every worker caches a random depth of one prompt of 390 pages (100k tokens), some pages of a pool that all share, and
pages of its own. Snapshots and deltas go through `kvstore.feed`, deltas from their bytes on, as a router gets them. A
decision is all of placement: the look-up, who may take the prompt, and the choice of the policy that is the default,
in a fleet of prefill and decode workers that is busy (`bench.decisions`); the look-up alone stands beside it. Times are
the thread's own on its core, so that other programs on the machine do not show; for decisions and the longest pauses
those of the clock too, in brackets. There is no rival to race: needs are stated beside the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench import decisions
from kvstore.feed import FeedReader
from kvstore.feed.digest import MASK, digest_of
from rorqual.feed import (
    ABSENT,
    HOST_PAGE,
    HOST_TAIL,
    KEY_BYTES,
    PAGE,
    PART_ENTRIES_MAX,
    TAIL,
    Delta,
    SnapshotPart,
)
from rorqual.ids import Incarnation
from rorqual.session import Load, StepReport
from rorqual.wire import decode_report, encode_report
from router.picture import Picture

SIZES = ((8, 8_000), (100, 10_000), (1000, 10_000))
"""(workers, pages each)"""

PROMPT_PAGES = 390
POOL_PAGES = 20_000
POOL_SHARE = 0.2  # of a worker's pages
TAIL_SHARE = 0.1
CHANGES_PER_DELTA = 5  # pages in and out in one engine step of one worker
CHANGES_PER_SECOND = 50_000
NUM_DELTAS = 20_000
NUM_LOOK_UPS = 2_000
NUM_DECISIONS = 2_000
WORKER = Incarnation(1)
LOAD = Load(
    sequences_running=8,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=0,
    pages_total=8000,
    slots_free=0,
    slots_total=8,
    step_ms=50.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    workers: int
    pages: int  # of each worker
    pairs: int  # (page, worker)
    different_pages: int
    bytes_per_pair: float  # arrays, as counted
    resident_bytes_per_pair: float  # growth of the process; 0 where the system does not tell
    load_seconds: float
    part_ms_max: float  # the longest that one snapshot part took
    part_ms_max_clock: float
    look_up_ms_p50: float
    look_up_ms_p99: float
    decision_ms_p50: float
    decision_ms_p99: float
    decision_ms_p50_clock: float
    decision_ms_p99_clock: float
    changes_per_second: float
    core_share: float  # of CHANGES_PER_SECOND
    delta_ms_max: float
    delta_ms_max_clock: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, help="one size only, with this many workers")
    parser.add_argument("--pages", type=int, default=10_000, help="of each, with --workers (default 10000)")
    parser.add_argument(
        "--host-share",
        type=float,
        default=0.0,
        metavar="S",
        help="of each worker's pages, that are in its host memory only (default 0)",
    )
    parser.add_argument("--decisions", type=int, default=NUM_DECISIONS, help="to time (default 2000)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 2:
        parser.error("--workers: prompts are computed and decoded by two at least")
    print("needed with 1000 workers: under 200 B a pair, decision p99 under 2 ms, loaded in under 30 s")
    print(
        f"{'workers':>7}{'pairs':>10}{'pages':>10}{'B/pair':>8}{'(resident)':>11}{'load s':>8}"
        f"{'part ms max':>15}{'look-up ms p50':>16}{'p99':>7}{'decision ms p50':>18}{'p99':>14}{'changes/s':>11}"
        f"{f'core at {CHANGES_PER_SECOND // 1000}k/s':>15}{'delta ms max':>16}"
    )
    sizes = SIZES if args.workers is None else ((args.workers, args.pages),)
    figures: list[Figures] = []
    for num_workers, num_pages in sizes:
        figures.append(
            measure(
                num_workers,
                num_pages,
                seed=args.seed,
                num_decisions=args.decisions,
                host_share=args.host_share,
            )
        )
        _print_row(figures[-1])
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps([asdict(item) for item in figures], indent=2))
    return 0


def _print_row(row: Figures) -> None:
    part = f"{row.part_ms_max:.1f} ({row.part_ms_max_clock:.1f})"
    delta = f"{row.delta_ms_max:.2f} ({row.delta_ms_max_clock:.1f})"
    decision = f"{row.decision_ms_p50:.2f} ({row.decision_ms_p50_clock:.2f})"
    decision_p99 = f"{row.decision_ms_p99:.2f} ({row.decision_ms_p99_clock:.2f})"
    print(
        f"{row.workers:>7}{row.pairs:>10}{row.different_pages:>10}{row.bytes_per_pair:>8.1f}"
        f"{row.resident_bytes_per_pair:>11.1f}{row.load_seconds:>8.2f}{part:>15}{row.look_up_ms_p50:>16.2f}"
        f"{row.look_up_ms_p99:>7.2f}{decision:>18}{decision_p99:>14}{row.changes_per_second:>11.0f}"
        f"{row.core_share:>14.0%} {delta:>16}",
        flush=True,
    )


def measure(
    num_workers: int,
    num_pages: int,
    *,
    seed: int,
    num_deltas: int = NUM_DELTAS,
    num_look_ups: int = NUM_LOOK_UPS,
    num_decisions: int = NUM_DECISIONS,
    host_share: float = 0.0,
) -> Figures:
    """One size. Sequential and seeded."""
    rng = np.random.default_rng(seed)
    prompt = [rng.bytes(KEY_BYTES) for _ in range(PROMPT_PAGES)]
    pool = [rng.bytes(KEY_BYTES) for _ in range(POOL_PAGES)]
    multiplier = int(rng.integers(1, 1 << 62)) << 1 | 1
    resident_before = _resident_bytes()
    picture = Picture(
        multiplier=multiplier, workers_max=num_workers, pairs_max=max(1 << 20, 2 * num_workers * num_pages)
    )
    watch = _Watch()
    workers = [_Worker(picture, rng, prompt, pool, num_pages, watch, host_share) for _ in range(num_workers)]
    load = watch.take()
    resident = _resident_bytes() - resident_before
    num_pairs, num_keys, num_bytes = picture.num_pairs, picture.num_keys, picture.num_bytes
    look_ups = _look_ups(picture, prompt, num_look_ups)
    decided, decided_clock = decisions.measure(picture, prompt, rng=rng, count=num_decisions)
    for data, worker in list(_reports(workers, rng, num_deltas)):
        watch.start()
        report = decode_report(data)
        assert isinstance(report, StepReport)
        for item in report.feed:
            assert worker.reader.take(item) is None, "a delta was refused"
        watch.stop()
    deltas = watch.take()
    picture.check()
    num_changes = num_deltas * CHANGES_PER_DELTA
    return Figures(
        workers=num_workers,
        pages=num_pages,
        pairs=num_pairs,
        different_pages=num_keys,
        bytes_per_pair=num_bytes / num_pairs,
        resident_bytes_per_pair=max(resident, 0) / num_pairs if resident_before else 0.0,
        load_seconds=load.total,
        part_ms_max=load.longest * 1e3,
        part_ms_max_clock=load.longest_clock * 1e3,
        look_up_ms_p50=statistics.median(look_ups) * 1e3,
        look_up_ms_p99=float(np.percentile(look_ups, 99)) * 1e3,
        decision_ms_p50=statistics.median(decided) * 1e3,
        decision_ms_p99=float(np.percentile(decided, 99)) * 1e3,
        decision_ms_p50_clock=statistics.median(decided_clock) * 1e3,
        decision_ms_p99_clock=float(np.percentile(decided_clock, 99)) * 1e3,
        changes_per_second=num_changes / deltas.total,
        core_share=CHANGES_PER_SECOND * deltas.total / num_changes,
        delta_ms_max=deltas.longest * 1e3,
        delta_ms_max_clock=deltas.longest_clock * 1e3,
    )


class _Worker:
    """The feed of one worker, made up, and the reader that follows it."""

    def __init__(
        self,
        picture: Picture,
        rng: np.random.Generator,
        prompt: list[bytes],
        pool: list[bytes],
        num_pages: int,
        watch: _Watch,
        host_share: float,
    ) -> None:
        depth = min(int(rng.integers(0, len(prompt) + 1)), num_pages)
        num_shared = min(int(POOL_SHARE * num_pages), num_pages - depth)
        shared = [pool[i] for i in rng.choice(len(pool), num_shared, replace=False).tolist()]
        own = rng.bytes(KEY_BYTES * (num_pages - depth - num_shared))
        keys = sorted(
            [*prompt[:depth], *shared, *(own[i : i + KEY_BYTES] for i in range(0, len(own), KEY_BYTES))]
        )
        flags_host = np.where(rng.random(num_pages) < TAIL_SHARE, PAGE | TAIL, PAGE).astype(np.uint8)
        if host_share:
            # Of the prompt its last pages: a device gives up leaves first.
            num_kept = round(depth * (1 - host_share))
            kept, below = set(prompt[:num_kept]), set(prompt[num_kept:depth])
            is_below = np.array([key in below for key in keys]) | (rng.random(num_pages) < host_share)
            is_below &= np.array([key not in kept for key in keys])
            flags_host[is_below] |= HOST_PAGE
            flags_host[is_below & (flags_host & TAIL != 0)] |= HOST_TAIL
        flags = flags_host.tobytes()
        self.number = 1
        self.digest = digest_of(b"".join(keys), flags)
        self.added: list[bytes] = []
        self.reader = FeedReader(picture.join())
        self.reader.welcome(WORKER)
        num_parts = -(-num_pages // PART_ENTRIES_MAX)
        for part in range(num_parts):
            chunk = slice(part * PART_ENTRIES_MAX, (part + 1) * PART_ENTRIES_MAX)
            item = SnapshotPart(
                incarnation=WORKER,
                number=1,
                part=part,
                num_parts=num_parts,
                num_entries=num_pages,
                digest=self.digest,
                keys=b"".join(keys[chunk]),
                flags=flags[chunk],
            )
            watch.start()
            answer = self.reader.take(item)
            watch.stop()
            assert answer is None, "a snapshot was refused"

    def next_delta(self, rng: np.random.Generator) -> Delta:
        """By turns new pages and the removal of the ones before, as in a cache that is full."""
        before, after = (PAGE, ABSENT) if self.added else (ABSENT, PAGE)
        keys = self.added or [rng.bytes(KEY_BYTES) for _ in range(CHANGES_PER_DELTA)]
        self.added = [] if self.added else keys
        num = len(keys)
        packed = b"".join(keys)
        self.digest += digest_of(packed, bytes([after] * num)) - digest_of(packed, bytes([before] * num))
        self.digest &= MASK
        self.number += 1
        return Delta(
            incarnation=WORKER,
            number=self.number,
            digest=self.digest,
            keys=packed,
            changes=bytes([before << 4 | after] * num),
        )


def _reports(
    workers: list[_Worker], rng: np.random.Generator, num_deltas: int
) -> Iterator[tuple[bytes, _Worker]]:
    """Encoded reports of the workers' steps, by turns."""
    for number in range(num_deltas):
        worker = workers[number % len(workers)]
        feed = (worker.next_delta(rng),)
        yield (
            encode_report(StepReport(number=number + 1, sequences=(), load=LOAD, draining=False, feed=feed)),
            worker,
        )


def _look_ups(picture: Picture, prompt: list[bytes], count: int) -> list[float]:
    """Seconds of each, for the whole prompt."""
    seconds: list[float] = []
    for _ in range(count):
        start = time.thread_time_ns()
        picture.look_up(prompt)
        seconds.append((time.thread_time_ns() - start) / 1e9)
    return seconds


@dataclass(slots=True, kw_only=True)
class _Spans:
    total: float = 0.0
    longest: float = 0.0
    longest_clock: float = 0.0


class _Watch:
    """Adds up spans of this thread's own time, and keeps the longest."""

    def __init__(self) -> None:
        self._spans = _Spans()
        self._started = (0, 0)

    def start(self) -> None:
        self._started = (time.thread_time_ns(), time.perf_counter_ns())

    def stop(self) -> None:
        seconds = (time.thread_time_ns() - self._started[0]) / 1e9
        self._spans.total += seconds
        self._spans.longest = max(self._spans.longest, seconds)
        clock = (time.perf_counter_ns() - self._started[1]) / 1e9
        self._spans.longest_clock = max(self._spans.longest_clock, clock)

    def take(self) -> _Spans:
        spans, self._spans = self._spans, _Spans()
        return spans


def _resident_bytes() -> int:
    """Of this process now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
