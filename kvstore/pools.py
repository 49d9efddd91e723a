"""Pools: the memory behind every component, as bytes shaped by `kvstore.layout`.

Owns one uint8 tensor a component, [layers, units, unit_bytes], where a unit is a page or a slot's ring. A unit of a
paged component is byte for byte the wire page. Callers address rows by a global row id, `unit * num_rows + row`;
the engine's pager turns rows into values and back. Nothing here allocates ids: `kvstore.pages` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.layout import Component, Descriptor, IndexSpace, RowForm, StateLayout


class Pools:
    """All pools of one rank. `num_pages` and `num_slots` are fixed for its life."""

    def __init__(self, layout: StateLayout, *, num_pages: int, num_slots: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.num_slots = num_slots
        self._pools = {
            item.component: ComponentPool(
                item, num_units=num_pages if item.space is IndexSpace.PAGE else num_slots, device=device
            )
            for item in layout.descriptors
        }

    def __getitem__(self, component: Component) -> ComponentPool:
        return self._pools[component]

    @property
    def num_bytes(self) -> int:
        return sum(pool.bytes_lub.numel() for pool in self._pools.values())

    def fill(self, value: int) -> None:
        """Overwrite every byte; 0xFF makes every float row NaN, so that a stray read shows."""
        for pool in self._pools.values():
            pool.bytes_lub.fill_(value)


class ComponentPool:
    """Memory of one component. Suffixes: l layer, u unit, b byte, r row of all units."""

    def __init__(self, descriptor: Descriptor, *, num_units: int, device: torch.device) -> None:
        self.descriptor = descriptor
        shape = (len(descriptor.layers), num_units, descriptor.unit_bytes)
        self.bytes_lub = torch.zeros(shape, dtype=torch.uint8, device=device)
        # Views are made once: making one costs microseconds, and every layer of every step wants several.
        layers = dict(zip(descriptor.layers, self.bytes_lub, strict=True))
        self._rows_f32: dict[int, Tensor] = {}
        self._data_and_scales: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, bytes_ub in layers.items():
            if descriptor.form is RowForm.F32:
                self._rows_f32[layer] = bytes_ub.view(torch.float32).view(-1, descriptor.width)
            else:
                self._data_and_scales[layer] = _split_records(bytes_ub, descriptor)

    def rows_f32(self, layer: int) -> Tensor:
        """A writable view [units * num_rows, width] f32. Only for RowForm.F32."""
        return self._rows_f32[layer]

    def data_and_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Writable uint8 views [units, num_rows, data_bytes] and [units, num_rows, scale_bytes]. Not for F32."""
        return self._data_and_scales[layer]


def _split_records(bytes_ub: Tensor, item: Descriptor) -> tuple[Tensor, Tensor]:
    """All data of a unit come first, then all scales."""
    split = item.num_rows * item.data_bytes
    data = bytes_ub[:, :split].unflatten(1, (item.num_rows, item.data_bytes))
    scales = bytes_ub[:, split:].unflatten(1, (item.num_rows, item.scale_bytes))
    return data, scales
