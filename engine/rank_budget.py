"""How many pages and records a rank holds, in its pools and in host memory: options and a model in, counts out.

Called by `engine.rank_process` before it allocates anything. `kvstore.budget` divides bytes; what is known here is
what the options mean, and how much of each is of use.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan import RankSettings
from kvstore.budget import TAIL_SHARE, Budget, divide
from kvstore.handover import record_bytes_max
from kvstore.hisparse import HotShape, divide_spilled, hot_shape
from kvstore.layout import Numerics, build_layout
from rorqual.errors import RorqualError
from rorqual.feed import CONTENT_ENTRIES_MAX
from rorqual.model_config import PAGE_TOKENS, ModelConfig

KV_BYTES_DEFAULT = 1 << 30


def device_budget(config: ModelConfig, numerics: Numerics, settings: RankSettings, *, drafts: bool) -> Budget:
    """Of the bytes for pages as many pages as they hold, and no more than all slots could ever use, or, where prefixes
    are kept, twice as many. Raises RorqualError when that is none."""
    layout = build_layout(config, numerics)
    kv_bytes = settings.kv_bytes or KV_BYTES_DEFAULT
    useful = settings.num_slots * -(-config.max_position_embeddings // PAGE_TOKENS)
    budget = divide(
        page_bytes=layout.page_bytes,
        record_bytes=record_bytes_max(layout, drafts=drafts),
        kv_bytes=kv_bytes,
        num_pages=settings.num_pages,
        num_pages_useful=useful * 2 if settings.tail_share else useful,
        num_records=settings.num_records,
        tail_share=settings.tail_share,
    )
    if budget.num_pages == 0:
        raise RorqualError(
            f"--kv-bytes {kv_bytes} holds no page: a page of {PAGE_TOKENS} tokens takes {layout.page_bytes}"
        )
    return budget


@dataclass(frozen=True, slots=True, kw_only=True)
class HotBudget:
    """What sequences that spill have on the device; `num_pages` whole pages are left, theirs included."""

    shape: HotShape
    num_buffers: int
    num_pages: int
    num_thin: int


def hot_budget(
    config: ModelConfig, numerics: Numerics, settings: RankSettings, device: Budget, *, drafts_max: int
) -> HotBudget | None:
    """A part of the bytes of the device's pages. None: nobody spills. Raises RorqualError when the model has nothing to
    spill, and when there is too little."""
    if not settings.num_hot_buffers:
        return None
    layout = build_layout(config, numerics)
    shape = hot_shape(
        layout,
        index_topk=config.index_topk,
        num_drafts=drafts_max,
        num_tokens_max=config.max_position_embeddings,
        num_hot=settings.num_hot_rows,
    )
    division = divide_spilled(
        layout,
        shape,
        device_bytes=_bytes_for_pages(settings, device, layout.page_bytes),
        num_buffers=settings.num_hot_buffers,
        num_thin=settings.num_thin_pages,
    )
    return HotBudget(
        shape=shape,
        num_buffers=settings.num_hot_buffers,
        num_pages=division.num_pages,
        num_thin=division.num_thin,
    )


def _bytes_for_pages(settings: RankSettings, device: Budget, page_bytes: int) -> int:
    """With what a last whole page would not fit into: thin pages are smaller."""
    if settings.num_pages is None:
        fitting = int((settings.kv_bytes or KV_BYTES_DEFAULT) * (1 - settings.tail_share))
        if fitting // page_bytes == device.num_pages:
            return fitting
    return device.num_pages * page_bytes


def host_budget(
    config: ModelConfig, numerics: Numerics, settings: RankSettings, device: Budget, *, drafts: bool
) -> Budget:
    """Of host memory. A worker can tell routers of so many pages at most, its device's and these together; without
    records on the device there is no use for tails."""
    if not settings.num_host_pages and not settings.host_bytes:
        return Budget(num_pages=0, num_records=0)
    layout = build_layout(config, numerics)
    num_pages_max = CONTENT_ENTRIES_MAX - device.num_pages
    budget = divide(
        page_bytes=layout.page_bytes,
        record_bytes=record_bytes_max(layout, drafts=drafts),
        kv_bytes=settings.host_bytes or 0,
        num_pages=min(settings.num_host_pages, num_pages_max) if settings.host_bytes is None else None,
        # A model of window-only layers has pages that cost nothing, and no use for millions of them.
        num_pages_useful=num_pages_max if layout.page_bytes else min(num_pages_max, 16 * device.num_pages),
        num_records=0,
        tail_share=TAIL_SHARE if device.num_records else 0.0,
    )
    if budget.num_pages == 0:
        raise RorqualError(
            f"--host-bytes {settings.host_bytes} holds no page: a page of {PAGE_TOKENS} tokens takes"
            f" {layout.page_bytes}"
        )
    return budget
