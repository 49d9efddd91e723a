"""One worker of a prefill and a decode worker is killed, and the other lives: what the living one keeps and what the
store has are used together, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.store.embedded import EmbeddedServer
from rorqual.model_config import PAGE_TOKENS
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, make_checkpoint
from tests.integration.test_store_tier import PATIENT, PROMPT_PAGES, WORKER, a_prompt, ask, written

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="stored")


@pytest.fixture
def pools(model: Path, tmp_path: Path) -> Iterator[Pools]:
    with EmbeddedServer(memory_bytes=256 << 20) as server:
        system = Pools(
            model, tmp_path, *WORKER, *PATIENT, transfer="shm", environment={"RORQUAL_STORE": server.url}
        )
        try:
            system.start("prefill")
            system.start("decode")
            system.start_router()
            yield system
        finally:
            system.close()


@pytest.mark.parametrize("killed", ["prefill-0", "decode-0"])
def test_when_one_of_two_workers_was_killed_the_whole_prompt_is_still_kept(
    killed: str, pools: Pools, ask_without_cache: Callable[[list[int]], object]
) -> None:
    prompt = a_prompt(7)
    first, cached = ask(pools, prompt)
    assert cached == 0
    written("prefill-0", pools, least=PROMPT_PAGES + 1)
    pools.wait_until_idle()
    pools.kill(killed)
    pools.heal()
    again, cached = ask(pools, prompt)
    assert first == again == ask_without_cache(prompt)
    assert cached == PROMPT_PAGES * PAGE_TOKENS
    if killed == "prefill-0":
        # Its pages came from the decode worker, which has no tail, and the tail alone from the store.
        metrics = pools["prefill-0"].metrics()
        assert metrics["rorqual_worker_peer_pages_read_total"] == PROMPT_PAGES
        assert metrics["rorqual_worker_store_values_read"] == 1
        assert metrics["rorqual_worker_tokens_computed_total"] < PAGE_TOKENS
    pools.wait_until_idle()


@pytest.fixture
def ask_without_cache(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., object]]:
    """The answer of a worker that keeps nothing."""
    system = Pools(model, tmp_path_factory.mktemp("off"), *WORKER[:-2], "--prefix-cache", "off")
    try:
        system.start("both")
        system.start_router()
        yield lambda prompt: ask(system, prompt)[0]
    finally:
        system.close()
