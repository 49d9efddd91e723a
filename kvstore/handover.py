"""The hand-over record: all state of a sequence but its full pages, at one count of computed tokens. Pure, no torch.

Says which rows a record holds and where their bytes lie; `engine.handover` moves them. Whoever goes on after N computed
tokens reads the full pages 0 .. N // 256 - 1 and this record, and nothing else: that is the least there is to move.

A record is a list of parts, one behind the other, without gaps. A part holds rows of one component in order of
position, never of ring slot, since rings may differ in size between workers: layer by layer the data of its rows, then
their scales, in the very bytes that pools keep. What is in it, for window W and compressors of ratio r:

- window: positions N-W+1 .. N-1 of every layer. Position N-W is out of sight for the next token.
- paged components: the finished rows of the last, partial page.
- unfinished rows: those of the N mod r tokens whose row is not made yet. Where windows overlap (C4 and its index) also
  the first halves, K_a and S_a, of the r tokens before those; their second halves are never read again.
- the last streams, of position N-1: token N is sampled from them without computing anything.
- with drafts: draft window rows N-W .. N-2. The draft block at index i takes the token at i + 1, so index N-1 is not
  computed yet. Rows that were never made are zeros: drafts may be the worse for them, and decide nothing.

At a page boundary, a multiple of 256 tokens and so of every ratio, a record holds windows, first halves and streams
only: it is then the *tail* of the pages before it, from which any sequence that begins with them can go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.layout import Component, Descriptor, IndexSpace, StateLayout
from rorqual.model_config import PAGE_TOKENS

RECORD_VERSION = 2
"""Changes whenever other bytes, or the same bytes elsewhere, stand in a record or page of the same layout."""

RECORD_ALIGNMENT = 4
"""A record is a multiple of this long, zero-filled at its end: digests are made of 32-bit words."""

OVERLAPPING = (Component.C4_UNFINISHED, Component.C4_INDEX_UNFINISHED)
"""Unfinished components whose entries also pool the window before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`count` rows of a component in each of its layers."""

    component: Component
    first: int  # position of the first row; in a paged component its number within the partial page
    count: int
    halves: bool  # only K_a and S_a of every row
    offset: int  # of the first byte in the record
    num_bytes: int


def record_parts(layout: StateLayout, num_tokens: int, *, drafts: bool) -> tuple[Part, ...]:
    """The parts of a record at `num_tokens` >= 1 computed tokens, in order; empty ones are left out. `drafts` needs a
    layout with a draft window."""
    assert num_tokens >= 1, "a record without a computed token"
    parts: list[Part] = []
    offset = 0
    for descriptor in layout.descriptors:
        if descriptor.component is Component.DRAFT_WINDOW and not drafts:
            continue
        for first, count, halves in _rows(layout, descriptor, num_tokens):
            if count == 0:
                continue
            row_bytes = descriptor.row_bytes // 2 if halves else descriptor.row_bytes
            part = Part(
                component=descriptor.component,
                first=first,
                count=count,
                halves=halves,
                offset=offset,
                num_bytes=count * row_bytes * len(descriptor.layers),
            )
            parts.append(part)
            offset += part.num_bytes
    if drafts:
        assert layout.find(Component.DRAFT_WINDOW) is not None, "drafts of a model without MTP blocks"
    return tuple(parts)


def record_bytes(layout: StateLayout, num_tokens: int, *, drafts: bool) -> int:
    """Bytes of a record at `num_tokens` computed tokens, a multiple of RECORD_ALIGNMENT."""
    num_bytes = sum(part.num_bytes for part in record_parts(layout, num_tokens, drafts=drafts))
    return -(-num_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def record_bytes_max(layout: StateLayout, *, drafts: bool) -> int:
    """Bytes of the longest record: a full window, and one token short of a page. Every ratio divides a page, so every
    compressor is then one token short of a row."""
    num_pages = layout.sliding_window // PAGE_TOKENS + 2
    return record_bytes(layout, num_pages * PAGE_TOKENS - 1, drafts=drafts)


def rebuild_tokens(layout: StateLayout) -> int:
    """How many tokens before a page boundary p must be computed again to make the record at p from nothing but the
    pages before p: a multiple of PAGE_TOKENS.

    Begun with an empty window at q, layer i of L (the first is 0) is given what it was given the first time from
    q + i (W - 1) on: its window then holds only rows that were, and everything else that it reads is in the pages. A
    record at p has of the layers' own rows at most those of p - max(W - 1, r) on, for compressors of ratio r that
    overlap, and of what comes out of the last layer the streams at p - 1; its draft window rows are made of streams
    from p - W on. So q + L (W - 1) <= p - max(W, r) is enough; for the draft window no less is.
    """
    window = layout.find(Component.WINDOW)
    assert window is not None
    overlaps = [item.ratio for item in layout.descriptors if item.component in OVERLAPPING]
    size = layout.sliding_window
    span = len(window.layers) * (size - 1) + max(size, *overlaps, 1)
    return -(-span // PAGE_TOKENS) * PAGE_TOKENS


def handover_bytes(layout: StateLayout, num_tokens: int, *, drafts: bool) -> int:
    """The least that must be read to go on after `num_tokens` computed tokens: full pages and the record."""
    full_pages = num_tokens // PAGE_TOKENS
    return full_pages * layout.page_bytes + record_bytes(layout, num_tokens, drafts=drafts)


def wire_id(layout: StateLayout, fingerprint: str, *, drafts: bool, exact: bool) -> str:
    """16 hex digits, equal for two workers exactly when each can read the other's pages and records. `fingerprint` is
    the model's and its weights'. With `exact` only what was computed exactly may be read. Sizes of rings and numbers of
    pages and slots are each worker's own and do not count."""
    components = [
        [
            item.component.value,
            item.form.value,
            item.layers,
            item.ratio,
            item.width,
            item.data_bytes,
            item.scale_bytes,
            item.num_rows if item.space is IndexSpace.PAGE else None,
        ]
        for item in layout.descriptors
        if drafts or item.component is not Component.DRAFT_WINDOW
    ]
    described = {
        "record": RECORD_VERSION,
        "fingerprint": fingerprint,
        "numerics": layout.numerics.value,
        "page_tokens": PAGE_TOKENS,
        "sliding_window": layout.sliding_window,
        "drafts": drafts,
        "exact": exact,
        "components": components,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _rows(layout: StateLayout, item: Descriptor, num_tokens: int) -> Iterator[tuple[int, int, bool]]:
    """(first, count, halves) of what a record holds of one component."""
    match item.component:
        case Component.WINDOW:
            first = max(0, num_tokens - layout.sliding_window + 1)
            yield first, num_tokens - first, False
        case Component.DRAFT_WINDOW:
            first = max(0, num_tokens - layout.sliding_window)
            yield first, num_tokens - 1 - first, False
        case Component.LAST_STREAMS:
            yield num_tokens - 1, 1, False
        case Component.C4 | Component.C4_INDEX | Component.C128:
            yield 0, num_tokens % PAGE_TOKENS // item.ratio, False
        case Component.C4_UNFINISHED | Component.C4_INDEX_UNFINISHED | Component.C128_UNFINISHED:
            first = num_tokens // item.ratio * item.ratio
            if item.component in OVERLAPPING and first:
                yield first - item.ratio, item.ratio, True
            yield first, num_tokens - first, False
