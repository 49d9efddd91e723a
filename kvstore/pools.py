"""Pools: the memory behind every component, as bytes shaped by `kvstore.layout`.

Owns one uint8 tensor a component, [units, layers, layer_bytes], where a unit is a page or a slot's ring. A unit of a
paged component is one run of bytes, and in each layer byte for byte the wire page: a page is read by others as it
lies there, one run a component. Callers address rows by a row id that is the same in every layer, `unit * unit_rows +
row`; the engine's pager turns rows into values and back. Nothing here allocates ids: `kvstore.pages` does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvstore.layout import Component, Descriptor, IndexSpace, RowForm, StateLayout
from kvstore.transfer.contract import ByteArray

Allocate = Callable[[str, int, int], ByteArray]
"""Memory for what other processes may read: (name, bytes of a unit, units) to uint8 [units * bytes], zeroed, aligned to
4 bytes at least. Called once a name; the memory stays for as long as the array is referenced."""


def plain_memory(name: str, unit_bytes: int, num_units: int) -> ByteArray:
    """Memory of this process alone."""
    del name
    return np.zeros(unit_bytes * num_units, dtype=np.uint8)


class Pools:
    """All pools of one rank, in host memory. `num_pages`, `num_thin` and `num_slots` are fixed for its life.

    Page ids 0 .. num_pages - 1 are **whole** pages. The `num_thin` ids behind them are **thin**: a thin page has a unit
    in every paged component but C4, whose rows are elsewhere.

    Pages lie in memory that `allocate` gives, under the component's value as name; rings never leave the rank.
    """

    def __init__(
        self,
        layout: StateLayout,
        *,
        num_pages: int,
        num_slots: int,
        num_thin: int = 0,
        allocate: Allocate = plain_memory,
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.num_thin = num_thin
        self.num_slots = num_slots
        self._pools: dict[Component, ComponentPool] = {}
        for item in layout.descriptors:
            is_paged = item.space is IndexSpace.PAGE
            num_units, source = (num_pages, allocate) if is_paged else (num_slots, plain_memory)
            if is_paged and item.component is not Component.C4:
                num_units += num_thin
            memory = source(item.component.value, item.unit_bytes, num_units)
            self._pools[item.component] = ComponentPool(item, torch.from_numpy(memory), num_units=num_units)

    def __getitem__(self, component: Component) -> ComponentPool:
        return self._pools[component]

    @property
    def num_bytes(self) -> int:
        return sum(pool.bytes_ulb.numel() for pool in self._pools.values())

    def fill(self, value: int) -> None:
        """Overwrite every byte; 0xFF makes every float row NaN, so that a stray read shows."""
        for pool in self._pools.values():
            pool.bytes_ulb.fill_(value)


class ComponentPool:
    """Memory of one component. Suffixes: u unit, l layer, b byte, r row of a unit in one layer."""

    def __init__(self, descriptor: Descriptor, memory: Tensor, *, num_units: int) -> None:
        """`memory` is uint8 [num_units * unit_bytes]."""
        assert memory.data_ptr() % 4 == 0, f"memory of {descriptor.component.value} is not aligned"
        self.descriptor = descriptor
        self.bytes_ulb = memory.view(num_units, len(descriptor.layers), descriptor.layer_bytes)
        self.data_ulrb, self.scales_ulrb = split_layers(self.bytes_ulb, descriptor)
        # Views are made once: making one costs microseconds, and every layer of every step wants several.
        self._rows_f32: dict[int, Tensor] = {}
        self._data_and_scales: dict[int, tuple[Tensor, Tensor]] = {}
        if descriptor.form is RowForm.F32:
            rows = memory.view(torch.float32).view(-1, descriptor.width)
            self._rows_f32 = {
                layer: rows[index * descriptor.num_rows :] for index, layer in enumerate(descriptor.layers)
            }
        else:
            self._data_and_scales = {
                layer: (self.data_ulrb[:, index], self.scales_ulrb[:, index])
                for index, layer in enumerate(descriptor.layers)
            }

    def rows_f32(self, layer: int) -> Tensor:
        """A writable view, f32 [.., width], whose row `unit * unit_rows + row` is the layer's. Rows between are other
        layers'. Only for RowForm.F32."""
        return self._rows_f32[layer]

    def data_and_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Writable uint8 views [units, num_rows, data_bytes] and [units, num_rows, scale_bytes]. Not for F32."""
        return self._data_and_scales[layer]


def split_layers(bytes_ulb: Tensor, item: Descriptor) -> tuple[Tensor, Tensor]:
    """Views of bytes [u, l, layer_bytes]: data [u, l, r, b] and scales [u, l, r, b] (b may be 0). In a layer of a
    unit all data come first."""
    split = item.num_rows * item.data_bytes
    data = bytes_ulb[..., :split].unflatten(-1, (item.num_rows, item.data_bytes))
    scales = bytes_ulb[..., split:].unflatten(-1, (item.num_rows, item.scale_bytes))
    return data, scales
