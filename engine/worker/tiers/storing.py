"""Puts together what a worker needs to use a store: for `engine.worker.process`, once its rank is ready."""

from __future__ import annotations

import logging

from engine.plan import RankReady
from engine.worker.options import StoreOptions
from engine.worker.tiers.store_metrics import StoreMetrics
from engine.worker.tiers.store_tier import DIGEST_BYTES, TAIL_FACTS_BYTES, StoreTier, StoreTierConfig
from kvstore.store.redis_store import RedisStore, StoreConfig
from kvstore.store.value import Form
from kvstore.transfer.contract import ByteArray, TransferError
from kvstore.transfer.memory import map_segments
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError
from rorqual.session import Role
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


def make_store_tier(
    options: StoreOptions, ready: RankReady, *, role: Role, metrics: StoreMetrics
) -> StoreTier | None:
    """None, with a line in the log, where there is nothing to keep. Raises RorqualError."""
    if not ready.page_bytes or not ready.num_host_pages:
        log.info("uses no store %s", fields(reason="the state of this model has no pages"))
        return None
    pages, records = _map_host_memory(ready)
    clock = SystemClock()
    config = StoreConfig(
        url=options.url,
        form=Form(ready.wire_id, ready.model_fingerprint),
        page_bytes=ready.page_bytes + ready.num_page_components * DIGEST_BYTES,
        tail_bytes_max=ready.record_bytes + TAIL_FACTS_BYTES,
        ttl_seconds=options.ttl_seconds,
        tenant_bytes_max=options.tenant_bytes_max,
    )
    store = RedisStore(config, clock=clock, observe_read_seconds=metrics.read_seconds.observe)
    metrics.watch(store.counts, lambda: store.state)
    return StoreTier(
        StoreTierConfig(num_page_components=ready.num_page_components, budget_seconds=options.budget_seconds),
        store,
        run_store=store.run,
        flush=store.flush,
        pages=pages,
        records=records,
        clock=clock,
        metrics=metrics,
        # What a decode worker goes on from is read from the worker that has computed it.
        reads=role is not Role.DECODE,
    )


def _map_host_memory(ready: RankReady) -> tuple[ByteArray, ByteArray]:
    """Rows of pages and of records."""
    shared = ready.host_memory
    assert shared is not None, "the rank shares no host memory"
    shapes = [(ready.num_host_pages, ready.page_bytes), (ready.num_host_records, ready.record_bytes)]
    sizes = [count * size for count, size in shapes]
    try:
        arrays = map_segments(
            shared.metadata, agent=shared.agent, sizes=[size for size in sizes if size], writable=True
        )
    except TransferError as error:
        raise RorqualError(f"the rank's host memory: {error}") from None
    pages, records = arrays[0], arrays[1] if sizes[1] else arrays[0][:0]
    return pages.reshape(shapes[0]), records.reshape(shapes[1])
