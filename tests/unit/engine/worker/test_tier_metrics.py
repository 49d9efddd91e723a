"""Where the pages of prompts came from, as a worker tells it: one name for all tiers."""

from __future__ import annotations

from fake_state import PAGE_TOKENS
from fake_store import FakeStore

from tests.harness.benches import a_prompt
from tests.harness.storing import Asked, StoringWorker, a_worker
from tests.harness.virtual import virtual

PAGES = 4
ASKED = Asked(prompt=tuple(a_prompt(1, PAGES * PAGE_TOKENS + 90)), max_tokens=5)


def told(worker: StoringWorker, what: str) -> dict[str, float]:
    registry, name = worker.host.metrics.registry, f"rorqual_worker_tier_{what}"
    found = {tier: registry.get_sample_value(name, {"tier": tier}) for tier in ("device", "host", "store")}
    return {tier: value for tier, value in found.items() if value is not None}


@virtual
async def test_a_page_that_comes_all_the_way_up_is_a_hit_of_each_tier() -> None:
    store = FakeStore()
    async with a_worker(store) as worker:
        await worker.answers(ASKED)
        await worker.rest()
        assert told(worker, "pages_hit") == {"device": 0, "host": 0, "store": 0}
        assert told(worker, "pages_missed") == {"device": PAGES, "host": PAGES, "store": PAGES}
        await worker.answers(ASKED)
        assert told(worker, "pages_hit") == {"device": PAGES, "host": 0, "store": 0}
    async with a_worker(store) as worker:
        await worker.answers(ASKED)
        await worker.rest()
        assert told(worker, "pages_hit") == {"device": PAGES, "host": PAGES, "store": PAGES}
        assert told(worker, "pages_missed") == {"device": 0, "host": 0, "store": 0}
        for what in ("pages", "tails", "bytes"):
            kept = told(worker, what)
            assert set(kept) == {"device", "host"}, "what a store holds is its servers' to tell"
            assert all(kept.values())


@virtual
async def test_what_a_tier_gives_up_is_its_own() -> None:
    async with a_worker(FakeStore(), num_pages=9) as worker:
        for seed in range(3):
            await worker.answers(Asked(prompt=tuple(a_prompt(seed, 6 * PAGE_TOKENS)), max_tokens=3))
        await worker.rest()
        evicted = told(worker, "pages_evicted")
        assert evicted["device"] >= 6
        assert evicted["host"] == 0
