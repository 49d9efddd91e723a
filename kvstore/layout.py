"""Component descriptors: the only source of sizes for pools, transfer, tiers, inspection and tests. Pure, no torch.

Cached state comes in components. Paged components hold compressed rows, addressed by page id; slot components belong
to one running request and are rings addressed by absolute position (`position % ring_rows`), so that nothing is ever
moved and rejected drafts are simply overwritten. A **unit** is one page, or one slot's ring, over all layers of its
component: its layers stand one behind the other, so that a page of a component is one run of bytes.

Row forms. `float32` numerics keep f32 rows. `served` numerics keep what the quantisation points leave, in bytes:
a KV row is (head_dim - rope_head_dim) e4m3 codes + rope_head_dim bf16 values of data, then one e8m0 scale per 64 codes
padded to 8 bytes (584 bytes for 512 channels); an indexer row is e2m1 codes, two a byte, then one e8m0 scale per 32
(68 bytes for 128 channels); the last streams, which the model leaves as bf16 values, are kept as such. Inside one
layer of a unit all data come first, then all scales: the page is the wire page.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS, LayerKind, ModelConfig

DRAFTS_MAX = 4
"""Rings have this many rows more than the mathematics needs, so that rejected drafts can be overwritten in place."""

KV_SCALE_BLOCK = 64
INDEX_SCALE_BLOCK = 32


class Numerics(enum.Enum):
    FLOAT32 = "float32"
    SERVED = "served"


class Component(enum.Enum):
    C4 = "c4"
    C4_INDEX = "c4_index"
    C128 = "c128"
    WINDOW = "window"
    C4_UNFINISHED = "c4_unfinished"
    C4_INDEX_UNFINISHED = "c4_index_unfinished"
    C128_UNFINISHED = "c128_unfinished"
    LAST_STREAMS = "last_streams"
    DRAFT_WINDOW = "draft_window"


class IndexSpace(enum.Enum):
    PAGE = "page"
    SLOT = "slot"


class RowForm(enum.Enum):
    F32 = "f32"
    BF16 = "bf16"
    KV_FP8 = "kv_fp8"
    INDEX_FP4 = "index_fp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """One component of one model: `num_rows` rows per page (PAGE) or per ring (SLOT), in each of `layers`.

    `layers` are layer numbers of the main stack; the draft window's are MTP block numbers, and the last streams, which
    there are once, have layer 0.
    """

    component: Component
    space: IndexSpace
    layers: tuple[int, ...]
    ratio: int  # tokens that the component's compressor pools into one row; 1 without a compressor
    width: int  # values of a row
    form: RowForm
    num_rows: int
    data_bytes: int  # of a row
    scale_bytes: int  # of a row, 0 for f32 and bf16

    @property
    def row_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one page, or of one slot's ring, in one layer."""
        return self.num_rows * self.row_bytes

    @property
    def unit_bytes(self) -> int:
        """Bytes of one page, or of one slot's rings, in all layers."""
        return self.layer_bytes * len(self.layers)

    @property
    def unit_rows(self) -> int:
        """What a row id grows by from one unit to the next: row r of unit u has id u * unit_rows + r in every layer."""
        return self.num_rows * len(self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """All components of a model under one numerics. Empty components are left out."""

    numerics: Numerics
    sliding_window: int
    descriptors: tuple[Descriptor, ...]

    def find(self, component: Component) -> Descriptor | None:
        return next((item for item in self.descriptors if item.component is component), None)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page id over all paged components and layers."""
        return sum(item.unit_bytes for item in self.descriptors if item.space is IndexSpace.PAGE)

    @property
    def slot_bytes(self) -> int:
        return sum(item.unit_bytes for item in self.descriptors if item.space is IndexSpace.SLOT)

    def allocated_bytes(self, num_tokens: int) -> dict[str, int]:
        """Bytes one request of `num_tokens` tokens takes from the pools, by component."""
        num_pages = -(-num_tokens // PAGE_TOKENS)
        return {
            item.component.value: item.unit_bytes * (num_pages if item.space is IndexSpace.PAGE else 1)
            for item in self.descriptors
        }


def build_layout(config: ModelConfig, numerics: Numerics) -> StateLayout:
    """The state of `config`: 256-token pages, rings with room for DRAFTS_MAX drafts.

    Raises ConfigError if the widths do not fit the row forms of the numerics.
    """
    if numerics is Numerics.SERVED:
        _check_served(config)
    by_kind = {
        kind: tuple(layer for layer, item in enumerate(config.layers) if item.kind is kind)
        for kind in LayerKind
    }
    window_rows = config.sliding_window + PAGE_TOKENS + DRAFTS_MAX
    kv, index = _kv_form(numerics), _index_form(numerics)
    every_layer = tuple(range(config.num_layers))
    found = [_slot(Component.WINDOW, every_layer, 1, config.head_dim, kv, window_rows)]
    if by_kind[LayerKind.CSA]:
        layers = by_kind[LayerKind.CSA]
        ratio = config.layers[layers[0]].ratio
        ring = 2 * ratio + DRAFTS_MAX  # the overlapping window before, and the current one
        found += [
            _paged(Component.C4, layers, ratio, config.head_dim, kv),
            _paged(Component.C4_INDEX, layers, ratio, config.index_head_dim, index),
            # Unfinished rows: K and S (gate with ape added), each twice the width for the two halves.
            _slot(Component.C4_UNFINISHED, layers, ratio, 4 * config.head_dim, RowForm.F32, ring),
            _slot(Component.C4_INDEX_UNFINISHED, layers, ratio, 4 * config.index_head_dim, RowForm.F32, ring),
        ]
    if by_kind[LayerKind.HCA]:
        layers = by_kind[LayerKind.HCA]
        ratio = config.layers[layers[0]].ratio
        ring = ratio + DRAFTS_MAX
        found += [
            _paged(Component.C128, layers, ratio, config.head_dim, kv),
            _slot(Component.C128_UNFINISHED, layers, ratio, 2 * config.head_dim, RowForm.F32, ring),
        ]
    # The streams of the newest positions, whichever of them are accepted: the next token is sampled from them, and the
    # next drafts are made from them.
    plain = RowForm.F32 if numerics is Numerics.FLOAT32 else RowForm.BF16
    width = config.hc_mult * config.hidden_size
    found.append(_slot(Component.LAST_STREAMS, (0,), 1, width, plain, DRAFTS_MAX + 1))
    if config.num_mtp_blocks:
        blocks = tuple(range(config.num_mtp_blocks))
        found.append(_slot(Component.DRAFT_WINDOW, blocks, 1, config.head_dim, kv, window_rows))
    rope = config.rope_head_dim
    return StateLayout(
        numerics=numerics,
        sliding_window=config.sliding_window,
        descriptors=tuple(_describe(item, rope) for item in found),
    )


def _check_served(config: ModelConfig) -> None:
    num_codes = config.head_dim - config.rope_head_dim
    if num_codes <= 0 or num_codes % 2:
        raise ConfigError(
            f"served numerics need head_dim - qk_rope_head_dim to be positive and even, not {num_codes}"
        )
    width = config.index_head_dim
    has_index = any(item.kind is LayerKind.CSA for item in config.layers)
    if has_index and width & (width - 1):
        raise ConfigError(f"served numerics need index_head_dim to be a power of two, not {width}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    component: Component
    space: IndexSpace
    layers: tuple[int, ...]
    ratio: int
    width: int
    form: RowForm
    num_rows: int


def _paged(component: Component, layers: tuple[int, ...], ratio: int, width: int, form: RowForm) -> _Shape:
    return _Shape(
        component=component,
        space=IndexSpace.PAGE,
        layers=layers,
        ratio=ratio,
        width=width,
        form=form,
        num_rows=PAGE_TOKENS // ratio,
    )


def _slot(
    component: Component, layers: tuple[int, ...], ratio: int, width: int, form: RowForm, num_rows: int
) -> _Shape:
    return _Shape(
        component=component,
        space=IndexSpace.SLOT,
        layers=layers,
        ratio=ratio,
        width=width,
        form=form,
        num_rows=num_rows,
    )


def _describe(shape: _Shape, rope_head_dim: int) -> Descriptor:
    data_bytes, scale_bytes = _row_bytes(shape.form, shape.width, rope_head_dim)
    return Descriptor(
        component=shape.component,
        space=shape.space,
        layers=shape.layers,
        ratio=shape.ratio,
        width=shape.width,
        form=shape.form,
        num_rows=shape.num_rows,
        data_bytes=data_bytes,
        scale_bytes=scale_bytes,
    )


def _row_bytes(form: RowForm, width: int, rope_head_dim: int) -> tuple[int, int]:
    if form is RowForm.F32:
        return 4 * width, 0
    if form is RowForm.BF16:
        return 2 * width, 0
    if form is RowForm.INDEX_FP4:
        return -(-width // 2), -(-width // INDEX_SCALE_BLOCK)
    num_codes = width - rope_head_dim
    num_scales = -(-num_codes // KV_SCALE_BLOCK)
    return num_codes + 2 * rope_head_dim, -(-num_scales // 8) * 8


def _kv_form(numerics: Numerics) -> RowForm:
    return RowForm.F32 if numerics is Numerics.FLOAT32 else RowForm.KV_FP8


def _index_form(numerics: Numerics) -> RowForm:
    return RowForm.F32 if numerics is Numerics.FLOAT32 else RowForm.INDEX_FP4
