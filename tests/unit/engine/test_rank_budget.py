"""How many pages and records a rank holds in host memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.plan import RankSettings
from engine.rank_budget import device_budget, host_budget, hot_budget
from kvstore.budget import Budget
from kvstore.handover import record_bytes_max
from kvstore.layout import Numerics, build_layout
from rorqual.errors import RorqualError
from rorqual.feed import CONTENT_ENTRIES_MAX
from rorqual.model_config import parse_model_config
from tests.harness.models import raw_config

SETTINGS = RankSettings(
    model="m",
    numerics=None,
    exact=False,
    num_pages=8,
    kv_bytes=None,
    num_slots=2,
    prefill_tokens_max=512,
    threads=1,
    kernels={},
    num_records=2,
    tail_share=0.25,
)
CONFIG = parse_model_config(raw_config())
LAYOUT = build_layout(CONFIG, Numerics.SERVED)


def below(config: Any = CONFIG, **settings: Any) -> Budget:
    asked = msgspec.structs.replace(SETTINGS, **settings)
    device = device_budget(config, Numerics.SERVED, asked, drafts=False)
    return host_budget(config, Numerics.SERVED, asked, device, drafts=False)


def test_without_a_word_there_is_none() -> None:
    assert below() == Budget(num_pages=0, num_records=0)


def test_pages_are_as_many_as_asked_for_and_tails_a_quarter_of_all_bytes() -> None:
    found = below(num_host_pages=400)
    assert found.num_pages == 400
    record = record_bytes_max(LAYOUT, drafts=False)
    assert found.num_records == min(int(400 * LAYOUT.page_bytes / 3 // record), 400) > 0


def test_bytes_are_what_both_take_together() -> None:
    size = 1000 * LAYOUT.page_bytes
    found = below(host_bytes=size)
    taken = found.num_pages * LAYOUT.page_bytes + found.num_records * record_bytes_max(LAYOUT, drafts=False)
    assert 0.95 * size < taken <= size


def test_bytes_that_hold_no_page_are_refused() -> None:
    with pytest.raises(RorqualError, match="--host-bytes 10 holds no page"):
        below(host_bytes=10)


def test_a_device_without_records_has_no_use_for_tails_below_it() -> None:
    assert below(num_host_pages=40, num_records=0, tail_share=0.0) == Budget(num_pages=40, num_records=0)


def test_there_are_no_more_pages_than_a_router_can_be_told_of() -> None:
    found = below(num_host_pages=CONTENT_ENTRIES_MAX)
    assert found.num_pages == CONTENT_ENTRIES_MAX - 8


def test_bytes_that_no_whole_page_fits_into_become_thin_pages() -> None:
    """Of a rank whose bytes are 20 pages and a bit: divided as bytes, not as 20 pages."""
    whole = hot_budget_of(20 * LAYOUT.page_bytes)
    more = hot_budget_of(21 * LAYOUT.page_bytes - 1)
    assert (more.num_pages, more.num_thin) > (whole.num_pages, whole.num_thin)


def hot_budget_of(kv_bytes: int) -> Any:
    asked = msgspec.structs.replace(
        SETTINGS,
        num_pages=None,
        kv_bytes=kv_bytes,
        tail_share=0.0,
        num_slots=4,
        num_hot_buffers=2,
        num_hot_rows=64,
    )
    device = device_budget(CONFIG, Numerics.SERVED, asked, drafts=False)
    assert device.num_pages == 20
    return hot_budget(CONFIG, Numerics.SERVED, asked, device, drafts_max=0)
