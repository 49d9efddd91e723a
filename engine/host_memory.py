"""Host memory of a rank: pages and tails that its pools have no room for, and the copies between the two.

Owned by the rank (`engine.rank`), which makes the copies of a plan before anything else of it; the worker's host
decides what lies where (`engine.worker.host_tier`). A page is kept in wire form, its paged components one behind the
other in layout order, so that its bytes are those that any other tier or worker knows it by; a record as it is. Memory
comes from a callable, so that it can be shared with other processes, and is pinned where the pools are on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.plan import Copies
from kvstore.layout import IndexSpace
from kvstore.pools import Allocate, Pools, plain_memory
from kvstore.transfer.runs import RECORDS

PAGES = "pages"


class HostMemory:
    """`records_RB` are the device's hand-over records, uint8 [records, bytes of the longest one]."""

    def __init__(
        self,
        pools: Pools,
        records_RB: Tensor,
        *,
        num_pages: int,
        num_records: int,
        allocate: Allocate = plain_memory,
    ) -> None:
        page_bytes, record_bytes = pools.layout.page_bytes, records_RB.shape[1]
        self.num_pages = num_pages
        self.num_records = num_records
        self.pages = _allocate(allocate, PAGES, page_bytes, num_pages)
        """uint8 [pages, bytes of a page]."""
        self.records = _allocate(allocate, RECORDS, record_bytes, num_records)
        """uint8 [records, bytes of the longest record]."""
        self._records_dev = records_RB
        self._components: list[
            tuple[Tensor, Tensor]
        ] = []  # [pages, bytes]: of the pool, and of the pages here
        offset = 0
        for item in pools.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                units_dev = pools[item.component].bytes_ulb.flatten(1)
                self._components.append((units_dev, self.pages[:, offset : offset + item.unit_bytes]))
                offset += item.unit_bytes
        assert offset == page_bytes
        if records_RB.is_cuda:
            _pin(self.pages, self.records)

    @property
    def num_bytes(self) -> int:
        return self.pages.numel() + self.records.numel()

    def demote(self, copies: Copies) -> None:
        """From the device to host memory."""
        for units_dev, units_host in self._components:
            for item in copies.pages:
                units_host[item.host_page].copy_(units_dev[item.page], non_blocking=True)
        for item in copies.records:
            source, size = self._records_dev[item.record], item.num_bytes
            self.records[item.host_record, :size].copy_(source[:size], non_blocking=True)

    def promote(self, copies: Copies) -> None:
        """From host memory to the device."""
        for units_dev, units_host in self._components:
            for item in copies.pages:
                units_dev[item.page].copy_(units_host[item.host_page], non_blocking=True)
        for item in copies.records:
            target, size = self._records_dev[item.record], item.num_bytes
            target[:size].copy_(self.records[item.host_record, :size], non_blocking=True)


def _allocate(allocate: Allocate, name: str, unit_bytes: int, num_units: int) -> Tensor:
    if not num_units or not unit_bytes:
        return torch.empty((num_units, unit_bytes), dtype=torch.uint8)
    return torch.from_numpy(allocate(name, unit_bytes, num_units)).view(num_units, unit_bytes)


def _pin(*memory: Tensor) -> None:
    """Lock it for copies that run beside computing. Not run on a GPU yet: there the host must not read what was copied
    away before the stream has passed the copy."""
    runtime: Any = torch.cuda.cudart()
    for item in memory:
        if item.numel():
            torch.cuda.check_error(runtime.cudaHostRegister(item.data_ptr(), item.numel(), 0))
