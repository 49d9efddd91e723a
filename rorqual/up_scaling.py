"""Pools of local workers that grow and shrink: the half of `rorqual up --autoscale` that starts and stops them.

Made by `rorqual.up`, which owns the processes. It follows `wanted.json`, which the autoscaler (or a person) writes, and
writes `workers.json`, which router and autoscaler read: who is there, and of each pool what is wanted, how long what is
starting has been, and what is wrong. It decides nothing: a worker that dies is started again, later each time, and one
too many, the youngest, is asked to finish what it has. Every file is replaced as a whole.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from rorqual.errors import RorqualError
from rorqual.processes import describe_exit

WORKERS, WANTED, ROUTERS = "workers.json", "wanted.json", "routers.json"
ROLES = ("prefill", "decode", "both")
"""A local pool is named as its role."""

POLL_SECONDS = 0.25
DRAIN_SECONDS_MAX = 600.0
"""What a worker that is asked to go may take to finish its streams."""

KILL_AFTER_SECONDS = DRAIN_SECONDS_MAX + 10.0
BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 1.0, 60.0
WELL_SECONDS = 60.0
"""A worker that served for so long is not one of those that keep dying."""

DEATHS_TOLD = 2
"""In a row, until a pool is said to have a problem."""

WORKERS_MAX = 64


class ChildLike(Protocol):
    """`rorqual.processes.Child`."""

    tail: deque[str]

    @property
    def name(self) -> str: ...

    @property
    def exit_status(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True, eq=False)
class Worker:
    child: ChildLike
    ready_file: Path
    started_at: float
    address: str = ""  # once it is ready
    ready_at: float = 0.0
    asked_to_go_at: float | None = None


StartWorker = Callable[[str, str, Path], ChildLike]
"""(role, name, ready file): a new worker."""


@dataclass(slots=True)
class _Pool:
    role: str
    wanted: int = 0
    next_number: int = 0
    workers: list[Worker] = field(default_factory=list[Worker])  # oldest first
    num_deaths: int = 0  # in a row
    not_before: float = 0.0  # no start until then
    short_since: float | None = None
    problem: str = ""

    @property
    def staying(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.asked_to_go_at is None]


class LocalPools:
    """`run` goes on until cancelled; the children are the caller's to end."""

    def __init__(
        self, folder: Path, *, start: StartWorker, tell: Callable[[str], None], workers_max: int = WORKERS_MAX
    ) -> None:
        """`tell` gets a line for a person."""
        self._folder = folder
        self._start = start
        self._tell = tell
        self._workers_max = workers_max
        self._pools = {role: _Pool(role) for role in ROLES}
        self._written: str = ""
        self._told_wanted = ""

    @property
    def children(self) -> list[ChildLike]:
        return [worker.child for pool in self._pools.values() for worker in pool.workers]

    def adopt(self, role: str, child: ChildLike, *, ready_file: Path, now: float) -> None:
        """A worker that was started with the cluster and is ready. Raises RorqualError."""
        pool = self._pools[role]
        worker = Worker(child, ready_file, started_at=now)
        if not _look_ready(worker, now):
            raise RorqualError(f"{child.name}: its ready file names no address")
        pool.workers.append(worker)
        pool.wanted += 1
        pool.next_number += 1

    def set_router(self, address: str) -> None:
        _replace(self._folder / ROUTERS, json.dumps({"workers": [{"address": address}]}))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.turn(loop.time())
            await asyncio.sleep(POLL_SECONDS)

    def turn(self, now: float) -> None:
        """Bring what is there nearer to what is wanted, and tell who is there."""
        self._read_wanted()
        for pool in self._pools.values():
            self._reap(pool, now)
            for worker in pool.staying:
                if not worker.address and _look_ready(worker, now):
                    self._tell(f"{worker.child.name} is ready after {now - worker.started_at:.1f} s")
            if any(worker.address and now - worker.ready_at >= WELL_SECONDS for worker in pool.staying):
                pool.num_deaths = 0
            if pool.num_deaths < DEATHS_TOLD:
                pool.problem = ""
            self._follow(pool, now)
        self.write(now)

    def write(self, now: float) -> None:
        pools: dict[str, Any] = {}
        for role, pool in self._pools.items():
            starting = [now - worker.started_at for worker in pool.staying if not worker.address]
            num_missing = max(0, pool.wanted - len(pool.staying))
            if num_missing and pool.short_since is None:
                pool.short_since = now
            if not num_missing:
                pool.short_since = None
            starting += [now - (now if pool.short_since is None else pool.short_since)] * num_missing
            pools[role] = {
                "wanted": pool.wanted,
                "starting_seconds": [round(age, 2) for age in sorted(starting, reverse=True)],
                "problem": pool.problem,
            }
        workers = [
            {"address": worker.address, "pool": role}
            for role, pool in self._pools.items()
            for worker in pool.workers
            if worker.address and worker.child.exit_status is None
        ]
        text = json.dumps({"workers": workers, "pools": pools})
        if text != self._written:
            _replace(self._folder / WORKERS, text)
            self._written = text

    def _read_wanted(self) -> None:
        file = self._folder / WANTED
        why = ""
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
            replicas = cast("dict[str, Any]", content["replicas"])
            for role, count in replicas.items():
                if role not in self._pools or type(count) is not int or not 0 <= count <= self._workers_max:
                    why = f"{role!r}: {count!r} is no pool with a number of up to {self._workers_max} workers"
                else:
                    self._pools[role].wanted = count
        except FileNotFoundError:
            return  # nobody has asked for anything yet
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
        if why and why != self._told_wanted:
            self._tell(f"{file} cannot be followed: {why}")
        self._told_wanted = why

    def _reap(self, pool: _Pool, now: float) -> None:
        for worker in list(pool.workers):
            status = worker.child.exit_status
            asked_at = worker.asked_to_go_at
            if status is None:
                if asked_at is not None and now - asked_at > KILL_AFTER_SECONDS:
                    self._tell(f"{worker.child.name} did not go within {KILL_AFTER_SECONDS:g} s: killed")
                    worker.child.kill()
                continue
            pool.workers.remove(worker)
            if asked_at is not None:
                self._tell(f"{worker.child.name} has gone")
                continue
            served = now - worker.ready_at if worker.address else 0.0
            pool.num_deaths = 1 if served >= WELL_SECONDS else pool.num_deaths + 1
            wait = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(pool.num_deaths - 1, 20))
            pool.not_before = now + wait
            said = worker.child.tail[-1] if worker.child.tail else "it said nothing"
            text = f"{worker.child.name} died: {describe_exit(status)}: {said}"
            if pool.num_deaths >= DEATHS_TOLD:
                pool.problem = f"{pool.num_deaths} workers died in a row; {text}"
            self._tell(f"{text}; another is started in {wait:g} s")

    def _follow(self, pool: _Pool, now: float) -> None:
        staying = pool.staying
        for worker in _youngest_first(staying)[: max(0, len(staying) - pool.wanted)]:
            worker.asked_to_go_at = now
            worker.child.terminate()
            self._tell(f"asked {worker.child.name} to go: {pool.wanted} {pool.role} workers are wanted")
        # After a death one at a time: ten that die of the same cause need not all die of it.
        num_missing = pool.wanted - len(pool.staying)
        if num_missing > 0 and now >= pool.not_before:
            is_trying = pool.num_deaths >= DEATHS_TOLD
            if is_trying and any(not worker.address for worker in pool.staying):
                return
            for _ in range(1 if is_trying else num_missing):
                self._start_one(pool, now)

    def _start_one(self, pool: _Pool, now: float) -> None:
        name = f"{pool.role}-{pool.next_number}"
        pool.next_number += 1
        file = self._folder / f"{name}.json"
        child = self._start(pool.role, name, file)
        pool.workers.append(Worker(child, file, started_at=now))
        self._tell(f"started {name}: {pool.wanted} {pool.role} workers are wanted")


def _youngest_first(workers: Sequence[Worker]) -> list[Worker]:
    """Those that do not serve yet before all others."""
    return sorted(workers, key=lambda worker: (bool(worker.address), -worker.started_at))


def _look_ready(worker: Worker, now: float) -> bool:
    try:
        content: Any = json.loads(worker.ready_file.read_text(encoding="utf-8"))
        address = content["address"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not isinstance(address, str):
        return False
    worker.address, worker.ready_at = address, now
    return True


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
