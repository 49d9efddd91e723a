"""The same comparison for the released models on accelerators that are not here: computed, nothing is measured.

Bytes are those of the layouts (`kvstore.layout`, `kvstore.handover`), seconds of computing those of the roofline model
(`rorqual.performance`), seconds of reading those of `rorqual.performance.sources` at the bandwidths given here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.worker.tiers.speeds import SpeedsConfig
from kvstore.handover import record_bytes
from kvstore.layout import Numerics, build_layout
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import HARDWARE, PRESETS, PerformanceModel, SourceSpeed, model_costs
from rorqual.performance.sources import break_even_tokens

NUM_DEVICES = 8
LENGTHS = tuple(PAGE_TOKENS << power for power in range(0, 13, 2))  # up to a million tokens

_ASSUMED = SpeedsConfig()
_PCIE5 = SourceSpeed(bytes_per_second=50e9)
_25GBE = SourceSpeed(bytes_per_second=2.5e9, latency_seconds=0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Of one model and source. Seconds by length in tokens; the break-even is what workers and placement decide by."""

    model: str
    source: str
    bytes_per_second: float  # of its slowest part
    num_bytes: dict[int, int]
    read_seconds: dict[int, float]
    compute_seconds: dict[int, float]
    break_even_tokens: float


def computed(hardware: str = "h200", *, models: Sequence[str] = tuple(PRESETS)) -> list[Released]:
    return [
        _released(name, source, path, performance)
        for name in models
        for performance in [
            PerformanceModel(
                hardware=HARDWARE[hardware], costs=model_costs(PRESETS[name]), num_devices=NUM_DEVICES
            )
        ]
        for source, path in _paths(performance).items()
    ]


def _paths(performance: PerformanceModel) -> Mapping[str, tuple[SourceSpeed, ...]]:
    return {
        "host, as assumed": (_ASSUMED.host,),
        "host, PCIe 5": (_PCIE5,),
        "peer": (performance.peer_speed,),
        "store, as assumed": (_ASSUMED.store, _ASSUMED.host),
        "store, 25 Gbit/s": (_25GBE, _PCIE5),
    }


def _released(
    name: str, source: str, path: tuple[SourceSpeed, ...], performance: PerformanceModel
) -> Released:
    layout = build_layout(PRESETS[name], Numerics.SERVED)
    tail_bytes = record_bytes(layout, LENGTHS[-1], drafts=True)
    num_bytes = {length: length // PAGE_TOKENS * layout.page_bytes + tail_bytes for length in LENGTHS}
    chunk = performance.chunk_tokens
    return Released(
        model=name,
        source=source,
        bytes_per_second=min(speed.bytes_per_second for speed in path),
        num_bytes=num_bytes,
        read_seconds={
            length: sum(float(speed.seconds(size)) for speed in path) for length, size in num_bytes.items()
        },
        compute_seconds={length: float(performance.prefill_seconds(length)) for length in LENGTHS},
        break_even_tokens=break_even_tokens(
            path,
            bytes_fixed=tail_bytes,
            bytes_per_token=layout.page_bytes / PAGE_TOKENS,
            seconds_per_token=float(performance.prefill_seconds(chunk)) / chunk,
        ),
    )
