"""Two processes that hand state over, for `bench.transfer`: an owner that exports memory, a reader that times reads.

`python -m bench.transfer_pair KIND ROUNDS` is the reader; it starts the owner, and prints one JSON line: the rounds of
every case. Both hold our engine and, for nixl, a second agent over the same memory that is used plainly: one transfer
of all runs, both ends looking every 50 us. The sides take turns, and only the side whose turn it is looks.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from engine.kernels.digest import page_digest_numba
from kvstore.transfer.contract import ByteArray, Endpoint, PeerId, Region, Run, Transfer
from kvstore.transfer.opening import open_transfer
from kvstore.transfer.owner import Connect, Connected, Event, Expose, Fetch, Fetched, TransferOwner
from kvstore.transfer.runs import page_runs, record_run
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError

MODELS = {
    # DeepSeek-V4-Flash served: 21 layers of c4 and 20 of c128; a page is 64 x 584, 64 x 68 and 2 x 584 bytes a layer.
    "Flash": ({"c4": 21 * 64 * 584, "c4_index": 21 * 64 * 68, "c128": 20 * 2 * 584}, 9_000_000),
    # The model of bench.engine, float32: 4 layers of c4 and 3 of c128, heads of 64, an index of 32.
    "laptop": ({"c4": 4 * 64 * 256, "c4_index": 4 * 64 * 128, "c128": 3 * 2 * 256}, 400_000),
}
"""Bytes of a page by component, and of a hand-over record."""

CASES = [("laptop", 8), ("laptop", 64), ("Flash", 8), ("Flash", 64)]
NUM_PAGES = 96
LOOK_SECONDS = 0.00005
FETCH_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One turn of each side with the same runs."""

    ours_seconds: float  # from the first post to the last DONE
    digest_seconds: float
    turns_seconds: float  # the rest between submission and event: commands and events between threads
    raw_seconds: float | None  # nixl only
    copy_seconds: float  # the same runs within the reader's own memory


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRounds:
    model: str
    num_pages: int
    num_runs: int
    num_bytes: int
    rounds: tuple[Round, ...]


def region_name(model: str, component: str) -> str:
    return f"{model}.{component}"


def open_memory(kind: str, agent: str) -> tuple[Transfer, dict[str, ByteArray]]:
    """An engine over memory for all models."""
    builder = open_transfer(kind, agent=agent)
    memory = {
        name: builder.allocate(name, unit_bytes, NUM_PAGES)
        for model, (components, _) in MODELS.items()
        for component, unit_bytes in components.items()
        for name in [region_name(model, component)]
    }
    memory["records"] = builder.allocate("records", max(size for _, size in MODELS.values()), 2)
    return builder.start(), memory


class RawNixl:
    """NIXL as its examples use it: one transfer, no parts, looked at every 50 us."""

    def __init__(self, name: str, memory: dict[str, ByteArray]) -> None:
        import nixl_cu13 as nixl  # only this side needs the package itself

        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
        self._agent: Any = nixl.nixl_agent(name, config)
        self._agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        rows = [(array.ctypes.data, array.nbytes, 0, "") for array in memory.values()]
        self._agent.register_memory(rows, "DRAM")
        self.metadata: bytes = self._agent.get_agent_metadata()
        self._peer = ""

    def connect(self, metadata: bytes) -> None:
        self._peer = self._agent.add_remote_agent(metadata).decode()

    def look(self) -> None:
        self._agent.get_new_notifs()

    def read(self, runs: Sequence[Run], ours: dict[str, Region], theirs: dict[str, Region]) -> None:
        targets_R3 = np.zeros((len(runs), 3), dtype=np.uint64)
        targets_R3[:, 0] = [ours[run.region].address + run.target for run in runs]
        targets_R3[:, 1] = [run.num_bytes for run in runs]
        sources_R3 = targets_R3.copy()
        sources_R3[:, 0] = [theirs[run.region].address + run.source for run in runs]
        targets = self._agent.get_xfer_descs(targets_R3, "DRAM")
        sources = self._agent.get_xfer_descs(sources_R3, "DRAM")
        handle = self._agent.initialize_xfer("READ", targets, sources, self._peer)
        state = self._agent.transfer(handle)
        while state != "DONE":
            time.sleep(LOOK_SECONDS)
            state = self._agent.check_xfer_state(handle)
        handle.release()


def own(kind: str) -> None:
    """The owner: answers one byte, "o" or "r", with the same when that side has its turn, until its input ends."""
    engine, memory = open_memory(kind, "bench-owner#1")
    for number, array in enumerate(memory.values()):
        array[:] = np.random.default_rng(number).integers(0, 256, len(array), dtype=np.uint8)
    raw = RawNixl("bench-owner-raw#1", memory) if kind == "nixl" else None
    owner = TransferOwner(engine, on_event=print, on_failure=lambda _: os._exit(1), clock=SystemClock())
    owner.start()
    endpoint = msgspec.msgpack.encode(engine.endpoint).hex()
    print(json.dumps({"endpoint": endpoint, "raw": raw.metadata.hex() if raw else ""}), flush=True)
    turn = b"o"
    while True:
        pause = None
        if raw is not None and turn == b"r":
            raw.look()
            pause = LOOK_SECONDS
        if select.select([0], [], [], pause)[0]:
            turn = os.read(0, 1)
            if not turn:
                break
            owner.submit(Expose(active=turn == b"o"))
            os.write(1, turn)
    owner.stop(seconds_max=5)


