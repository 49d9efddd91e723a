"""The edges of a long-lived process: its event loop, its signals, its ready file, its addresses.

Called by the `main` modules of the worker, the router and `rorqual up`, and by nothing below them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import re
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

STORE_VARIABLE = "RORQUAL_STORE"
"""The environment's URL of the store, with its password: other users of the machine see arguments, and not this."""


def run_service(service: Coroutine[Any, Any, None]) -> None:
    """Run to the end on uvloop where it is installed, else on asyncio's own loop."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(service)


class StopSignals:
    """SIGTERM and SIGINT as events: the first asks to stop, a second one to hurry. `close` gives them
    back."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._take, number)

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals) -> None:
        log.info("received a signal %s", fields(signal=number.name))
        (self.hurry if self.stop.is_set() else self.stop).set()


async def until_first(*waits: asyncio.Task[Any] | Coroutine[Any, Any, Any]) -> None:
    """Return when the first is done. Coroutines given here are then cancelled; tasks belong to the caller.

    A coroutine that failed, by itself or in its own cleaning up, raises here: nobody else could hear of it.
    """
    own = [asyncio.create_task(wait) for wait in waits if not isinstance(wait, asyncio.Task)]
    tasks = [wait for wait in waits if isinstance(wait, asyncio.Task)]
    try:
        await asyncio.wait([*tasks, *own], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()
        if own:
            await asyncio.wait(own)
        failures = [error for task in own if not task.cancelled() and (error := task.exception()) is not None]
    if failures:
        raise failures[0]


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task and see it end. What it raised is the caller's to handle, who looks at it before this."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def write_ready_file(path: Path | None, content: dict[str, Any]) -> None:
    """All of it or nothing: whoever waits for the file may read it the moment it is there. Raises
    ConfigError."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--ready-file: {path} cannot be written: {error.strerror}") from None


def remove_ready_file(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def check_above_zero(args: argparse.Namespace, *options: str) -> None:
    """Counts and durations of a command line: finite and above 0, or left out. Raises ConfigError naming the option."""
    for option in options:
        value = getattr(args, option)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{option.replace('_', '-')} must be above 0, not {value:g}")


def parse_address(text: str, *, option: str) -> tuple[str, int]:
    """HOST:PORT, with [..] around an IPv6 host. Raises ConfigError naming the option."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):(\d{1,5})", text)
    if found is None or int(found[2]) > 65535:
        raise ConfigError(f"{option} must be HOST:PORT, not {text!r}")
    return found[1].strip("[]"), int(found[2])


def parse_bytes(text: str, *, option: str) -> int:
    """A size: 1500000000, 1.5GB or 1.4GiB. Raises ConfigError naming the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{option} must be a size such as 2GB or 512MiB, not {text!r}")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))
    if size <= 0:
        raise ConfigError(f"{option} must be above 0, not {text!r}")
    return size


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
