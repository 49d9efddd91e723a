"""Child processes: started so that they cannot outlive us, heard line by line, stopped within a deadline.

`rorqual up` is the caller. A Child is a session and process group of its own: a Ctrl-C in the terminal
reaches the supervisor alone, which then stops the children in order, and whatever a child has started (a
worker's ranks) can be ended with it. What a child started is never looked for by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

LINE_BYTES_MAX = 8192
TAIL_LINES = 8
PARENT_POLL_SECONDS = 0.5
EXIT_POLL_SECONDS = 0.05
DRAIN_SECONDS_MAX = 1.0

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Make the kernel (Linux), or a watching thread (elsewhere), end this process when its parent is gone.

    Called by the child itself, first thing in `main`, so no code runs between fork and exec. The parent
    must have started the child from its main thread: on Linux the death of the starting *thread* is what
    counts.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), name="parent-watch", daemon=True).start()
    # The parent may have died before the line above took effect.
    if os.getppid() != parent_pid:
        os._exit(1)


class Child:
    """One running child process. Made by `start_child`; its `run` must be awaited by a task of the caller."""

    def __init__(
        self, process: subprocess.Popen[bytes], *, name: str, on_line: Callable[[str], None]
    ) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = process
        self._on_line = on_line
        self._is_swept = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    async def run(self) -> None:
        """Forward its lines until it has exited, then end whatever it left in its group.

        The exit is polled for: asyncio's own wait ends only when the pipe closes, and a rank that outlives
        its host holds that pipe open.
        """
        reading = asyncio.ensure_future(self._read_lines())
        try:
            await self._exited()
        finally:
            self.kill()
            # Only when `run` itself was cancelled is the child still there; SIGKILL leaves it no choice.
            await self._exited()
            self._is_swept = True
            # A process that left the group may still hold the pipe: what it says later is not waited for.
            await asyncio.wait({reading}, timeout=DRAIN_SECONDS_MAX)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    def terminate(self) -> None:
        """Ask it to finish: SIGTERM to the child itself, which tells its own children."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the child and to everything in its process group, unless `run` has already done so."""
        if self._is_swept:
            return  # the number may name somebody else's group by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _exited(self) -> None:
        while self._process.poll() is None:  # noqa: ASYNC110 (a child's exit sets no event on all systems)
            await asyncio.sleep(EXIT_POLL_SECONDS)

    async def _read_lines(self) -> None:
        assert self._process.stdout is not None
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self._process.stdout
        )
        rest = b""
        try:
            while data := await stream.read(65536):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > LINE_BYTES_MAX:
                    lines.append(rest)
                    rest = b""
                for line in lines:
                    self._line(line)
            if rest:
                self._line(rest)
        finally:
            transport.close()

    def _line(self, data: bytes) -> None:
        # A progress bar rewrites its line after a carriage return: only the last state is worth a line.
        text = data[:LINE_BYTES_MAX].decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
        if text:
            self.tail.append(text)
        self._on_line(text)


def start_child(
    command: Sequence[str], *, name: str, environment: Mapping[str, str], on_line: Callable[[str], None]
) -> Child:
    """Start `command` in a session of its own, its output and errors going line by line to `on_line`."""
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    return Child(process, name=name, on_line=on_line)


async def stop_children(
    children: Sequence[Child],
    *,
    grace_seconds: float,
    is_hurried: Callable[[], bool],
    poll_seconds: float = 0.02,
) -> list[Child]:
    """SIGTERM all, wait up to `grace_seconds` (or until hurried), SIGKILL the rest. Returns those that had
    to be killed.

    The children's `run` tasks must be alive: they reap.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_seconds
    for child in children:
        child.terminate()
    while any(child.exit_status is None for child in children):
        if loop.time() >= deadline or is_hurried():
            break
        await asyncio.sleep(poll_seconds)
    late = [child for child in children if child.exit_status is None]
    for child in late:
        child.kill()
    return late


def describe_exit(status: int) -> str:
    """`exit status 3`, or `killed by SIGKILL`, for a person."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)
