"""Accelerators as the vendors describe them: dense peaks, memory and links, of one device.

Called by `rorqual.performance.roofline`. The figures are from public data sheets, rounded. Data sheets often print
FP8 and FP4 rates for 2:4 sparsity, which are twice the dense rates here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device. Rates are per second; `scale_up` is one direction of the fast domain, `network` of its own NIC."""

    name: str
    memory_bytes: float
    memory_bytes_per_second: float
    fp8_flops: float
    bf16_flops: float
    scale_up_bytes_per_second: float
    scale_up_devices: int
    network_bytes_per_second: float

    def __post_init__(self) -> None:
        rates = (self.memory_bytes_per_second, self.fp8_flops, self.bf16_flops, self.network_bytes_per_second)
        assert min(rates) > 0, f"{self.name}: every rate is positive"


def _row(
    name: str,
    memory_gb: float,
    tb: float,
    fp8_pf: float,
    bf16_pf: float,
    up_gb: float,
    domain: int,
    nic_gb: float,
) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=memory_gb * 1e9,
        memory_bytes_per_second=tb * 1e12,
        fp8_flops=fp8_pf * 1e15,
        bf16_flops=bf16_pf * 1e15,
        scale_up_bytes_per_second=up_gb * 1e9,
        scale_up_devices=domain,
        network_bytes_per_second=nic_gb * 1e9 / 8,
    )


HARDWARE = {
    item.name: item
    for item in (
        # name, memory GB, TB/s, FP8 PFLOP/s, BF16 PFLOP/s, scale-up GB/s in a domain of so many, NIC Gbit/s
        _row("h100", 80, 3.35, 1.98, 0.99, 450, 8, 400),
        _row("h200", 141, 4.8, 1.98, 0.99, 450, 8, 400),
        _row("b200", 180, 7.7, 4.5, 2.25, 900, 8, 400),
        _row("gb200", 186, 8.0, 4.5, 2.25, 900, 72, 400),
        _row("gb300", 279, 8.0, 4.5, 2.5, 900, 72, 800),
        _row("mi300x", 192, 5.3, 2.6, 1.31, 448, 8, 400),
        _row("mi355x", 288, 8.0, 5.0, 2.5, 538, 8, 400),
    )
}
