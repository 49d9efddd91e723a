"""More long sequences than a worker's pages hold, over real processes: they spill, nobody is preempted, and no bit of
an answer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rorqual.model_config import PAGE_TOKENS
from tests.harness.repeating import Answer, a_prompt, ask
from tests.harness.system import IDS_CONFIG, System, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

TINY = ("--exact", "--slots", "4", "--prefill-tokens", "512")
SMALL = ("--pages", "24", "--host-pages", "40")
HOT = ("--hot-buffers", "3", "--hot-rows", "64", "--thin-pages", "20")
ROLES = {"both": ("--both", "1"), "split": ("--prefill", "1", "--decode", "1")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="tiers")


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., System]]:
    started: list[System] = []

    def make(*options: str) -> System:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(System(model, folder, *options))
        return started[-1]

    yield make
    for system in started:
        system.close()


def answers_of(system: System) -> list[Answer]:
    prompts = [a_prompt(seed, 4 * PAGE_TOKENS + 61 * seed) for seed in range(4)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: ask(system, prompt, 300)[0], prompts))
    system.wait_until_idle()
    return found


@pytest.mark.parametrize("roles", ROLES)
def test_long_sequences_spill_rather_than_wait_and_answer_to_the_bit(
    roles: str, start: Callable[..., System]
) -> None:
    expected = answers_of(start("--both", "1", *TINY, "--prefix-cache", "off"))
    system = start(*ROLES[roles], *TINY, *SMALL, *HOT)
    assert answers_of(system) == expected
    metrics = system.metrics()
    assert metrics["rorqual_worker_hisparse_spills"] >= 1
    assert metrics["rorqual_worker_hisparse_rows"] > 1000
    assert metrics["rorqual_worker_hisparse_sequences"] == 0
    assert metrics["rorqual_worker_hisparse_host_pages"] == 0
    assert metrics["rorqual_worker_preemptions"] == 0
