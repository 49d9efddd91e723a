"""Real processes for the tests of this folder: started with a parent to die with, and always ended.

Two kinds: single processes over a fake rank, one for each test, and whole systems on real checkpoints
(`tests.harness.system`), which many tests share since they take seconds to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rorqual.demo import CONFIG
from tests.harness.failures import NUM_TOKENS, PROMPT, start_two_of_each
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, TEXT_CONFIG, System, make_checkpoint

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
    (folder / "config.json").write_text(json.dumps(CONFIG))
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
        defaults = [
            "--model",
            str(model_dir),
            "--pages",
            "16",
            "--slots",
            "4",
            "--ready-file",
            str(ready_file),
        ]
        return await start_process(*command, "--", *defaults, *options, ready_file=ready_file)

    return start


@pytest.fixture(scope="session")
def ids_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="whale")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, as quantised as the release, with the real tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return make_checkpoint(folder, TEXT_CONFIG, name="orca", weights="quantised", tokenizer=True)


StartSystem = Callable[..., System]


@pytest.fixture(scope="module")
def start_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartSystem]:
    """Starts a system for the tests of a module. At their end it must be whole, and end without a trace."""
    systems: list[System] = []

    def start(model: Path, *options: str) -> System:
        systems.append(System(model, tmp_path_factory.mktemp("system"), *options))
        return systems[-1]

    yield start
    _close(systems)


@pytest.fixture(scope="session")
def text_system(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for everything that needs text. Its pages are few: many sequences at once must preempt."""
    options = ("--both", "1", "--pages", "8", "--numerics", "float32")
    system = System(text_model, tmp_path_factory.mktemp("system"), *options)
    yield system
    _close([system])


def _close(systems: list[System]) -> None:
    """All of them, whatever the first of them has to complain about."""
    failures: list[Exception] = []
    for system in systems:
        try:
            system.close()
        except (AssertionError, OSError) as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup("systems did not end well", failures)


@pytest.fixture(scope="session")
def two_of_each(ids_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """What the failure tests do harm to, and make whole again: see `tests.harness.failures`."""
    pools = start_two_of_each(ids_model, tmp_path_factory.mktemp("pools"))
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def expected(two_of_each: Pools) -> list[int]:
    """Of an answer to `tests.harness.failures.PROMPT`, the first `NUM_TOKENS`."""
    (choice,) = two_of_each.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"]
    return choice["token_ids"]