class Reader:
    """Times the sides, with the owner told whose turn it is."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-m", "bench.transfer_pair", kind, "own"]
        self._owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._owner.stdin is not None
        assert self._owner.stdout is not None
        self._to_owner, self._from_owner = self._owner.stdin, self._owner.stdout
        self._engine, self._memory = open_memory(kind, "bench-reader#1")
        for array in self._memory.values():
            array[:] = 0
        told = json.loads(self._from_owner.readline())
        theirs = msgspec.msgpack.decode(bytes.fromhex(told["endpoint"]), type=Endpoint)
        self._ours = {item.name: item for item in self._engine.endpoint.regions}
        self._theirs = {item.name: item for item in theirs.regions}
        self._raw = RawNixl("bench-reader-raw#1", self._memory) if kind == "nixl" else None
        if self._raw is not None:
            self._raw.connect(bytes.fromhex(told["raw"]))
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._transfer = TransferOwner(
            self._engine,
            on_event=self._events.put,
            on_failure=lambda _: os._exit(1),
            clock=SystemClock(),
        )
        self._num_rounds = 0
        self._transfer.start()
        self._transfer.submit(Connect(peer=PeerId(1), endpoint=theirs))
        event = self._events.get(timeout=FETCH_SECONDS_MAX)
        if not isinstance(event, Connected) or event.error:
            raise RorqualError(f"the reader cannot connect: {event}")

    def race(self, model: str, num_pages: int, *, rounds: int) -> CaseRounds:
        components, record_bytes = MODELS[model]
        regions = [self._ours[region_name(model, component)] for component in components]
        # Pages in no order on either side: nothing can be merged, the worst there is.
        random = np.random.default_rng(num_pages)
        source = random.permutation(NUM_PAGES)[:num_pages].tolist()
        target = random.permutation(NUM_PAGES)[:num_pages].tolist()
        runs = page_runs(regions, source, target)
        runs.append(record_run(self._ours.values(), source=1, target=0, num_bytes=record_bytes))
        self._round(model, runs, target, record_bytes)  # warm
        return CaseRounds(
            model=model,
            num_pages=num_pages,
            num_runs=len(runs),
            num_bytes=sum(run.num_bytes for run in runs),
            rounds=tuple(self._round(model, runs, target, record_bytes) for _ in range(rounds)),
        )

    def _round(self, model: str, runs: list[Run], pages: list[int], record_bytes: int) -> Round:
        # Who comes second finds the source in a cache: they change places.
        raw_seconds = self._raw_seconds(runs) if self._num_rounds % 2 else None
        event, seconds = self._fetch(runs, lambda: self._digest(model, pages, record_bytes))
        if raw_seconds is None:
            raw_seconds = self._raw_seconds(runs)
        self._num_rounds += 1
        return Round(
            ours_seconds=event.transfer_ms * 1e-3,
            digest_seconds=event.verify_ms * 1e-3,
            turns_seconds=seconds - (event.transfer_ms + event.verify_ms) * 1e-3,
            raw_seconds=raw_seconds,
            copy_seconds=self._copy_seconds(runs),
        )

    def _fetch(self, runs: list[Run], verify: Callable[[], str]) -> tuple[Fetched, float]:
        self._give_turn(b"o")
        started = time.perf_counter()
        self._transfer.submit(
            Fetch(fetch=0, peer=PeerId(1), runs=runs, seconds=FETCH_SECONDS_MAX, verify=verify)
        )
        event = self._events.get(timeout=FETCH_SECONDS_MAX)
        seconds = time.perf_counter() - started
        if not isinstance(event, Fetched) or event.error:
            raise RorqualError(f"a fetch failed: {event}")
        return event, seconds

    def _raw_seconds(self, runs: list[Run]) -> float | None:
        if self._raw is None:
            return None
        self._give_turn(b"r")
        started = time.perf_counter()
        self._raw.read(runs, self._ours, self._theirs)
        return time.perf_counter() - started

    def _give_turn(self, turn: bytes) -> None:
        self._to_owner.write(turn)
        answer = self._from_owner.read(1)
        assert answer == turn, "the owner is gone"

    def _digest(self, model: str, pages: list[int], record_bytes: int) -> str:
        """What the rank does with what it has read; here nobody knows what it should be."""
        ids_N = torch.tensor(pages)
        for component, unit_bytes in MODELS[model][0].items():
            memory_B = torch.from_numpy(self._memory[region_name(model, component)])
            page_digest_numba(memory_B.view(NUM_PAGES, unit_bytes), ids_N)
        page_digest_numba(torch.from_numpy(self._memory["records"])[None, :record_bytes], torch.tensor([0]))
        return ""

    def _copy_seconds(self, runs: list[Run]) -> float:
        """From where the source would be here: other pages of the same regions."""
        started = time.perf_counter()
        for run in runs:
            memory_B = self._memory[run.region]
            memory_B[run.target : run.target + run.num_bytes] = memory_B[
                run.source : run.source + run.num_bytes
            ]
        return time.perf_counter() - started

    def close(self) -> None:
        self._transfer.stop(seconds_max=5)
        self._to_owner.close()
        try:
            self._owner.wait(timeout=10)
        finally:
            self._owner.kill()


def main() -> int:
    kind, rounds = sys.argv[1:]
    if rounds == "own":
        own(kind)
        return 0
    torch.set_num_threads(1)
    reader = Reader(kind)
    try:
        cases = [reader.race(model, num_pages, rounds=int(rounds)) for model, num_pages in CASES]
    finally:
        reader.close()
    print(json.dumps([asdict(case) for case in cases]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
