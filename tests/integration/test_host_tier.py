"""Conversations that do not fit into a worker's device, over real processes: they come back from host memory, computed
once, and change no bit of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rorqual.model_config import PAGE_TOKENS
from tests.harness.repeating import Answer, a_prompt, ask
from tests.harness.system import IDS_CONFIG, System, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

TINY = ("--exact", "--pages", "7", "--slots", "2", "--prefill-tokens", "512")
HOST = ("--host-pages", "40")
ROLES = {"both": ("--both", "1"), "split": ("--prefill", "1", "--decode", "1")}


def converse(system: System) -> Iterator[tuple[Answer, int, int]]:
    """Three conversations in turns, none of which leaves room for another: each answer, the tokens of its history, and
    those of them that were kept."""
    histories = {seed: a_prompt(seed, 3 * PAGE_TOKENS + 40 * seed) for seed in range(3)}
    for turn in range(3):
        for seed, history in histories.items():
            answer, cached = ask(system, history, 30)
            yield answer, len(history), cached
            history += answer[0] + a_prompt(10 * turn + seed, 60)
    system.wait_until_idle()


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


@pytest.mark.parametrize("roles", ROLES)
def test_conversations_that_do_not_fit_come_back_from_host_memory_to_the_bit(
    roles: str, start: Callable[..., System]
) -> None:
    plain = start("--both", "1", *TINY, "--prefix-cache", "off")
    expected = [answer for answer, _, _ in converse(plain)]
    system = start(*ROLES[roles], *TINY, *HOST)
    num_wanted = 0
    for number, (answer, num_tokens, cached) in enumerate(converse(system)):
        assert answer == expected[number], f"answer {number}"
        if number < 3:
            assert cached == 0
        else:
            assert cached >= 3 * PAGE_TOKENS, f"answer {number}: {cached} of {num_tokens} tokens"
        num_wanted += num_tokens - cached + 30 - 1
    metrics = system.metrics()
    assert metrics["rorqual_worker_tokens_computed_total"] == num_wanted
    assert metrics["rorqual_worker_host_pages_hit"] >= 6 * 2
    assert metrics["rorqual_worker_host_tails_hit"] >= 6
    assert metrics["rorqual_worker_host_pages_evicted"] == 0
    assert 0 < metrics["rorqual_worker_copy_seconds_total"] < 1


def test_without_host_memory_they_are_computed_again(start: Callable[..., System]) -> None:
    """What the other test asks for is not there by itself."""
    system = start("--both", "1", *TINY)
    assert [cached for _, _, cached in converse(system)] == [0] * 9
