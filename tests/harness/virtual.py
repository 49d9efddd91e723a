"""Time that passes only when nobody has anything to do: an event loop for tests of everything that waits.

A test decorated with `virtual` takes no longer for the hours in it, sees every deadline at its very moment, and runs
the same way every time. When everybody waits and no timer is set it fails at once, since nothing could ever happen
again. Nothing in it may wait for sockets, threads or processes.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

Given = ParamSpec("Given")

START_SECONDS = 1000.0


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._timeline = _Timeline()
        super().__init__(self._timeline)

    def time(self) -> float:
        return self._timeline.now

    def stand_still(self, seconds: float) -> None:
        """As if the whole process had been stopped for so long: what was due meanwhile is due now, in order."""
        self._timeline.now += seconds


def stand_still(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.stand_still(seconds)


class LoopClock:
    """The running loop's time, for what is given a `rorqual.clock.Clock`."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.monotonic()


def virtual(test: Callable[Given, Coroutine[Any, Any, None]]) -> Callable[Given, None]:
    """Run an async test on a loop of its own with virtual time."""

    @functools.wraps(test)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


class _Timeline(selectors.DefaultSelector):
    """The loop asks how long it may sleep; it is woken at once, that much later."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START_SECONDS

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits and no timer is set"
        self.now += max(timeout, 0.0)
        return super().select(0)
