"""A router that is killed, told to stop, or loses a worker, over eight workers that keep all they have room for: it
knows again what they keep, and nothing of the requests it took along stays held. Real processes, fake ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_state import REBUILD_TOKENS

from rorqual.demo import CONFIG
from rorqual.model_config import PAGE_TOKENS
from tests.harness.pools import Member, Pools
from tests.harness.restarting import Load, Watch, a_body, a_document, the_answer
from tests.harness.system import SECONDS_MAX, wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(240)]

NUM_PAGES = 8000
NUM_PAGES_MIN = 7500  # kept by each worker, before anything is killed
DOCUMENT_PAGES = 250
NUM_DOCUMENTS = 128  # four workers' pages in each role
NUM_DOCUMENTS_MAX = 200
LOAD_PAGES_MAX = 40
NUM_STREAMS = 6
EXACT_SECONDS_MAX = 10.0  # a quiet machine takes less than 2
LOST_SECONDS_MAX = 5.0
RETURN_SECONDS_MAX = 40.0  # the longest lease, of pages that a killed worker was reading

WORKERS = ("--pages", str(NUM_PAGES), "--slots", "8", "--records", "64", "--prefill-tokens", "16384")
LEASES = ("--transfer-seconds", "1", "--lease-seconds", "3")
FAKE = ("--step-ms", "10", "--positions-max", str(65536))


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Those that were asked, oldest first: the newest are kept."""
    return []


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> Iterator[Pools]:
    folder = tmp_path_factory.mktemp("restarts")
    model = folder / "a-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    pools = Pools(model, folder, *WORKERS, *LEASES, fake=FAKE, transfer="auto")
    try:
        members = [*pools.add("prefill", 4), *pools.add("decode", 4)]
        for member in members:
            member.start()
        for member in members:
            member.wait_until_ready()
        pools.start_router()
        pools.restart("router", "--placement", "round_robin")
        fill(pools, documents)
        pools.restart("router")
        yield pools
    finally:
        pools.close()


@pytest.fixture
def watch(pools: Pools) -> Iterator[Watch]:
    watch = Watch(pools)
    yield watch
    watch.close()


def fill(pools: Pools, documents: list[list[int]]) -> None:
    """Until every worker keeps nearly all it has room for."""
    began, watch = time.monotonic(), Watch(pools)
    with ThreadPoolExecutor(4) as threads:
        while len(documents) < NUM_DOCUMENTS or min(watch.kept().values()) < NUM_PAGES_MIN:
            assert len(documents) < NUM_DOCUMENTS_MAX, watch.kept()
            first = len(documents)
            more = [
                a_document(number, DOCUMENT_PAGES * PAGE_TOKENS + 10) for number in range(first, first + 8)
            ]
            list(threads.map(lambda prompt: ask(pools, prompt), more))
            documents += more
    print(f"filled with {len(documents)} documents in {time.monotonic() - began:.0f} s: {watch.kept()}")
    watch.close()


def ask(pools: Pools, prompt: list[int]) -> int:
    """How many tokens of the prompt were kept. The answer is checked."""
    body = a_body(prompt, max_tokens=3, seed=11)
    with pools.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["token_ids"] == the_answer(body)
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def under_load(pools: Pools, documents: list[list[int]], *, seed: int) -> Load:
    """With streams in flight."""
    load = Load(pools, documents[-32:], num_streams=NUM_STREAMS, pages_max=LOAD_PAGES_MAX, seed=seed)
    wait_until(
        lambda: load.check() is None and load.outcomes["right"] >= 2 * NUM_STREAMS, seconds_max=SECONDS_MAX
    )
    return load


def ready_at(member: Member) -> float:
    """When it has written its ready file, by the wall clock."""
    member.wait_until_ready()
    return member.ready_file.stat().st_mtime


def settle(pools: Pools, load: Load, watch: Watch, *, num_more: int = 2 * NUM_STREAMS) -> None:
    """A few more answers; then nothing is held but what is kept, and the picture is exact by its digests."""
    enough = load.outcomes["right"] + num_more
    wait_until(lambda: load.check() is None and load.outcomes["right"] >= enough, seconds_max=SECONDS_MAX)
    outcomes = load.stop()
    print(f"outcomes: {dict(outcomes)}, errors: {dict(load.errors)}")
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)
    watch.check_by_digests(seconds_max=20.0)


def check_cached(pools: Pools, documents: list[list[int]]) -> None:
    """Of documents that were asked before no more is computed than a rebuild is worth."""
    for number, document in enumerate(documents[-4:]):
        prompt = [*document[: 30 * PAGE_TOKENS], 5 + number]
        assert ask(pools, prompt) >= 30 * PAGE_TOKENS - REBUILD_TOKENS


def test_a_router_killed_under_load_knows_soon_again_what_all_workers_keep(
    pools: Pools, documents: list[list[int]], watch: Watch
) -> None:
    load = under_load(pools, documents, seed=1)
    router = pools["router"]
    pools.kill("router")
    router.start()
    seconds = watch.exact_after(ready_at(router), seconds_max=EXACT_SECONDS_MAX)
    print(f"exact {max(seconds.values()):.2f} s after the ready file: {sum(watch.kept().values()):.0f} pages")
    settle(pools, load, watch)
    assert load.outcomes["cut"] > 0, "no stream was in flight"
    assert not load.outcomes["failed"], load.errors
    assert min(watch.kept().values()) >= NUM_PAGES_MIN
    check_cached(pools, documents)


def test_a_router_told_to_stop_ends_its_streams_well_and_the_next_one_knows_all(
    pools: Pools, documents: list[list[int]], watch: Watch
) -> None:
    load = under_load(pools, documents, seed=2)
    router = pools["router"]
    assert not router.terminate()
    assert not router.end()
    assert not {"cut", "failed"} & load.outcomes.keys(), load.errors
    router.start()
    seconds = watch.exact_after(ready_at(router), seconds_max=EXACT_SECONDS_MAX)
    print(f"exact {max(seconds.values()):.2f} s after the ready file")
    settle(pools, load, watch)
    assert not {"cut", "failed"} & load.outcomes.keys(), load.errors
    assert min(watch.kept().values()) >= NUM_PAGES_MIN
    check_cached(pools, documents)


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
def test_of_a_worker_that_is_killed_nothing_is_known_at_once_and_of_its_next_life_all(
    pools: Pools, documents: list[list[int]], watch: Watch, name: str
) -> None:
    pools.restart("router", "--placement", "round_robin")  # so that each has streams, and its next life too
    load = under_load(pools, documents, seed=3)
    worker = pools[name]
    before = watch.known()
    assert before[worker.address] >= NUM_PAGES_MIN
    pools.kill(name)
    killed_at = time.monotonic()
    wait_until(lambda: not watch.known()[worker.address], seconds_max=LOST_SECONDS_MAX)
    print(f"{name} counted as empty {time.monotonic() - killed_at:.3f} s after it was gone")
    known = watch.known()
    assert all(known[address] for address in before.keys() - {worker.address})
    pools.restart(name)
    assert watch.known()[worker.address] < NUM_PAGES_MIN  # of this life alone
    settle(pools, load, watch, num_more=4 * NUM_STREAMS)
    assert 0 < watch.known()[worker.address] < NUM_PAGES_MIN
    pools.restart("router")
    assert sum(ask(pools, document[: 30 * PAGE_TOKENS]) for document in documents[-4:]) > 0
