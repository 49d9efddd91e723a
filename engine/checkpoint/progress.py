"""One line on a terminal that says how far a long job over bytes is. Silent where there is no terminal.

The `checkpoint` command uses it, and whoever loads a model with a person watching. No torch.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO


class ProgressLine:
    """A callback of (bytes done, bytes in all). Leaving the `with` block ends the line, whatever happened."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label = label
        self._stream = stream
        self._visible = stream.isatty()
        self._shown = ""

    def __call__(self, done: int, total: int) -> None:
        if not self._visible:
            return
        percent = 100 * done // total if total else 100
        text = f"{self._label} {percent:3d} % of {format_bytes(total)}"
        # Written only when it changes: at most 101 times, however many tensors there are.
        if text != self._shown:
            self._stream.write(f"\r{text}")
            self._stream.flush()
            self._shown = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()


def format_bytes(num_bytes: float) -> str:
    """Decimal units, as model cards and disks count: '159.6 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
