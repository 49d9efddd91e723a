"""A few threads on which long prompts are encoded, so that the event loop goes on serving the others.

Owned by `router.prompt.PromptEncoder`. The queue is bounded by number and by characters: what does not fit is
refused at once with Overloaded. Waiting is bounded too; work that was given up before it began is not done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from rorqual.errors import Overloaded, StageTimedOut

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    num_threads: int = 2
    jobs_max: int = 256
    # 64 Mi characters are a minute's work of one thread (about 1.2 M characters a second).
    chars_max: int = 64 << 20
    seconds_max: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    num_jobs: int  # waiting and running
    chars_inflight: int
    num_refused: int


class EncodePool:
    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(config.num_threads, thread_name_prefix="encode")
        self._lock = threading.Lock()
        self._num_jobs = 0
        self._chars_inflight = 0
        self._num_refused = 0

    async def run(self, work: Callable[[], Result], *, num_chars: int) -> Result:
        """Do `work` on a thread. Raises Overloaded if the queue is full, StageTimedOut after `seconds_max`."""
        self._enter(num_chars)
        future = self._submit(work, num_chars)
        try:
            async with asyncio.timeout(self._config.seconds_max):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise StageTimedOut(
                f"encoding the prompt took longer than {self._config.seconds_max:g} s"
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and task is not None and not task.cancelling():
                raise _shutting_down() from None  # `close` gave the work up; nobody cancelled the caller
            raise

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                num_jobs=self._num_jobs, chars_inflight=self._chars_inflight, num_refused=self._num_refused
            )

    def close(self) -> None:
        """Give up what has not begun and wait for what has (at most one prompt a thread). Blocks: on a loop
        use `aclose`."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def aclose(self) -> None:
        """As close; the loop goes on meanwhile. A thread cannot be interrupted, so this has no deadline but
        the length of a prompt."""
        await asyncio.to_thread(self.close)

    def _enter(self, num_chars: int) -> None:
        with self._lock:
            full = self._num_jobs >= self._config.jobs_max
            # A single text of any size may go in when nothing else is there.
            if full or (self._num_jobs and self._chars_inflight + num_chars > self._config.chars_max):
                self._num_refused += 1
                raise Overloaded(
                    f"{self._num_jobs} prompts are already waiting to be encoded; try again later"
                )
            self._num_jobs += 1
            self._chars_inflight += num_chars

    def _submit(self, work: Callable[[], Result], num_chars: int) -> Future[Result]:
        try:
            future = self._threads.submit(work)
        except RuntimeError:
            self._leave(num_chars)
            raise _shutting_down() from None
        # Also called for a job that was cancelled before it began.
        future.add_done_callback(lambda _done: self._leave(num_chars))
        return future

    def _leave(self, num_chars: int) -> None:
        with self._lock:
            self._num_jobs -= 1
            self._chars_inflight -= num_chars
        assert self._num_jobs >= 0
        assert self._chars_inflight >= 0


def _shutting_down() -> Overloaded:
    return Overloaded("the router is shutting down")
