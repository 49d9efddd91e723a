"""HiSparse sizes: how many C4 rows of a long request stay on the device, and what that saves. Pure, no torch.

A decoding request is *resident*, with every page on the device whole, or *spilled*: its full pages then lie in host
memory too, and on the device most of them are thin. A **whole page** has a unit in every paged component, a **thin
page** in all but C4. A spilled request has whole pages for its newest rows, and for its first G pages, whose C4 units
are its hot buffer; index rows, C128 rows and rings stay as they are. Called by whoever divides a decode worker's
memory, by the kernels for the shape of a buffer, and by `python -m bench capacity`. All bytes follow from the
descriptors of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.layout import Component, Descriptor, IndexSpace, StateLayout
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS

HOT_FACTOR = 8
"""Hot rows for each row that a step picks: most picks were picked in one of the last steps too."""

NEWEST_PAGES = 2
"""Whole pages of newest rows: the one that is written, and the full one before it until its copy on the host is made,
for which there are 256 tokens of time."""

SPARE_THIN_PAGES = 1
"""Thin pages of a spilled request beyond all but its newest: what its newest full page becomes once it is copied. Until
then a whole page is in its place, and of neither kind can the other be made."""

NUM_HOT_MAX = 2**15 - 1
"""Hot rows are numbered in 16 bits."""

_STATE_BYTES_HOT = 4 + 2 + 1  # a hot row's entry, its place in the order of use, its flags
_STATE_BYTES_ENTRY = 2  # the hot row of an entry


@dataclass(frozen=True, slots=True, kw_only=True)
class HotShape:
    """One layer of the hot buffer of one request."""

    num_hot: int  # hot rows, each with any entry; they fill whole pages
    num_entries: int  # that a request has at most

    @property
    def state_bytes(self) -> int:
        """Of what says which row holds what."""
        return self.num_hot * _STATE_BYTES_HOT + self.num_entries * _STATE_BYTES_ENTRY

    def num_hot_pages(self, rows_per_page: int) -> int:
        """Pages whose C4 units are the hot rows: G."""
        assert self.num_hot % rows_per_page == 0, "hot rows do not fill their pages"
        return self.num_hot // rows_per_page


def hot_shape(
    layout: StateLayout, *, index_topk: int, num_drafts: int, num_tokens_max: int, num_hot: int | None = None
) -> HotShape:
    """The shape of a layout's hot buffers, with `num_hot` rows rounded up to whole pages; if it is not given, as many
    as HOT_FACTOR x index_topk, or more where drafts need it.

    Raises ConfigError without C4 layers, and for a `num_hot` that one step's picks, of the newest token and each draft,
    may not fit into.
    """
    c4 = _c4(layout)
    least = (num_drafts + 1) * index_topk
    if num_hot is None:
        num_hot = max(HOT_FACTOR * index_topk, least)
    num_hot = -(-num_hot // c4.num_rows) * c4.num_rows
    if num_hot < least:
        raise ConfigError(
            f"a hot buffer of {num_hot} rows is too small: a step with {num_drafts} drafts picks up to "
            f"{num_drafts + 1} x {index_topk} = {least} rows, which must be on the device together"
        )
    if num_hot > NUM_HOT_MAX:
        largest = NUM_HOT_MAX // c4.num_rows * c4.num_rows
        raise ConfigError(f"a hot buffer has {largest} rows at most, not {num_hot}")
    return HotShape(num_hot=num_hot, num_entries=-(-num_tokens_max // PAGE_TOKENS) * c4.num_rows)


def whole_pages(layout: StateLayout, shape: HotShape) -> int:
    """Whole pages of a spilled request that has as many: those of its hot rows, and those of its newest rows."""
    return shape.num_hot_pages(_c4(layout).num_rows) + NEWEST_PAGES


def hot_bytes(layout: StateLayout, shape: HotShape) -> int:
    """Device bytes of C4 rows of one long spilled request, hot and newest ones, with the state that belongs to them."""
    return whole_pages(layout, shape) * _c4(layout).unit_bytes + _state_bytes(layout, shape)


def resident_bytes(layout: StateLayout, num_tokens: int) -> int:
    """Device bytes of a request of `num_tokens` tokens with all rows there."""
    return sum(layout.allocated_bytes(num_tokens).values())


def spilled_bytes(layout: StateLayout, shape: HotShape, num_tokens: int) -> int:
    """Device bytes that a spilled request of `num_tokens` tokens needs. One that has no more pages than are whole
    anyway saves none of them, and takes the state of a hot buffer on top."""
    num_pages = -(-num_tokens // PAGE_TOKENS)
    num_saved = max(num_pages - whole_pages(layout, shape), 0)
    saved = num_saved * _c4(layout).unit_bytes - (SPARE_THIN_PAGES * _thin_bytes(layout) if num_saved else 0)
    return resident_bytes(layout, num_tokens) - saved + _state_bytes(layout, shape)


def host_bytes(layout: StateLayout, num_tokens: int) -> int:
    """Host bytes of a spilled request: its full pages, whole, so that they serve a restart and the store too."""
    return num_tokens // PAGE_TOKENS * layout.page_bytes


def tokens_worth_spilling(layout: StateLayout, shape: HotShape) -> int:
    """From this length on, in whole pages, a request takes less of the device spilled than resident."""
    extra = SPARE_THIN_PAGES * _thin_bytes(layout) + _state_bytes(layout, shape)
    return (whole_pages(layout, shape) + extra // _c4(layout).unit_bytes + 1) * PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Requests of one length in a device's bytes for cached state, and bytes of one of them."""

    num_tokens: int
    resident_bytes: int
    spilled_bytes: int
    hot_bytes: int  # of the spilled ones
    host_bytes: int
    num_resident: int  # when none is spilled
    num_spilled: int  # when all are but one

    @property
    def gain(self) -> float:
        """How many times as many requests, in the limit of a large device: the ratio of their bytes."""
        return self.resident_bytes / self.spilled_bytes

    @property
    def gain_here(self) -> float:
        """How many times as many requests on this device; 0 if it holds none."""
        return self.num_spilled / self.num_resident if self.num_resident else 0.0


