"""An engine of one-sided reads whose reads end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstore.transfer.contract import Endpoint, PeerId, ReadId, ReadState, Run, TransferError

ENDPOINT = Endpoint(backend="fake", agent="owner#1", metadata=b"", regions=())


class FakeTransfer:
    """Reads stay open until `done` or `failed` names them. Refuses agents called "bad" and peers below 0."""

    endpoint = ENDPOINT

    def __init__(self) -> None:
        self.posted: list[tuple[PeerId, int]] = []  # of ReadId n at n: the peer, and bytes
        self.runs: list[Sequence[Run]] = []  # of ReadId n at n
        self.open: set[ReadId] = set()
        self.done: set[ReadId] = set()
        self.failed: set[ReadId] = set()
        self.forgotten: list[PeerId] = []
        self.threads: set[int] = set()
        self.num_progress = 0
        self.is_closed = False
        self.gate = threading.Event()  # a post waits for it
        self.gate.set()

    def connect(self, peer: PeerId, endpoint: Endpoint) -> None:
        self.threads.add(threading.get_ident())
        if endpoint.agent == "bad":
            raise TransferError("refused")

    def forget(self, peer: PeerId) -> None:
        self.forgotten.append(peer)

    def post(self, peer: PeerId, runs: Sequence[Run]) -> ReadId:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(10)
        if peer < 0:
            raise TransferError("not posted")
        assert all(run.num_bytes > 0 for run in runs)
        read = ReadId(len(self.posted))
        self.posted.append((peer, sum(run.num_bytes for run in runs)))
        self.runs.append(runs)
        self.open.add(read)
        return read

    def poll(self, read: ReadId) -> ReadState:
        assert read in self.open, "a read that is over is polled"
        if read in self.failed:
            self.open.remove(read)
            raise TransferError("lost")
        if read in self.done:
            self.open.remove(read)
            return ReadState.DONE
        return ReadState.PENDING

    def progress(self) -> None:
        self.num_progress += 1

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.is_closed = True
