"""What a model weighs: tensors and bytes by part, parameters, and the state a request keeps at a length.

Owns the counting and its two forms, text and JSON. The `checkpoint inspect` command calls it. Computes from
the config and file headers alone: no tensor is read or allocated, and no torch imported.

The state is counted in the layouts that are served elsewhere too, so that numbers can be compared: a KV row
as bf16 (what the reference keeps) or as the packed record (e4m3 with one scale per 64 channels, the rotated
channels in bf16), an index row as bf16, FP8 with one float scale, or FP4 with one scale per 32. Main layers
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.checkpoint.manifest import Part, expected_weights
from engine.checkpoint.names import Naming
from rorqual.model_config import LayerKind, ModelConfig

AllocatedBytes = Callable[[ModelConfig, int], Mapping[str, int]]
"""What this project's own pools would hold for one request of so many tokens: bytes by component."""

_KV_SCALE_BLOCK = 64
_INDEX_SCALE_BLOCK = 32
_SCALE_ALIGNMENT = 8  # the scales of a packed KV row are padded to whole words: 7 scales and 1 byte


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBytes:
    """What the files of a checkpoint hold, where there are files."""

    num_tensors: int
    num_files: int
    naming: Naming
    bytes_by_part: Mapping[Part, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Sums over the manifest: what the official layout stores for the config."""

    num_tensors: int
    num_mtp_tensors: int
    bytes_by_part: Mapping[Part, int]
    num_parameters: int  # main layers, embedding and head
    num_parameters_mtp: int
    num_parameters_active: int  # that one token uses; without the embedding table, of which it reads one row

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_part.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Bytes of a KV row and of an index row under one layout."""

    name: str
    kv: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
    """Bytes of one request under one layout."""

    layout: str
    window: int
    c4: int
    c4_index: int
    c128: int
    unfinished: int  # float32 rows of the pooling windows that are not full yet
    bytes_per_token: float  # growth, averaged over whole windows

    @property
    def total(self) -> int:
        return self.window + self.c4 + self.c4_index + self.c128 + self.unfinished


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    source: str
    form: str  # how the weights are stored, in words
    num_tokens: int
    weights: Weights
    stored: StoredBytes | None
    states: tuple[RequestState, ...]
    allocated: Mapping[str, int] | None
    notices: tuple[str, ...]


def count_weights(config: ModelConfig) -> Weights:
    """Sums over the manifest."""
    num_tensors = num_mtp_tensors = num_parameters = num_parameters_mtp = 0
    active = 0.0
    by_part = dict.fromkeys(Part, 0)
    for weight in expected_weights(config):
        tensors = weight.tensors()
        num_tensors += len(tensors)
        by_part[weight.part] += sum(tensor.num_bytes for tensor in tensors)
        if weight.part is Part.MTP:
            num_mtp_tensors += len(tensors)
            num_parameters_mtp += weight.num_parameters
            continue
        num_parameters += weight.num_parameters
        if weight.part is Part.ROUTED_EXPERTS:
            active += weight.num_parameters * config.num_experts_per_token / config.num_experts
        elif weight.name != "embed.weight":
            active += weight.num_parameters
    return Weights(
        num_tensors=num_tensors,
        num_mtp_tensors=num_mtp_tensors,
        bytes_by_part=by_part,
        num_parameters=num_parameters,
        num_parameters_mtp=num_parameters_mtp,
        num_parameters_active=round(active),
    )


def row_layouts(config: ModelConfig) -> tuple[RowBytes, ...]:
    scales = _round_up(-(-config.nope_head_dim // _KV_SCALE_BLOCK), _SCALE_ALIGNMENT)
    packed = config.nope_head_dim + 2 * config.rope_head_dim + scales
    index = config.index_head_dim
    fp4_index = -(-index // 2) + -(-index // _INDEX_SCALE_BLOCK)
    return (
        RowBytes(name="bf16 rows (reference)", kv=2 * config.head_dim, index=2 * index),
        RowBytes(name=f"{packed} B rows + FP8 index", kv=packed, index=index + 4),
        RowBytes(name=f"{packed} B rows + FP4 index", kv=packed, index=fp4_index),
    )


def request_state(config: ModelConfig, num_tokens: int, rows: RowBytes) -> RequestState:
    """Bytes one request of `num_tokens` keeps in the main layers."""
    csa = [layer.ratio for layer in config.layers if layer.kind is LayerKind.CSA]
    hca = [layer.ratio for layer in config.layers if layer.kind is LayerKind.HCA]
    # Overlapping windows keep two windows of rows, each with two halves; K and S; float32.
    csa_width = config.head_dim + config.index_head_dim
    unfinished = sum(2 * ratio * 2 * 2 * csa_width * 4 for ratio in csa)
    unfinished += sum(ratio * 2 * config.head_dim * 4 for ratio in hca)
    return RequestState(
        layout=rows.name,
        window=config.num_layers * config.sliding_window * rows.kv,
        c4=sum(num_tokens // ratio for ratio in csa) * rows.kv,
        c4_index=sum(num_tokens // ratio for ratio in csa) * rows.index,
        c128=sum(num_tokens // ratio for ratio in hca) * rows.kv,
        unfinished=unfinished,
        bytes_per_token=sum((rows.kv + rows.index) / ratio for ratio in csa)
        + sum(rows.kv / ratio for ratio in hca),
    )


def inspect_config(
    config: ModelConfig,
    *,
    source: str,
    num_tokens: int,
    stored: StoredBytes | None = None,
    allocated_bytes: AllocatedBytes | None = None,
    notices: Iterable[str] = (),
) -> Inspection:
    """Everything `checkpoint inspect` shows."""
    form = (
        f"FP8 weights, {config.expert_dtype.upper()} experts" if config.quantised else "unquantised weights"
    )
    return Inspection(
        source=source,
        form=form,
        num_tokens=num_tokens,
        weights=count_weights(config),
        stored=stored,
        states=tuple(request_state(config, num_tokens, rows) for rows in row_layouts(config)),
        allocated=allocated_bytes(config, num_tokens) if allocated_bytes else None,
        notices=tuple(notices),
    )


def to_json(inspection: Inspection) -> dict[str, object]:
    weights = inspection.weights
    document: dict[str, object] = {
        "source": inspection.source,
        "form": inspection.form,
        "notices": list(inspection.notices),
        "num_tensors": weights.num_tensors,
        "num_tensors_mtp": weights.num_mtp_tensors,
        "num_bytes": weights.num_bytes,
        "bytes_by_part": {part.value: num_bytes for part, num_bytes in weights.bytes_by_part.items()},
        "num_parameters": weights.num_parameters,
        "num_parameters_mtp": weights.num_parameters_mtp,
        "num_parameters_active": weights.num_parameters_active,
        "num_tokens": inspection.num_tokens,
        "request_state": [
            {
                "layout": state.layout,
                "window": state.window,
                "c4": state.c4,
                "c4_index": state.c4_index,
                "c128": state.c128,
                "unfinished": state.unfinished,
                "total": state.total,
                "bytes_per_token": state.bytes_per_token,
            }
            for state in inspection.states
        ],
    }
    if inspection.stored is not None:
        document["stored"] = {
            "num_tensors": inspection.stored.num_tensors,
            "num_files": inspection.stored.num_files,
            "naming": inspection.stored.naming.value,
            "bytes_by_part": {
                part.value: num_bytes for part, num_bytes in inspection.stored.bytes_by_part.items()
            },
        }
    if inspection.allocated is not None:
        document["allocated"] = dict(inspection.allocated)
    return document


def to_text(inspection: Inspection) -> str:
    weights = inspection.weights
    lines = [f"{inspection.source}: {inspection.form}"]
    if inspection.stored is not None:
        stored = inspection.stored
        lines += [
            f"{stored.num_tensors:,} tensors in {stored.num_files} files under {stored.naming.value} names; "
            "all fit the model"
        ]
    lines += [f"note: {notice}" for notice in inspection.notices]
    lines += ["", f"tensors     {weights.num_tensors:,} ({weights.num_mtp_tensors:,} MTP)"]
    lines += [f"bytes       {weights.num_bytes:,}"]
    lines += [
        f"parameters  {_billions(weights.num_parameters)} + {_billions(weights.num_parameters_mtp)} MTP, "
        f"{_billions(weights.num_parameters_active)} active per token"
    ]
    lines += ["", *_table(_part_rows(weights, inspection.stored))]
    lines += ["", f"state of one request of {inspection.num_tokens:,} tokens, bytes:"]
    lines += _table(_state_rows(inspection.states))
    if inspection.allocated is not None:
        rows = [(name, f"{num_bytes:,}") for name, num_bytes in inspection.allocated.items()]
        rows.append(("total", f"{sum(inspection.allocated.values()):,}"))
        lines += ["", *_table([("allocated by our pools", "bytes"), *rows])]
    return "\n".join(lines)


def _part_rows(weights: Weights, stored: StoredBytes | None) -> list[tuple[str, ...]]:
    """By the official layout and, where files differ from it (other float dtypes), by the files."""
    columns = [weights.bytes_by_part]
    header = ("part", "bytes", "share")
    if stored is not None and sum(stored.bytes_by_part.values()) != weights.num_bytes:
        columns.append(stored.bytes_by_part)
        header += ("bytes in files", "share")
    rows: list[tuple[str, ...]] = [header]
    for part in Part:
        if not weights.bytes_by_part[part]:
            continue
        cells = [part.value]
        for column in columns:
            total = sum(column.values())
            cells += [f"{column[part]:,}", f"{100 * column[part] / total:.1f} %"]
        rows.append(tuple(cells))
    return rows


def _state_rows(states: Iterable[RequestState]) -> list[tuple[str, ...]]:
    header = ("layout", "window", "C4 rows", "C4 index", "C128 rows", "unfinished", "total", "per token")
    return [
        header,
        *(
            (
                state.layout,
                *(
                    f"{item:,}"
                    for item in (
                        state.window,
                        state.c4,
                        state.c4_index,
                        state.c128,
                        state.unfinished,
                        state.total,
                    )
                ),
                f"{state.bytes_per_token:,.2f}",
            )
            for state in states
        ),
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their longest cell: the first to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _billions(num_parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if num_parameters >= size:
            return f"{num_parameters / size:,.2f} {unit}"
    return f"{num_parameters:,}"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
