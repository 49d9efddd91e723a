"""Nothing that happens to a store harms a request: over `rorqual up`, with a real server behind a proxy, while prompts
are asked two at a time. Beside each stands the same prompt on a system without a store, whose tokens are the right
ones, and whose time until the first of them is what a fault may add a budget to. Then everything is as it was."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from rorqual.model_config import PAGE_TOKENS
from tests.harness.harming import (
    HarmedStore,
    Heard,
    hear_all,
    median_seconds,
    num_files,
    store_metric,
    wait_until_found,
    wait_until_written,
)
from tests.harness.repeating import a_prompt
from tests.harness.system import IDS_CONFIG, System, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

ONE, OTHER = "key-of-one", "key-of-the-other"
OPTIONS = ("--exact", "--pages", "40", "--slots", "4", "--prefill-tokens", "512", "--host-pages", "60")
OPTIONS += ("--api-key", ONE, "--api-key", OTHER, "--transfer", "shm")
ROLES = {"both": ("--both", "1"), "split": ("--prefill", "1", "--decode", "1")}

BUDGET_MS = 20
NOISE_SECONDS = 0.15
"""Of medians, on a busy machine."""

PROMPT_PAGES = 2
NUM_TOKENS = 4
ROUNDS = 4
NUM_STORED = 72
FILES_MAX = 8
"""More open than at the start: four connections to a server, and what a scrape leaves for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    harm: Callable[[HarmedStore], None]
    seen: str  # the metric of a worker by which it has seen it
    labels: dict[str, str] = field(default_factory=dict)


FAULTS = {
    "values spoiled": Fault(harm=HarmedStore.spoil, seen="values_missed", labels={"reason": "corrupt"}),
    "replies cut off": Fault(harm=HarmedStore.cut, seen="values_missed", labels={"reason": "failed"}),
    "out of memory": Fault(harm=HarmedStore.fill_up, seen="write_pauses"),
    "another password": Fault(harm=HarmedStore.lock, seen="values_dropped"),
    "killed": Fault(harm=HarmedStore.kill, seen="values_dropped"),
    "frozen": Fault(harm=HarmedStore.freeze, seen="breakers_opened"),
}
"""In this order: a store that was found slow is asked now and then only, for a while."""

Start = Callable[..., System]


def prompts_of(seed: int, count: int) -> list[list[int]]:
    return [a_prompt(1000 * seed + number, PROMPT_PAGES * PAGE_TOKENS + 60) for number in range(count)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    model = make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="harmed")
    started: list[System] = []

    def make(*options: str) -> System:
        started.append(System(model, tmp_path_factory.mktemp("system"), *OPTIONS, *options))
        return started[-1]

    yield make
    for system in started:
        if system.process.poll() is None:
            system.close()


@pytest.fixture(scope="module")
def plain(start: Start) -> System:
    """It has no store, and computes everything that it was not asked before."""
    return start("--both", "1")


@pytest.fixture(scope="module")
def stored(start: Start) -> Iterator[tuple[HarmedStore, Iterator[list[int]]]]:
    """A store with what prompts left there whose worker has ended, and these prompts, each of them once."""
    with HarmedStore() as store:
        writer = start("--both", "1", "--redis", store.url)
        prompts = prompts_of(1, NUM_STORED)
        hear_all(writer, prompts, num_tokens=1, key=ONE)
        wait_until_written(writer)
        writer.close()
        store.keep()
        yield store, iter(prompts)


class Load:
    """A round is one prompt that is in the store and one that nobody has ever seen, at once."""

    def __init__(self, system: System, plain: System, stored: Iterator[list[int]], *, seed: int) -> None:
        self._system = system
        self._plain = plain
        self._stored = stored
        self._fresh = (a_prompt(number, PROMPT_PAGES * PAGE_TOKENS + 60) for number in itertools.count(seed))

    def run(self, *, rounds: int = ROUNDS) -> tuple[float, list[Heard]]:
        """By how many seconds a store, or its fault, delays the first token, and what was heard of it."""
        with_store: list[Heard] = []
        without: list[Heard] = []
        for _ in range(rounds):
            prompts = [next(self._stored), next(self._fresh)]
            with_store += hear_all(self._system, prompts, num_tokens=NUM_TOKENS, key=ONE)
            without += hear_all(self._plain, prompts, num_tokens=NUM_TOKENS, key=ONE)
        assert [item.tokens for item in with_store] == [item.tokens for item in without]
        return median_seconds(with_store) - median_seconds(without), with_store


