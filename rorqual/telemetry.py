"""Log lines: one line per event, the same shape in every process.

Every process's `main` calls `configure_logging` once; everything else takes a `logging.Logger` and writes
events with `fields(...)` at the end: `log.info("opened a sequence %s", fields(request=request_id,
tokens=12))`. A line never spans lines, whatever a client put into a field, so that `rorqual up` and log
collectors can prefix, cut and count lines. Never reads the environment, opens no file.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from typing import IO

LOG_LEVELS = ("debug", "info", "warning", "error")


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """The option every process shares: `--log-level`, read back as `args.log_level`."""
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="least severe log line to write (default info)",
    )


def configure_logging(
    *, level: str = "info", stream: IO[str] | None = None, colour: bool | None = None
) -> None:
    """Send every logger's lines to `stream` (default: standard error), and nowhere else.

    Colour is used on a terminal only, unless said otherwise. Python warnings become log lines too.
    """
    assert level in LOG_LEVELS, f"unknown log level {level!r}"
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(LineFormatter(colour=target.isatty() if colour is None else colour))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def fields(**values: object) -> str:
    """`key=value key="two words"`: the machine-readable end of a log line. None is left out."""
    return " ".join(f"{key}={_render(value)}" for key, value in values.items() if value is not None)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO engine.worker.process opened a sequence request=cmpl-1 tokens=12`."""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = record.levelname
        if self._colour:
            level = f"\x1b[{_LEVEL_COLOURS.get(record.levelno, '0')}m{level}\x1b[0m"
        message = one_line(record.getMessage())
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{message} {_failure(record.exc_info[1])}"
        return f"{moment}.{int(record.msecs):03d}Z {level} {record.name} {message}"


def one_line(text: str) -> str:
    """The text with every character that could break or repaint a line written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


_LEVEL_COLOURS = {
    logging.DEBUG: "2",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "35",
}


def _render(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and text.isprintable() and not any(char in ' "=' for char in text):
        return text
    escaped = one_line(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{escaped}"'


def _failure(error: BaseException) -> str:
    """An exception on one line: what it says, and the calls that led there, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    path = " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)
    return fields(error=f"{type(error).__name__}: {error}", at=path or None)
