"""What workers have computed is in Redis when they are gone: new ones go on from there, to the bit, and nothing that
happens to Redis harms a request."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from kvstore.store.contract import Kind
from kvstore.store.embedded import EmbeddedServer
from kvstore.store.names import parse_name
from rorqual.model_config import PAGE_TOKENS
from tests.harness.pools import Pools
from tests.harness.store_cluster import StoreCluster, started_cluster
from tests.harness.system import IDS_CONFIG, Served, make_checkpoint, wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

WORKER = ("--exact", "--pages", "24", "--slots", "4", "--prefill-tokens", "512", "--host-pages", "40")
PATIENT = ("--store-budget-ms", "3000")
PROMPT_PAGES = 4
LENGTH = PROMPT_PAGES * PAGE_TOKENS + 90

Answer = tuple[list[int], list[float]]


def a_prompt(seed: int, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(3, IDS_CONFIG["vocab_size"]), k=length)


def ask(
    system: Served, prompt: list[int], num_tokens: int = 6, *, key: str | None = None
) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were kept."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 1,
        "seed": 3,
        "temperature": 0.8,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with system.client(headers=headers) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return (choice["token_ids"], choice["logprobs"]["token_logprobs"]), cached


WRITTEN = ("rorqual_worker_store_values_written", "rorqual_worker_store_values_present")


def written(worker: str, pools: Pools, *, least: int) -> None:
    """Wait until so many values of this worker are in the store."""
    wait_until(lambda: sum(pools[worker].metrics()[name] for name in WRITTEN) >= least, seconds_max=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="stored")


@pytest.fixture(scope="module")
def expected(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[list[int]], Answer]]:
    """From a worker that keeps nothing."""
    pools = Pools(model, tmp_path_factory.mktemp("off"), *WORKER[:-2], "--prefix-cache", "off")
    try:
        pools.start("both")
        pools.start_router()
        yield lambda prompt: ask(pools, prompt)[0]
    finally:
        pools.close()


@pytest.fixture
def redis() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(memory_bytes=256 << 20) as server:
        yield server


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Pools]]:
    started: list[Pools] = []

    def make(
        url: str, *roles: str, options: tuple[str, ...] = PATIENT, router: tuple[str, ...] = ()
    ) -> Pools:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        pools = Pools(model, folder, *WORKER, *options, transfer="shm", environment={"RORQUAL_STORE": url})
        started.append(pools)
        for role in roles or ("both",):
            pools.start(role)  # type: ignore[arg-type]
        pools.start_router(*router)
        return pools

    yield make
    for pools in started:
        pools.close()


ROLES = pytest.mark.parametrize("roles", [("both",), ("prefill", "decode")])


@ROLES
def test_after_all_workers_were_killed_a_prompt_comes_from_the_store(
    roles: tuple[str, ...],
    redis: EmbeddedServer,
    start: Callable[..., Pools],
    expected: Callable[[list[int]], Answer],
) -> None:
    prompt = a_prompt(1)
    check_after_kill(start(redis.url, *roles), roles, prompt, expected(prompt))


@pytest.mark.minutes
@ROLES
def test_after_all_workers_were_killed_a_prompt_comes_from_a_cluster_of_three_whose_slots_move(
    roles: tuple[str, ...], start: Callable[..., Pools], expected: Callable[[list[int]], Answer]
) -> None:
    prompt, other = a_prompt(1), a_prompt(2)
    with started_cluster() as cluster:
        pools = start(cluster.url, *roles)
        check_after_kill(pools, roles, prompt, expected(prompt))
        assert sum(client.dbsize() > 0 for client in cluster.clients) >= 2, "the pages spread"
        # The workers know the servers by now; what they write last lies somewhere else when others look for it.
        before = names_of(cluster)
        assert ask(pools, other)[0] == expected(other)
        wait_until(lambda: has_whole_prompt(names_of(cluster) - before), seconds_max=30)
        for role in roles:
            pools.kill(f"{role}-0")  # and all of what they kept with them
        pools.heal()
        assert ask(pools, a_prompt(3, 40))[1] == 0  # they have found the servers
        for source, client in enumerate(cluster.clients):
            for name in [name for name in client.scan_iter() if name not in before]:
                target = (source + 1) % len(cluster.clients)
                cluster.begin_move(name, source=source, target=target)
                for same in client.execute_command("CLUSTER", "GETKEYSINSLOT", key_slot(name), 100):
                    cluster.move_value(same, source=source, target=target)
                cluster.end_move(name, target=target)
                before.add(name)
        again, cached = ask(pools, other)
        assert again == expected(other)
        assert cached == PROMPT_PAGES * PAGE_TOKENS
        pools.wait_until_idle()


def names_of(cluster: StoreCluster) -> set[bytes]:
    return {name for client in cluster.clients for name in client.scan_iter()}


def has_whole_prompt(names: set[bytes]) -> bool:
    kinds = Counter(found.key.kind for name in names if (found := parse_name(name)) is not None)
    return kinds[Kind.PAGE] >= PROMPT_PAGES and kinds[Kind.TAIL] >= 1


def check_after_kill(pools: Pools, roles: tuple[str, ...], prompt: list[int], right: Answer) -> None:
    first, cached = ask(pools, prompt)
    assert cached == 0
    computer = f"{roles[0]}-0"
    written(computer, pools, least=PROMPT_PAGES + 1)
    for role in roles:
        pools.kill(f"{role}-0")
    pools.heal()
    again, cached = ask(pools, prompt)
    assert first == again == right
    assert cached == PROMPT_PAGES * PAGE_TOKENS
    metrics = pools[computer].metrics()
    assert metrics["rorqual_worker_tokens_computed_total"] < PAGE_TOKENS
    assert metrics["rorqual_worker_store_values_read"] == PROMPT_PAGES + 1
    assert metrics["rorqual_worker_store_tokens_saved_total"] == PROMPT_PAGES * PAGE_TOKENS
    assert pools[computer].by_label("rorqual_worker_store_reads_total", "outcome") == {"read": 1}
    pools.wait_until_idle()
