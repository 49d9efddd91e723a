"""What a check says, and how checks are run: each with a deadline, none can hold up or end the others.

Used by everything in `rorqual.doctor`, and by `kvstore.checks`. It looks at nothing itself.
"""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rorqual.errors import RorqualError

_Result = TypeVar("_Result")


class Status(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. `cure` says what to do, if anything."""

    check: str
    status: Status
    found: str
    cure: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status=Status.OK, found=found)


def warn(check: str, found: str, cure: str) -> Finding:
    return Finding(check=check, status=Status.WARN, found=found, cure=cure)


def fail(check: str, found: str, cure: str) -> Finding:
    return Finding(check=check, status=Status.FAIL, found=found, cure=cure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    look: Callable[[], Coroutine[Any, Any, Sequence[Finding]]]
    seconds_max: float = 15.0


async def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """At once; findings in the order of the checks."""
    parts = await asyncio.gather(*(_run(check) for check in checks))
    return [finding for part in parts for finding in part]


async def in_thread(look: Callable[[], _Result]) -> _Result:
    """What may block. Its thread is a daemon: whoever waits may give up, and the process can end."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_Result] = loop.create_future()

    def settle(settle_it: Callable[[], None]) -> None:
        if not result.done():
            settle_it()

    def work() -> None:
        try:
            value = look()
        except (RorqualError, OSError, ValueError, KeyError, TypeError, ImportError) as error:
            told = error
            _call(loop, lambda: settle(lambda: result.set_exception(told)))
        else:
            _call(loop, lambda: settle(lambda: result.set_result(value)))

    threading.Thread(target=work, daemon=True).start()
    return await result


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(what)


async def _run(check: Check) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(check.seconds_max):
            return await _awaited(check.look())
    except TimeoutError:
        return [
            fail(
                check.name,
                f"no answer within {check.seconds_max:g} s",
                "see whether what it asks stands still",
            )
        ]
    except (RorqualError, OSError, ValueError, KeyError, TypeError, ImportError) as error:
        return [fail(check.name, f"{type(error).__name__}: {error}", "see the text")]


async def _awaited(findings: Awaitable[Sequence[Finding]]) -> Sequence[Finding]:
    return await findings
