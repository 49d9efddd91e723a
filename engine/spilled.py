"""Spilled sequences of a rank: their C4 rows lie in host memory, and the device keeps those that were picked lately.

Owned by the rank's `SlotTables`, written by its plans and read by `engine.pager`, in place of the page table alone
where a batch has such sequences. A sequence is spilled up to a page: the C4 rows of its pages before that are in host
pages, those behind it on the device, in whole pages, as ever. The first `num_hot_pages` of the spilled pages are whole
pages of its own too, whose C4 units are its hot rows; all other spilled pages are thin. A sequence that is not spilled
costs nothing here: neither memory nor an operation.

Which sequences are spilled, and when, is the host's decision (`engine.worker.tiers.hisparse`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.host_memory import HostMemory
from engine.kernels.hot_rows import HostRows, HotBuffers, RowBytes, make_hot_buffers
from engine.kernels.suite import Kernels
from engine.plan import HotUse, Spill
from engine.rows import decode_rows, read_rows
from kvstore.hisparse import HotShape
from kvstore.layout import Component, IndexSpace
from kvstore.pools import Pools
from rorqual.model_config import ModelConfig

NO_BUFFER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    hot: HotBuffers
    host: HostRows


@dataclass(frozen=True, slots=True)
class _Picks:
    """Of a group of decodes, in one layer."""

    first: int
    slots: Sequence[int]
    picks_Qk: Tensor


class SpilledSlots:
    """`pages_SP` are the page tables of all slots. Suffixes: B hot buffers, G pages of hot rows of each, P pages of a
    table, r rows of a page, b bytes."""

    def __init__(
        self,
        pools: Pools,
        host_memory: HostMemory,
        pages_SP: Tensor,
        *,
        shape: HotShape,
        num_buffers: int,
        kernels: Kernels,
    ) -> None:
        self._pools = pools
        self._pages_SP = pages_SP
        self._kernels = kernels
        self._pool = pools[Component.C4]
        item = self._pool.descriptor
        self._rows_per_page = item.num_rows
        self.num_buffers = num_buffers
        self.num_hot_pages = shape.num_hot // item.num_rows
        self._hot_pages_BG = torch.zeros((num_buffers, self.num_hot_pages), dtype=torch.int64)
        self._host_pages_BP = torch.zeros((num_buffers, pages_SP.shape[1]), dtype=torch.int64)
        self._first_new_B = torch.zeros(num_buffers, dtype=torch.int64)
        self._buffer_S = torch.full((pools.num_slots,), NO_BUFFER, dtype=torch.int64)
        self._counts_B4 = torch.zeros((num_buffers, 4), dtype=torch.int64)
        self._uses: list[HotUse] = []  # of those that were released
        self.buffers: list[int] = [NO_BUFFER] * pools.num_slots
        """The hot buffer of each slot."""
        self._num_spilled = 0
        self._last_picks: dict[int, list[_Picks]] = {}  # of each layer, by group of decodes
        data_hlrb, scales_hlrb = host_memory.rows(Component.C4)
        self._layers: dict[int, _Layer] = {}
        for index, layer in enumerate(item.layers):
            rows = RowBytes(
                data_Urb=self._pool.data_ulrb[:, index], scales_Urb=self._pool.scales_ulrb[:, index]
            )
            host_rows = RowBytes(data_Urb=data_hlrb[:, index], scales_Urb=scales_hlrb[:, index])
            self._layers[layer] = _Layer(
                hot=make_hot_buffers(rows, shape, unit_rows=item.unit_rows, pages_RG=self._hot_pages_BG),
                host=HostRows(rows=host_rows, pages_RP=self._host_pages_BP, first_new_R=self._first_new_B),
            )

    @property
    def num_bytes(self) -> int:
        """Of the state that says which hot row holds what."""
        return sum(
            part.nbytes
            for layer in self._layers.values()
            for part in (layer.hot.entries_RH, layer.hot.order_RH, layer.hot.lookup_RE, layer.hot.flags_RH)
        )

    def is_any(self, slots: Sequence[int]) -> bool:
        return self._num_spilled > 0 and any(self.buffers[slot] >= 0 for slot in slots)

    def num_pages(self, slot: int) -> int:
        """Of the sequence in the slot, whose C4 rows are not in its own pages."""
        buffer = self.buffers[slot]
        return 0 if buffer < 0 else int(self._first_new_B[buffer]) // self._rows_per_page

    def spill(self, item: Spill) -> None:
        """Pages from number `first` on, up to which the slot is spilled already, have their C4 rows in host pages, and
        all else in `pages`: where that is another page than before, it is copied over."""
        assert len(item.pages) == len(item.host_pages)
        assert item.first == self.num_pages(item.slot), (
            f"slot {item.slot} is not spilled up to page {item.first}"
        )
        end = item.first + len(item.pages)
        own = self._pages_SP[item.slot, item.first : end]
        pages = torch.tensor(item.pages, dtype=torch.int64)
        self._move(own, pages)
        own.copy_(pages)
        self._keep(item.slot, item.buffer, item.first, item.host_pages)
        self._warm(item.slot, item.buffer)

    def restore(self, slot: int, buffer: int, host_pages: Sequence[int]) -> None:
        """The slot was just given a page table; so many of its first pages are spilled."""
        self._keep(slot, buffer, 0, host_pages)

    def unspill(self, slot: int, pages: Sequence[int]) -> None:
        """All that is spilled of a slot has come back into these whole pages."""
        assert len(pages) == self.num_pages(slot), f"not all of slot {slot} comes back"
        self._pages_SP[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self.release(slot)

    def release(self, slot: int) -> None:
        """The slot is not spilled, if it was."""
        buffer = self.buffers[slot]
        if buffer < 0:
            return
        self.buffers[slot] = NO_BUFFER
        self._num_spilled -= 1
        self._buffer_S[slot] = NO_BUFFER
        self._first_new_B[buffer] = 0
        num_wasted = sum(layer.hot.clear(buffer) for layer in self._layers.values())
        if num_wasted:
            self._uses.append(
                HotUse(slot=slot, num_hits=0, num_misses=0, num_useful=0, num_wasted=num_wasted)
            )

    def locate(self, layer: int, slots_Q: Tensor, entries_QK: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Row ids of entries as `locate_rows` gives them, of a batch in which some are spilled. All that is wanted of a
        sequence in one call is on the device afterwards, until the next call for the same layer."""
        item = self._layers[layer]
        ids, bias, any_empty, counts_B4 = self._kernels.hot_rows(
            item.hot, item.host, self._pages_SP, slots_Q, self._buffer_S[slots_Q], entries_QK
        )
        self._counts_B4 += counts_B4
        return ids, bias, any_empty

    def picked(self, layer: int, first: int, slots: Sequence[int], picks_Qk: Tensor) -> None:
        """What the next step will mostly pick too, should one of these be spilled before it. A step has them group by
        group; `first` is the number of the group's first decode, and what earlier steps had from there on is gone."""
        groups = self._last_picks.setdefault(layer, [])
        while groups and groups[-1].first >= first:
            groups.pop()
        groups.append(_Picks(first, slots, picks_Qk))

    def read(self, layer: int, slot: int, entries: Tensor, config: ModelConfig) -> Tensor:
        """Rows f32 [*entries.shape, width] of a chunk's sequence: each that is wanted is staged once, in a buffer that
        lives as long as the call. Hot rows are left as they are: a chunk would push them all out."""
        item = self._layers[layer]
        buffer, per_page = self.buffers[slot], self._rows_per_page
        distinct, places = entries.reshape(-1).unique(return_inverse=True)
        num_spilled = int(torch.searchsorted(distinct, self._first_new_B[buffer]))
        spilled, new = distinct[:num_spilled], distinct[num_spilled:]
        host_pages, row = self._host_pages_BP[buffer, spilled // per_page], spilled % per_page
        rows = item.host.rows
        data, scales = rows.data_Urb[host_pages, row], rows.scales_Urb[host_pages, row]
        device = self._pool.bytes_ulb.device
        staged = decode_rows(self._pool.descriptor, data.to(device), scales.to(device), config)
        ids = self._pages_SP[slot, new // per_page] * item.hot.unit_rows + new % per_page
        staged = torch.cat((staged, read_rows(self._pool, layer, ids, config)))
        return staged.index_select(0, places).view(*entries.shape, -1)

    def take_uses(self) -> tuple[HotUse, ...]:
        """Since the last time, of every spilled sequence that has read rows; rows that it has not wanted until it was
        released are wasted."""
        if not self._uses and not self._num_spilled:
            return ()
        found, self._uses = self._uses, []
        found += [
            HotUse(slot=slot, num_hits=hits, num_misses=misses, num_useful=useful, num_wasted=wasted)
            for slot, buffer in enumerate(self.buffers)
            if buffer >= 0
            for hits, misses, useful, wasted in [self._counts_B4[buffer].tolist()]
            if hits or misses or useful or wasted
        ]
        self._counts_B4.zero_()
        return tuple(found)

    def _keep(self, slot: int, buffer: int, first: int, host_pages: Sequence[int]) -> None:
        if first == 0:
            assert buffer not in self.buffers, f"hot buffer {buffer} is in use"
            assert len(host_pages) >= self.num_hot_pages, "less is spilled than a hot buffer holds"
            self.buffers[slot] = buffer
            self._num_spilled += 1
            self._buffer_S[slot] = buffer
            hot = self._pages_SP[slot, : self.num_hot_pages]
            assert int(hot.max()) < self._pools.num_pages, "hot rows are those of whole pages"
            self._hot_pages_BG[buffer] = hot
        assert self.buffers[slot] == buffer, f"slot {slot} has hot buffer {self.buffers[slot]}, not {buffer}"
        end = first + len(host_pages)
        self._host_pages_BP[buffer, first:end] = torch.tensor(host_pages, dtype=torch.int64)
        self._first_new_B[buffer] = end * self._rows_per_page

    def _move(self, sources: Tensor, targets: Tensor) -> None:
        """All but the C4 rows. A whole page may be a target while it still is another's source: these are read before
        anything is written. Nothing is a source that was thin."""
        is_moved = sources != targets
        is_whole = targets < self._pools.num_pages
        assert bool((sources[is_moved] < self._pools.num_pages).all()), "a thin page is moved"
        for descriptor in self._pools.layout.descriptors:
            if descriptor.space is not IndexSpace.PAGE or descriptor.component is Component.C4:
                continue
            units = self._pools[descriptor.component].bytes_ulb
            whole = is_moved & is_whole
            read_first = units[sources[whole]]
            thin = is_moved & ~is_whole
            for source, target in zip(sources[thin].tolist(), targets[thin].tolist(), strict=True):
                units[target].copy_(units[source], non_blocking=True)
            units[targets[whole]] = read_first

    def _warm(self, slot: int, buffer: int) -> None:
        """Bring in what the sequence picked last, which the next step will mostly pick again."""
        for layer, groups in self._last_picks.items():
            group = next((group for group in reversed(groups) if slot in group.slots), None)
            if group is None:
                continue
            newest = max(query for query, other in enumerate(group.slots) if other == slot)
            item, picks_1k = self._layers[layer], group.picks_Qk[newest : newest + 1]
            self._counts_B4 += self._kernels.prefetch_rows(
                item.hot, item.host, torch.tensor([buffer]), picks_1k
            )
