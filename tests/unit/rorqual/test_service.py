"""The edges of a process: addresses, ready files, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.service import (
    StopSignals,
    end_task,
    format_address,
    parse_address,
    remove_ready_file,
    until_first,
    write_ready_file,
)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:65535", "[::1]:80", "a-b.c:9"])
def test_an_address_reads_back_as_it_was_written(text: str) -> None:
    assert format_address(*parse_address(text, option="--http")) == text


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "host", "host:", "host:x", "host:65536", "::1:80", "a b:1"]
)
def test_what_is_no_address_is_refused_by_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--http must be HOST:PORT"):
        parse_address(text, option="--http")


def test_a_ready_file_appears_whole_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, {"pid": 5})
    assert json.loads(path.read_text()) == {"pid": 5}
    assert list(tmp_path.iterdir()) == [path]
    remove_ready_file(path)
    remove_ready_file(path)
    remove_ready_file(None)
    assert list(tmp_path.iterdir()) == []


def test_a_ready_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ready-file: .* cannot be written: No such file"):
        write_ready_file(tmp_path / "absent" / "ready.json", {})


async def test_the_first_signal_stops_and_the_second_hurries() -> None:
    signals = StopSignals()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signals.stop.wait(), 5)
        assert not signals.hurry.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(signals.hurry.wait(), 5)
    finally:
        signals.close()


async def fail(error: Exception, *, after: float = 0.0) -> None:
    await asyncio.sleep(after)
    raise error


async def fail_when_cancelled() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise ValueError("could not clean up")


async def test_what_fails_while_waited_for_is_raised_and_the_others_are_cancelled() -> None:
    with pytest.raises(AssertionError, match="broken"):
        await until_first(fail(AssertionError("broken")), asyncio.Event().wait())
    with pytest.raises(ValueError, match="could not clean up"):
        await until_first(fail_when_cancelled(), asyncio.sleep(0.01))
    assert len(asyncio.all_tasks()) == 1


async def test_a_failed_task_of_the_caller_stays_the_callers_to_look_at() -> None:
    task = asyncio.create_task(fail(ValueError("mine")))
    await until_first(task, asyncio.Event().wait())
    with pytest.raises(ValueError, match="mine"):
        task.result()


async def test_waiting_for_the_first_cancels_its_own_waits_and_leaves_tasks_alone() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    forever = asyncio.Event()
    await until_first(task, forever.wait(), asyncio.sleep(0))
    assert not task.done()
    await end_task(task)
    assert task.cancelled()
    assert len(asyncio.all_tasks()) == 1
