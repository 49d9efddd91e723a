"""What of a device's memory a cache still keeps. Called by the harnesses whose memory is gone once it was copied away:
what was copied without being given up stays."""

from __future__ import annotations

from dataclasses import dataclass

from engine.worker.cache.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    pages: frozenset[int] = frozenset()
    records: frozenset[int] = frozenset()


def kept_by(cache: PrefixCache | None) -> Kept:
    """When a plan has just been made: what it copies and is not among these was given up for it."""
    if cache is None:
        return Kept()
    found = [cache.look(key, page=True, tail=True) for key, _ in cache.contents() if cache.has_page(key)]
    return Kept(
        pages=frozenset(page.page for left in found if left for page, _ in left.pages),
        records=frozenset(tail.record for left in found if left for tail, _, _ in left.tails),
    )
