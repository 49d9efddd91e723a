"""Host memory of a rank: pages and tails that its pools have no room for, and the copies between the two.

Owned by the rank (`engine.rank`), which makes the copies of a plan before anything else of it; the worker's host
decides what lies where (`engine.worker.tiers.host_tier`), and with a store reads and writes it too, where no plan
does. A page is kept in wire form, its paged components one behind the other in layout order, so that its bytes are
those that any other tier or worker knows it by; a record as it is. Memory is shared with the host if that asks for it,
and is pinned where the pools are on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.plan import Copies, SharedMemory
from kvstore.layout import Component, Descriptor, IndexSpace
from kvstore.pools import Allocate, Pools, plain_memory, split_layers
from kvstore.transfer.memory import Segments, make_segments
from kvstore.transfer.runs import RECORDS

PAGES = "pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A paged component of all pages: in its pool, and here, uint8 [pages, bytes of a unit]."""

    descriptor: Descriptor
    units_ub: Tensor
    host_hb: Tensor


class HostMemory:
    """`records_RB` are the device's hand-over records, uint8 [records, bytes of the longest one]."""

    def __init__(
        self,
        pools: Pools,
        records_RB: Tensor,
        *,
        num_pages: int,
        num_records: int,
        agent: str = "",
    ) -> None:
        """With an `agent`, a name fresh for each incarnation, the memory can be mapped by the host: `shared`."""
        self._agent = agent
        self._segments: Segments | None = make_segments(agent) if agent else None
        allocate = plain_memory if self._segments is None else _shared_memory(self._segments)
        page_bytes, record_bytes = pools.layout.page_bytes, records_RB.shape[1]
        self.num_pages = num_pages
        self.num_records = num_records
        self.pages = _allocate(allocate, PAGES, page_bytes, num_pages)
        """uint8 [pages, bytes of a page]."""
        self.records = _allocate(allocate, RECORDS, record_bytes, num_records)
        """uint8 [records, bytes of the longest record]."""
        self._records_dev = records_RB
        self._parts: dict[Component, _Part] = {}
        offset = 0
        for item in pools.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                host_hb = self.pages[:, offset : offset + item.unit_bytes]
                units_ub = pools[item.component].bytes_ulb.flatten(1)
                self._parts[item.component] = _Part(descriptor=item, units_ub=units_ub, host_hb=host_hb)
                offset += item.unit_bytes
        assert offset == page_bytes
        self._copied: torch.cuda.Event | None = (
            None  # behind the newest copies; None: they are done on return
        )
        if records_RB.is_cuda:
            _pin(self.pages, self.records)
            self._copied = torch.cuda.Event()

    @property
    def num_bytes(self) -> int:
        return self.pages.numel() + self.records.numel()

    @property
    def shared(self) -> SharedMemory | None:
        if self._segments is None:
            return None
        return SharedMemory(agent=self._agent, metadata=self._segments.metadata)

    def close(self) -> None:
        """Nobody else can map it any more. It goes with the last process that has mapped it."""
        if self._segments is not None:
            self._segments.close()

    def rows(self, component: Component) -> tuple[Tensor, Tensor]:
        """What pages here hold of a paged component: views, data uint8 [pages, layers, rows of a page, bytes] and
        scales likewise."""
        part = self._parts[component]
        return split_layers(
            part.host_hb.unflatten(1, (len(part.descriptor.layers), part.descriptor.layer_bytes)),
            part.descriptor,
        )

    def mark(self) -> None:
        """All copies of a plan have been asked for; see `wait`."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until the newest copies are done: from then on the host may read what came here and write where nobody reads
        any more. A plan without segments has nothing else to wait for."""
        if self._copied is not None:
            self._copied.synchronize()

    def demote(self, copies: Copies) -> None:
        """From the device to host memory: whole pages."""
        for part in self._parts.values():
            for item in copies.pages:
                part.host_hb[item.host_page].copy_(part.units_ub[item.page], non_blocking=True)
        for item in copies.records:
            source, size = self._records_dev[item.record], item.num_bytes
            self.records[item.host_record, :size].copy_(source[:size], non_blocking=True)

    def promote(self, copies: Copies) -> None:
        """From host memory to the device: of a thin page what it has."""
        for part in self._parts.values():
            for item in copies.pages:
                if item.page < len(part.units_ub):
                    part.units_ub[item.page].copy_(part.host_hb[item.host_page], non_blocking=True)
        for item in copies.records:
            target, size = self._records_dev[item.record], item.num_bytes
            target[:size].copy_(self.records[item.host_record, :size], non_blocking=True)


def _shared_memory(segments: Segments) -> Allocate:
    return lambda _, unit_bytes, num_units: segments.allocate(unit_bytes * num_units)


def _allocate(allocate: Allocate, name: str, unit_bytes: int, num_units: int) -> Tensor:
    if not num_units or not unit_bytes:
        return torch.empty((num_units, unit_bytes), dtype=torch.uint8)
    return torch.from_numpy(allocate(name, unit_bytes, num_units)).view(num_units, unit_bytes)


def _pin(*memory: Tensor) -> None:
    """Lock it for copies that run beside computing. Not run on a GPU yet."""
    runtime: Any = torch.cuda.cudart()
    for item in memory:
        if item.numel():
            torch.cuda.check_error(runtime.cudaHostRegister(item.data_ptr(), item.numel(), 0))
