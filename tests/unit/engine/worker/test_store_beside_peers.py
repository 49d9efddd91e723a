"""A store and another worker that are read for one prompt at once, whichever of the two is slower."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fake_state import PAGE_TOKENS, Slot, page_digests
from fake_store import FakeStore

from engine.worker.cache.prefix_cache import PageFacts
from engine.worker.events import SequenceKey
from engine.worker.role import BothRole
from kvstore.store.contract import tenant_label
from rorqual.sampling import SamplingParams
from rorqual.session import Open
from tests.harness.benches import a_prompt
from tests.harness.storing import Asked, Heard, StoringWorker, a_worker
from tests.harness.virtual import virtual

ASKED = Asked(prompt=tuple(a_prompt(1, 4 * PAGE_TOKENS + 90)), max_tokens=5)


class PagesFromAPeer(BothRole):
    """The prompt's four pages, without a tail, come after some seconds, or never come."""

    def __init__(self, worker: StoringWorker, *, seconds: float, is_lost: bool) -> None:
        self.worker, self.seconds, self.is_lost = worker, seconds, is_lost

    def fetches(self, command: Open) -> bool:
        return True

    def opened(self, key: SequenceKey, command: Open, *, fetching: bool) -> None:
        scheduler, rank = self.worker.host.scheduler, self.worker.rank
        assert scheduler.cache is not None
        keys = scheduler.cache.keys_of(np.array(ASKED.prompt, dtype=np.int32), salt="")[:4]
        item = scheduler.imports.begin(keys, with_record=False)
        assert item is not None
        slot = Slot(
            tokens=list(ASKED.prompt),
            num_prompt=len(ASKED.prompt),
            sampling=SamplingParams(seed=0),
            tokens_max=len(ASKED.prompt),
        )
        slot.compute(len(ASKED.prompt))

        def end() -> None:
            facts: list[PageFacts] = []
            if not self.is_lost:
                for page, rows in zip(item.pages, slot.rows, strict=False):
                    rank.memory[page] = rows
                    facts.append(PageFacts(digests=page_digests(rows), tenant=tenant_label("")))
            scheduler.imports.end(item, facts=facts)
            scheduler.fetched(key)

        asyncio.get_running_loop().call_later(self.seconds, self.worker.host.enqueue, end)


@pytest.mark.parametrize("seconds", [0.0005, 0.05, 2.0])
@virtual
async def test_what_a_peer_gives_and_what_the_store_gives_are_used_together(seconds: float) -> None:
    first, heard = await _answers(seconds=seconds, is_lost=False)
    assert heard.num_cached == 4 * PAGE_TOKENS
    assert heard.tokens == first.tokens


@pytest.mark.parametrize("seconds", [0.0005, 0.05, 2.0])
@virtual
async def test_a_peer_that_is_lost_leaves_nobody_waiting(seconds: float) -> None:
    first, heard = await _answers(seconds=seconds, is_lost=True)
    assert heard.num_cached in (0, 4 * PAGE_TOKENS)  # the store may be asked for all of it, if there is time
    assert heard.tokens == first.tokens
    assert heard.seconds < seconds + 1


async def _answers(*, seconds: float, is_lost: bool) -> tuple[Heard, Heard]:
    """Of a worker that computes and writes the prompt, and of one after it beside a peer."""
    store = FakeStore()
    async with a_worker(store) as worker:
        first = await worker.answers(ASKED)
        await worker.rest()
    async with a_worker(store) as worker:
        worker.host._handler = PagesFromAPeer(worker, seconds=seconds, is_lost=is_lost)
        heard = await worker.answers(ASKED)
        await worker.rest()
    return first, heard