def capacity(layout: StateLayout, shape: HotShape, *, num_tokens: int, device_bytes: int) -> Capacity:
    """Requests that `device_bytes` hold. A request arrives resident and is spilled afterwards, so one of them is
    counted as resident: the room in which the next one arrives."""
    resident, spilled = resident_bytes(layout, num_tokens), spilled_bytes(layout, shape, num_tokens)
    num_resident = device_bytes // resident
    return Capacity(
        num_tokens=num_tokens,
        resident_bytes=resident,
        spilled_bytes=spilled,
        hot_bytes=hot_bytes(layout, shape),
        host_bytes=host_bytes(layout, num_tokens),
        num_resident=num_resident,
        num_spilled=(device_bytes - resident) // spilled + 1 if num_resident else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Pages of a rank. Whole ones have the ids 0 .. num_pages - 1, thin ones the num_thin after them."""

    num_pages: int
    num_thin: int


def divide_spilled(
    layout: StateLayout, shape: HotShape, *, device_bytes: int, num_buffers: int, num_thin: int | None
) -> Division:
    """Divides a rank's bytes for pages into whole and thin ones; the state of `num_buffers` hot buffers comes off
    first.

    Without a `num_thin`, what lets `num_buffers` requests of equal length, as long as possible, be spilled while one
    more of that length is resident. With L pages each, W of them whole, that takes num_buffers x W + L whole pages and
    num_buffers x (L - W + 1) thin ones (`SPARE_THIN_PAGES`), none where L is not above W. Bytes that requests of the
    greatest length leave become whole pages.

    Raises ConfigError if the whole pages are not the W of each buffer and one more, for a request to begin in.
    """
    assert num_buffers >= 0
    assert num_thin is None or num_thin >= 0
    c4, whole = _c4(layout), whole_pages(layout, shape)
    thin_bytes = _thin_bytes(layout)
    state_bytes = num_buffers * _state_bytes(layout, shape)
    left = device_bytes - state_bytes
    if num_thin is None:
        for_buffers = num_buffers * (whole * c4.unit_bytes + SPARE_THIN_PAGES * thin_bytes)
        length = (left - for_buffers) // (layout.page_bytes + num_buffers * thin_bytes)
        length = min(length, shape.num_entries // c4.num_rows)
        num_thin = num_buffers * (length - whole + SPARE_THIN_PAGES) if length > whole else 0
    num_pages = max(left - num_thin * thin_bytes, 0) // layout.page_bytes
    needed = num_buffers * whole + 1
    if num_pages < needed:
        raise ConfigError(
            f"{num_buffers} hot buffers need {num_buffers} x {whole} + 1 = {needed} whole pages of {layout.page_bytes} "
            f"bytes: each {whole - NEWEST_PAGES} for {shape.num_hot} hot rows and {NEWEST_PAGES} for the newest, and "
            f"one for a request to begin in; {device_bytes} bytes hold {num_pages}, beside {num_thin} thin pages of "
            f"{thin_bytes} bytes and {state_bytes} bytes of state"
        )
    return Division(num_pages=num_pages, num_thin=num_thin)


def _state_bytes(layout: StateLayout, shape: HotShape) -> int:
    """Of one hot buffer, in all layers."""
    return len(_c4(layout).layers) * shape.state_bytes


def _thin_bytes(layout: StateLayout) -> int:
    """Of one thin page."""
    return layout.page_bytes - _c4(layout).unit_bytes


def _c4(layout: StateLayout) -> Descriptor:
    item = layout.find(Component.C4)
    if item is None:
        raise ConfigError("the model has no layers that pick rows: there is nothing to spill")
    assert item.space is IndexSpace.PAGE
    return item
