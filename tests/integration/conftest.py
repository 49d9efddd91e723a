"""Real processes for the tests of this folder: started with a parent to die with, and always ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

FAKE_WORKER = Path(__file__).parents[1] / "fakes" / "fake_worker.py"


class Process:
    def __init__(self, process: asyncio.subprocess.Process, ready_file: Path) -> None:
        self.process = process
        self.ready_file = ready_file

    async def ready(self) -> dict[str, Any]:
        """What it wrote once it was ready; its output if it has ended instead."""
        while not self.ready_file.exists():
            if self.process.returncode is not None:
                raise AssertionError((await self.ended())[1])
            await asyncio.sleep(0.01)
        return json.loads(self.ready_file.read_text())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> tuple[int, str]:
        """Its exit status, once it has one, and all it wrote."""
        output, _ = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, output.decode()


Start = Callable[..., Any]


@pytest_asyncio.fixture
async def start_process(tmp_path: Path) -> AsyncIterator[Start]:
    processes: list[Process] = []

    async def start(*command: str, ready_file: Path) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        processes.append(Process(process, ready_file))
        return processes[-1]

    async with asyncio.timeout(60):
        yield start
    for process in processes:
        if process.process.returncode is None:
            process.process.kill()
        await process.process.communicate()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def start_worker(start_process: Start, model_dir: Path, tmp_path: Path) -> Start:
    """A real worker process over a fake rank process."""
    number = 0

    async def start(*options: str, fail: str | None = None, fake: tuple[str, ...] = ()) -> Process:
        nonlocal number
        number += 1
        ready_file = tmp_path / f"worker-{number}.json"
        command = [str(FAKE_WORKER), "--parent", str(os.getpid()), *fake]
        if fail:
            command += ["--fail", fail]
        defaults = ["--model", str(model_dir), "--pages", "16", "--slots", "4", "--ready-file", str(ready_file)]
        return await start_process(*command, "--", *defaults, *options, ready_file=ready_file)

    return start
