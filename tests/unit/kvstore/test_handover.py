"""The hand-over record: what is in it at any length, its size for the real models, and whose bytes are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.handover import (
    handover_bytes,
    rebuild_tokens,
    record_bytes,
    record_bytes_max,
    record_parts,
    wire_id,
)
from kvstore.layout import Component, IndexSpace, Numerics, StateLayout, build_layout
from rorqual.model_config import PAGE_TOKENS, LayerConfig, LayerKind, ModelConfig, parse_model_config
from tests.harness.releases import FLASH, PRO

FLASH_LAYOUT = build_layout(parse_model_config(FLASH), Numerics.SERVED)


def config(*, window: int = 8, coarse: int = 16, num_mtp_blocks: int = 1, **changed: Any) -> ModelConfig:
    kinds = ((LayerKind.WINDOW, 0), (LayerKind.CSA, 4), (LayerKind.HCA, coarse), (LayerKind.CSA, 4))
    layers = tuple(LayerConfig(kind=kind, ratio=ratio, hash_routed=False) for kind, ratio in kinds)
    changes = {"layers": layers, "sliding_window": window, "num_mtp_blocks": num_mtp_blocks, "head_dim": 96}
    return replace(parse_model_config(FLASH), **(changes | changed))


def component_bytes(layout: StateLayout, num_tokens: int) -> dict[Component, int]:
    found: dict[Component, int] = {}
    for part in record_parts(layout, num_tokens, drafts=True):
        found[part.component] = found.get(part.component, 0) + part.num_bytes
    return found


# --- sizes ---


@pytest.mark.parametrize(
    ("raw", "windows", "streams", "least", "mean", "most"),
    [
        (FLASH, 3_263_392, 32_768, 430_080, 5.95e6, 11.48e6),
        (PRO, 4_598_416, 57_344, 614_400, 9.14e6, 17.66e6),
    ],
    ids=["Flash", "Pro"],
)
def test_the_released_models_hand_over_the_published_bytes(
    raw: dict[str, Any], windows: int, streams: int, least: int, mean: float, most: float
) -> None:
    layout = build_layout(parse_model_config(raw), Numerics.SERVED)
    sizes = [component_bytes(layout, 8192 + more) for more in range(128)]
    assert {size[Component.WINDOW] + size[Component.DRAFT_WINDOW] for size in sizes} == {windows}
    assert {size[Component.LAST_STREAMS] for size in sizes} == {streams}
    unfinished = [
        sum(num_bytes for item, num_bytes in size.items() if item.value.endswith("unfinished"))
        for size in sizes
    ]
    assert unfinished[0] == min(unfinished) == least
    assert sum(unfinished) / 128 == pytest.approx(mean, rel=1e-3)
    assert max(unfinished) == pytest.approx(most, rel=1e-3)


def test_a_hand_over_is_full_pages_and_a_record_with_the_partial_pages_rows() -> None:
    """Of Flash at 1,000 tokens: 3 pages and 232 tokens, which are 58 C4 rows and 1 C128 row of each layer."""
    parts = {
        part.component: (part.first, part.count, part.num_bytes)
        for part in record_parts(FLASH_LAYOUT, 1000, drafts=False)
        if not part.halves
    }
    assert parts == {
        Component.WINDOW: (873, 127, 127 * 43 * 584),
        Component.LAST_STREAMS: (999, 1, 4 * 4096 * 2),
        Component.C4: (0, 58, 58 * 21 * 584),
        Component.C4_INDEX: (0, 58, 58 * 21 * 68),
        Component.C128: (0, 1, 20 * 584),
        Component.C128_UNFINISHED: (896, 104, 104 * 20 * 4096),
    }
    halves = 4 * 21 * 4 * (2 * 512 + 2 * 128)
    record = sum(num_bytes for _, _, num_bytes in parts.values()) + halves
    assert record_bytes(FLASH_LAYOUT, 1000, drafts=False) == record
    assert handover_bytes(FLASH_LAYOUT, 1000, drafts=False) == 3 * 256 * 3514.25 + record


def test_at_a_page_boundary_there_are_only_windows_halves_and_drafts() -> None:
    assert set(component_bytes(FLASH_LAYOUT, 512)) == {
        Component.WINDOW,
        Component.C4_UNFINISHED,
        Component.C4_INDEX_UNFINISHED,
        Component.DRAFT_WINDOW,
        Component.LAST_STREAMS,
    }


def test_a_tail_of_flash_is_as_long_as_four_pages_and_is_rebuilt_from_22() -> None:
    """43 layers of 127 rows and one window more are 5,589 tokens; of Pro, 61 layers, 7,875."""
    assert record_bytes(FLASH_LAYOUT, 512, drafts=True) == 3_263_392 + 430_080 + 32_768 == 3_726_240
    assert record_bytes(FLASH_LAYOUT, 512, drafts=True) / FLASH_LAYOUT.page_bytes == pytest.approx(
        4.14, abs=0.01
    )
    assert rebuild_tokens(FLASH_LAYOUT) == 22 * PAGE_TOKENS == 5_632
    assert rebuild_tokens(build_layout(parse_model_config(PRO), Numerics.SERVED)) == 31 * PAGE_TOKENS


@pytest.mark.parametrize(
    ("window", "num_tokens"), [(1, 256), (128, 768), (64, 512), (65, 512), (52, 256), (53, 512)]
)
def test_a_rebuild_spans_the_windows_of_all_layers(window: int, num_tokens: int) -> None:
    """Of four layers: 4 (W - 1) + W tokens, in pages."""
    assert rebuild_tokens(build_layout(config(window=window), Numerics.FLOAT32)) == num_tokens


# --- contents ---


def read_later(layout: StateLayout, num_tokens: int) -> set[tuple[Component, int, str]]:
    """(component, position or row, which bytes) that tokens from number `num_tokens` on read of what was computed
    before them: the model's own rules, token by token."""
    ratios = {item.component: item.ratio for item in layout.descriptors}
    fine, coarse, window = ratios[Component.C4], ratios[Component.C128], layout.sliding_window
    needed: set[tuple[Component, int, str]] = {(Component.LAST_STREAMS, num_tokens - 1, "row")}
    for position in range(num_tokens, num_tokens + window + 2 * max(fine, coarse)):
        for seen in range(max(0, position - window + 1), num_tokens):
            needed.add((Component.WINDOW, seen, "row"))
        # The draft block's index lags the tokens by one; it sees itself and the window before.
        index = position - 1
        for seen in range(max(0, index - window + 1), num_tokens - 1):
            needed.add((Component.DRAFT_WINDOW, seen, "row"))
        end = position + 1
        if end % coarse == 0:
            needed |= {(Component.C128_UNFINISHED, at, "row") for at in range(end - coarse, num_tokens)}
        if end % fine == 0:
            for component in (Component.C4_UNFINISHED, Component.C4_INDEX_UNFINISHED):
                early = range(max(0, end - 2 * fine), min(num_tokens, end - fine))
                late = range(end - fine, num_tokens)
                needed |= {(component, at, "first half") for at in early}
                needed |= {(component, at, "second half") for at in late}
    first_row = num_tokens // PAGE_TOKENS * PAGE_TOKENS
    for component in (Component.C4, Component.C4_INDEX, Component.C128):
        rows = range(first_row // ratios[component], num_tokens // ratios[component])
        needed |= {(component, row - rows.start, "row") for row in rows}
    return needed


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 3 * PAGE_TOKENS),
    window=st.sampled_from((1, 2, 8, 33, 128)),
    coarse=st.sampled_from((4, 16, 128, 256)),
)
def test_a_record_holds_what_later_tokens_read_and_nothing_else(
    num_tokens: int, window: int, coarse: int
) -> None:
    layout = build_layout(config(window=window, coarse=coarse), Numerics.SERVED)
    held: set[tuple[Component, int, str]] = set()
    for part in record_parts(layout, num_tokens, drafts=True):
        # A whole unfinished row of an overlapping window is both halves; the second is read first.
        names = ["first half"] if part.halves else ["row"]
        if part.component in (Component.C4_UNFINISHED, Component.C4_INDEX_UNFINISHED) and not part.halves:
            names = ["first half", "second half"]
        rows = {(part.component, part.first + row, name) for row in range(part.count) for name in names}
        assert not held & rows
        held |= rows
    assert held == read_later(layout, num_tokens)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 3 * PAGE_TOKENS),
    window=st.sampled_from((1, 8, 128, 300)),
    numerics=st.sampled_from(Numerics),
    drafts=st.booleans(),
)
def test_parts_lie_behind_one_another_and_fit_the_longest_record(
    num_tokens: int, window: int, numerics: Numerics, drafts: bool
) -> None:
    layout = build_layout(config(window=window), numerics)
    offset = 0
    for part in record_parts(layout, num_tokens, drafts=drafts):
        item = layout.find(part.component)
        assert item is not None
        assert part.offset == offset
        assert part.count > 0
        assert part.num_bytes * (1 + part.halves) == part.count * item.row_bytes * len(item.layers)
        assert drafts or part.component is not Component.DRAFT_WINDOW
        offset += part.num_bytes
    num_bytes = record_bytes(layout, num_tokens, drafts=drafts)
    assert 0 <= num_bytes - offset < 4
    assert num_bytes % 4 == 0
    assert num_bytes <= record_bytes_max(layout, drafts=drafts)