@pytest.mark.parametrize("roles", ROLES)
def test_whatever_happens_to_the_store_prompts_are_answered_in_time(
    roles: str, start: Start, plain: System, stored: tuple[HarmedStore, Iterator[list[int]]]
) -> None:
    store, prompts = stored
    store.mend()
    system = start(*ROLES[roles], "--redis", store.url, "--store-budget-ms", str(BUDGET_MS))
    wait_until_found(system)
    load = Load(system, plain, prompts, seed=10_000 if roles == "both" else 20_000)
    healthy, heard = load.run()
    assert sum(item.num_cached >= PROMPT_PAGES * PAGE_TOKENS for item in heard) >= 1, "it reads what is there"
    wait_until_written(system)
    files, delays = num_files(system), {"none": healthy}
    for name, fault in FAULTS.items():
        before = store_metric(system, fault.seen, **fault.labels)
        fault.harm(store)
        delays[name], _ = load.run()
        assert store_metric(system, fault.seen, **fault.labels) > before, f"nobody saw it: {name}"
        store.mend()
        wait_until_found(system)
        wait_until_written(system)
        system.wait_until_idle()
        assert num_files(system) <= files + FILES_MAX, f"open after: {name}"
    print({what: f"{1000 * seconds:.0f} ms" for what, seconds in delays.items()})
    late = {what: seconds for what, seconds in delays.items() if seconds > BUDGET_MS / 1000 + NOISE_SECONDS}
    assert not late, f"{late} of {delays}"
    assert store.proxy.num_open <= 4 * len(system.worker_metrics)
    store.freeze()
    began = time.monotonic()
    system.close()
    assert time.monotonic() - began < 10, "a frozen store holds up no end"
    assert "did not stop in time" not in system.output()
    store.mend()


def test_with_a_wrong_password_at_the_start_prompts_are_computed(
    start: Start, plain: System, stored: tuple[HarmedStore, Iterator[list[int]]]
) -> None:
    store, prompts = stored
    store.mend()
    system = start("--both", "1", "--redis", store.url.replace("of-the-store", "of-nothing"))
    delay, heard = Load(system, plain, prompts, seed=30_000).run()
    print(f"{1000 * delay:.0f} ms")
    assert delay < BUDGET_MS / 1000 + NOISE_SECONDS
    assert not any(item.num_cached for item in heard)
    assert "of-nothing" not in system.output()
    assert "refuses the user or password" in system.output()
    system.wait_until_idle()


def test_host_memory_with_room_for_little_does_no_harm_and_tenants_share_nothing(
    start: Start, plain: System, stored: tuple[HarmedStore, Iterator[list[int]]]
) -> None:
    """Everything that is read or written passes through four pages, two sequences at once."""
    store, prompts = stored
    store.mend()
    system = start("--both", "1", "--redis", store.url, "--host-pages", "4", "--store-budget-ms", "3000")
    wait_until_found(system)
    prompt = next(prompts)
    (foreign,) = hear_all(system, [prompt], num_tokens=NUM_TOKENS, key=OTHER)
    assert foreign.num_cached == 0, "another tenant has computed it"
    (own,) = hear_all(system, [prompt], num_tokens=NUM_TOKENS, key=ONE)
    assert own.num_cached >= PAGE_TOKENS, "half of host memory is what one may be read into"
    assert foreign.tokens == own.tokens
    delay, _ = Load(system, plain, prompts, seed=40_000).run()
    print(f"{1000 * delay:.0f} ms")
    store.freeze()
    frozen, _ = Load(system, plain, prompts, seed=50_000).run()
    print(f"frozen: {1000 * frozen:.0f} ms")
    store.mend()
    wait_until_found(system)
    wait_until_written(system)
    system.wait_until_idle()
    assert store_metric(system, "connections") <= 4
    metrics = system.metrics()
    assert metrics["rorqual_worker_host_pages_evicted"] > 0, "its memory was full"
    assert delay < NOISE_SECONDS
    assert frozen < 2 * NOISE_SECONDS, "nobody waits longer than computing would take, whatever the budget"
