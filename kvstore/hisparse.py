"""HiSparse sizes: how many C4 rows of a long request stay on the device, and what that saves. Pure, no torch.

A decoding request is *resident*, with every page on the device, or *spilled*: its full pages then lie in host memory,
and the device keeps of its C4 rows only a hot buffer and the newest; index rows, C128 rows and rings stay. Called by
whoever divides a decode worker's memory, by the kernels for the shape of a buffer, and by `python -m bench capacity`.
All bytes follow from the descriptors of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.layout import Component, Descriptor, IndexSpace, StateLayout
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS

HOT_FACTOR = 8
"""Hot rows for each row that a step picks: most picks were picked in one of the last steps too."""

NEWEST_PAGES = 2
"""Pages of newest rows, a ring: while one is written the one before is copied to the host, with 256 tokens of time."""

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
    """The shape of a layout's hot buffers; `num_hot` is HOT_FACTOR x index_topk, or more where drafts need it, if not
    given.

    Raises ConfigError without C4 layers, and for a `num_hot` that one step's picks, of the newest token and each draft,
    may not fit into.
    """
    c4 = _c4(layout)
    least = (num_drafts + 1) * index_topk
    if num_hot is None:
        num_hot = max(HOT_FACTOR * index_topk, least)
    if num_hot < least:
        raise ConfigError(
            f"a hot buffer of {num_hot} rows is too small: a step with {num_drafts} drafts picks up to "
            f"{num_drafts + 1} x {index_topk} = {least} rows, which must be on the device together"
        )
    if num_hot > NUM_HOT_MAX:
        raise ConfigError(f"a hot buffer has {NUM_HOT_MAX} rows at most, not {num_hot}")
    return HotShape(
        num_hot=num_hot,
        num_entries=-(-num_tokens_max // PAGE_TOKENS) * c4.num_rows,
    )


def hot_bytes(layout: StateLayout, shape: HotShape) -> int:
    """Device bytes of one request's hot buffer over all C4 layers, with the state that belongs to it."""
    c4 = _c4(layout)
    rows = shape.num_hot + NEWEST_PAGES * c4.num_rows
    return len(c4.layers) * (rows * c4.row_bytes + shape.state_bytes)


def resident_bytes(layout: StateLayout, num_tokens: int) -> int:
    """Device bytes of a request of `num_tokens` tokens with all rows there."""
    return sum(layout.allocated_bytes(num_tokens).values())


def spilled_bytes(layout: StateLayout, shape: HotShape, num_tokens: int) -> int:
    """Device bytes of a spilled request of `num_tokens` tokens: no C4 pages, but a hot buffer."""
    taken = layout.allocated_bytes(num_tokens)
    return sum(taken.values()) - taken[Component.C4.value] + hot_bytes(layout, shape)


def host_bytes(layout: StateLayout, num_tokens: int) -> int:
    """Host bytes of a spilled request: its full pages, whole, so that they serve a restart and the store too."""
    return num_tokens // PAGE_TOKENS * layout.page_bytes


def tokens_worth_spilling(layout: StateLayout, shape: HotShape) -> int:
    """From this length on, in whole pages, a request takes less of the device spilled than resident."""
    return (hot_bytes(layout, shape) // _c4(layout).unit_bytes + 1) * PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Requests of one length in a device's bytes for cached state, and bytes of one of them."""

    num_tokens: int
    resident_bytes: int
    spilled_bytes: int
    hot_bytes: int  # of the spilled ones
    host_bytes: int
    num_resident: int
    num_spilled: int

    @property
    def gain(self) -> float:
        """How many times as many requests, before rounding to whole ones."""
        return self.resident_bytes / self.spilled_bytes


def capacity(layout: StateLayout, shape: HotShape, *, num_tokens: int, device_bytes: int) -> Capacity:
    resident, spilled = resident_bytes(layout, num_tokens), spilled_bytes(layout, shape, num_tokens)
    return Capacity(
        num_tokens=num_tokens,
        resident_bytes=resident,
        spilled_bytes=spilled,
        hot_bytes=hot_bytes(layout, shape),
        host_bytes=host_bytes(layout, num_tokens),
        num_resident=device_bytes // resident,
        num_spilled=device_bytes // spilled,
    )


def _c4(layout: StateLayout) -> Descriptor:
    item = layout.find(Component.C4)
    if item is None:
        raise ConfigError("the model has no layers that pick rows: there is nothing to spill")
    assert item.space is IndexSpace.PAGE
    return item