@pytest.mark.parametrize("numerics", Numerics)
@pytest.mark.parametrize(("window", "coarse"), [(1, 16), (8, 256), (128, 128), (300, 128)])
def test_the_longest_record_is_reached(numerics: Numerics, window: int, coarse: int) -> None:
    layout = build_layout(config(window=window, coarse=coarse), numerics)
    longest = max(record_bytes(layout, number, drafts=True) for number in range(1, 4 * PAGE_TOKENS))
    assert longest == record_bytes_max(layout, drafts=True)


def test_drafts_need_a_model_that_has_them_and_a_record_a_token() -> None:
    layout = build_layout(config(num_mtp_blocks=0), Numerics.SERVED)
    with pytest.raises(AssertionError, match="without MTP"):
        record_parts(layout, 10, drafts=True)
    with pytest.raises(AssertionError, match="without a computed token"):
        record_parts(layout, 0, drafts=False)


# --- whose bytes are whose ---

BASE = config()


@pytest.mark.parametrize(
    "changed",
    [
        config(window=9),
        config(coarse=32),
        config(num_mtp_blocks=2),
        config(head_dim=128),
        config(index_head_dim=64),
        config(rope_head_dim=32),
        replace(BASE, layers=(*BASE.layers, BASE.layers[0])),
        replace(BASE, layers=(BASE.layers[1], BASE.layers[0], *BASE.layers[2:])),
        replace(BASE, hidden_size=2048),
    ],
)
def test_models_whose_bytes_differ_have_another_wire_id(changed: ModelConfig) -> None:
    ids = {
        wire_id(build_layout(item, Numerics.SERVED), "same", drafts=True, exact=False)
        for item in (BASE, changed)
    }
    assert len(ids) == 2


def test_the_wire_id_also_names_model_numerics_drafts_and_exactness() -> None:
    ids = {
        wire_id(build_layout(BASE, numerics), fingerprint, drafts=drafts, exact=exact)
        for numerics in Numerics
        for fingerprint in ("one", "other")
        for drafts in (False, True)
        for exact in (False, True)
    }
    assert len(ids) == 16
    assert all(len(item) == 16 and set(item) <= set("0123456789abcdef") for item in ids)


def test_sizes_of_rings_are_nobodys_business() -> None:
    layout = build_layout(BASE, Numerics.SERVED)
    longer = tuple(
        replace(item, num_rows=item.num_rows + (item.space is IndexSpace.SLOT)) for item in layout.descriptors
    )
    other = replace(layout, descriptors=longer)
    assert wire_id(layout, "x", drafts=True, exact=False) == wire_id(other, "x", drafts=True, exact=False)
    for num_tokens in (1, 100, 300):
        assert record_parts(layout, num_tokens, drafts=True) == record_parts(other, num_tokens, drafts=True)
