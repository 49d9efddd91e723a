"""The real rank as a process, with the test as its host.

Called by `tests.integration`. It speaks the frames of `engine.frames` over a socket pair, as `engine.worker.rank_link`
does, and keeps messages apart that come for different reasons.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from engine.frames import HEADER, decode_from_rank, encode_frame, payload_bytes
from engine.plan import FromRank, RankReady, RankSettings, ToRank

Message = TypeVar("Message")

NUM_PAGES = 24
NUM_SLOTS = 3
NUM_RECORDS = 3

LOOPBACK = {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}


class RankUnderTest:
    """Started at once; `ready` waits for it. Must be closed."""

    def __init__(
        self,
        model: Path,
        *,
        numerics: str | None = "float32",
        exact: bool = False,
        transfer: str = "",
        drafts_max: int = 0,
        drafts_required: bool = False,
        environment: Mapping[str, str] = LOOPBACK,
    ) -> None:
        self.host, theirs = socket.socketpair()
        self.host.settimeout(60)
        self._waiting: deque[FromRank] = deque()
        with theirs:
            command = [sys.executable, "-m", "engine.rank_process", "--fd", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
        settings = RankSettings(
            model=str(model),
            numerics=numerics,
            exact=exact,
            num_pages=NUM_PAGES,
            kv_bytes=None,
            num_slots=NUM_SLOTS,
            prefill_tokens_max=512,
            threads=1,
            kernels={},
            transfer=transfer,
            num_records=NUM_RECORDS if transfer else 0,
            agent=f"rank#{self.process.pid}",
            drafts_max=drafts_max,
            drafts_required=drafts_required,
        )
        self.send(settings)

    def send(self, message: ToRank) -> None:
        self.host.sendall(encode_frame(message))

    def receive(self) -> FromRank:
        """The next message of any kind."""
        if self._waiting:
            return self._waiting.popleft()
        return decode_from_rank(self._read(payload_bytes(self._read(HEADER.size))))

    def expect(self, kind: type[Message]) -> Message:
        """The next message of a kind; those of others wait for their own turn."""
        others: list[FromRank] = []
        while not isinstance(message := self.receive(), kind):
            others.append(message)
        self._waiting.extendleft(reversed(others))
        return message

    def ready(self) -> RankReady:
        while not isinstance(message := self.receive(), RankReady):
            pass
        return message

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it wrote to stderr, once it has ended."""
        _, output = self.process.communicate(timeout=60)
        return self.process.returncode, output

    def close(self) -> None:
        self.host.close()
        self.process.kill()
        self.process.communicate()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.host.recv(size - len(data))
            assert part, self.process.communicate()[1]
            data += part
        return bytes(data)
