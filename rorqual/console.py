"""Lines for the person at the terminal, written without ever making the caller wait.

`rorqual up` owns one Console and sends it every child's log lines. Standard output may be a pipe that
nobody reads, or a terminal that somebody has paused: a supervisor that blocked there could no longer answer
Ctrl-C, and the children would stop serving behind full pipes. So a thread of its own does the writing
behind a bounded queue; when the reader is too slow lines are dropped and their number is told.
"""

from __future__ import annotations

import queue
import threading
from typing import IO

QUEUE_LINES_MAX = 10_000
CLOSE_SECONDS_MAX = 2.0

_COLOURS = ("36", "33", "35", "32", "34", "31")


class Console:
    """Thread-safe. After `close` further lines are ignored."""

    def __init__(self, stream: IO[str], *, colour: bool = False, lines_max: int = QUEUE_LINES_MAX) -> None:
        self._stream = stream
        self._colour = colour
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=lines_max)
        self._lock = threading.Lock()
        self._num_dropped = 0
        self._is_closed = False
        # A daemon: a reader that never comes back must not keep the process alive.
        self._writer = threading.Thread(target=self._write, name="console", daemon=True)
        self._writer.start()

    def line(self, text: str) -> None:
        """Write one line, or count it as dropped when the reader is far behind."""
        with self._lock:
            if self._is_closed:
                return
            if self._num_dropped:
                text = f"({self._num_dropped} lines dropped: the reader of this output was too slow)\n{text}"
            try:
                self._lines.put_nowait(text)
            except queue.Full:
                self._num_dropped += 1
            else:
                self._num_dropped = 0

    def prefixed(self, name: str, text: str, *, width: int, number: int) -> None:
        """A child's line: `both-0 | text`, in the child's own colour on a terminal."""
        prefix = f"{name:<{width}} |"
        if self._colour:
            prefix = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{prefix}\x1b[0m"
        self.line(f"{prefix} {text}")

    def close(self) -> None:
        """Write out what is queued, as long as the reader takes it within two seconds."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        try:
            self._lines.put(None, timeout=CLOSE_SECONDS_MAX)
        except queue.Full:
            return
        self._writer.join(CLOSE_SECONDS_MAX)

    def _write(self) -> None:
        is_broken = False
        while (text := self._lines.get()) is not None:
            if is_broken:
                continue
            try:
                self._stream.write(text + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):
                # The reader is gone (`| head`, a closed terminal). Serving goes on in silence.
                is_broken = True
