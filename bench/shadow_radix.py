"""What the index costs a page: keys, match, insertion, eviction, beside one look-up in a plain dictionary.

Prompts of a fixed length share heads, as conversations do; the index is full, so that every new page evicts one. The
dictionary's look-up of the same keys is the least that any index by key can take.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from kvstore.keys import PageKey, page_keys, root_key
from kvstore.shadow_radix import Costs, EvictionOrder, ShadowRadix, TailKind
from rorqual.ids import PageId, RecordId
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray

PROMPT_PAGES = 50
SHARED_PAGES = 20
NUM_HEADS = 40
NUM_ROUNDS = 300
PAGES_DEFAULT = (1_000, 10_000, 100_000)
COSTS = Costs(page_bytes=899_648, tail_bytes=3_726_240, rebuild_pages=22)
COLUMNS = ("keys", "look_up", "match", "insert", "evict")
ROOT = root_key(fingerprint="bench", numerics="served", wire_id="0" * 16, salt="")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds a page, one for each prompt: medians, since the machine may be busy with other things."""

    keys: list[float] = field(default_factory=list[float])
    look_up: list[float] = field(default_factory=list[float])
    match: list[float] = field(default_factory=list[float])
    insert: list[float] = field(default_factory=list[float])  # pinning what is there and adding what is not
    evict: list[float] = field(default_factory=list[float])  # for each page evicted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shadow_radix", description=__doc__)
    parser.add_argument(
        "--pages", type=int, nargs="+", default=list(PAGES_DEFAULT), help="sizes of the index"
    )
    sizes = cast("list[int]", parser.parse_args(arguments).pages)
    print(f"{'order':6} {'pages':>8} {'':12}" + "".join(f"{name:>10}" for name in COLUMNS))
    for order in EvictionOrder:
        for num_pages in sizes:
            times = _measure(order, num_pages)
            per_page = [statistics.median(getattr(times, name)) for name in COLUMNS]
            base = statistics.median(times.look_up)
            cells = "".join(f"{1e6 * value:10.2f}" for value in per_page)
            print(f"{order.value:6} {num_pages:8} {'us a page':12}{cells}")
            cells = "".join(f"{value / base:9.1f}x" for value in per_page)
            print(f"{'':6} {'':8} {'look-ups':12}{cells}", flush=True)
    return 0


def _measure(order: EvictionOrder, num_pages: int) -> Times:
    rng = random.Random(0)
    index = ShadowRadix(costs=COSTS, order=order, num_changes_max=0)
    known: dict[PageKey, int] = {}
    number = 0
    while index.num_pages < num_pages:
        number += 1
        known.update(dict.fromkeys(_serve(index, Times(), _prompt(rng), number, num_pages), 0))
    times = Times()
    for _ in range(NUM_ROUNDS):
        number += 1
        keys = _serve(index, times, _prompt(rng), number, num_pages)
        known.update(dict.fromkeys(keys, 0))
        times.look_up.append(_timed(lambda keys=keys: [known.get(key) for key in keys]) / len(keys))
    return times


def _prompt(rng: random.Random) -> TokenArray:
    head = np.arange(SHARED_PAGES * PAGE_TOKENS, dtype=np.int32) + rng.randrange(NUM_HEADS)
    rest = np.arange((PROMPT_PAGES - SHARED_PAGES) * PAGE_TOKENS, dtype=np.int32) + rng.randrange(1 << 20)
    return np.concatenate([head, rest])


def _serve(
    index: ShadowRadix,
    times: Times,
    token_ids: TokenArray,
    number: int,
    num_pages_max: int,
) -> tuple[PageKey, ...]:
    """One prompt through the index: matched, pinned, written, released, with a tail at its end."""
    start = time.perf_counter()
    keys = page_keys(ROOT, token_ids)
    hashed = time.perf_counter()
    match = index.match(keys)
    matched = time.perf_counter()
    pin = index.pin(keys, num_pages=match.num_pages, tail_depth=match.resumable)
    for depth in range(match.num_pages, len(keys)):
        index.extend(pin, keys[depth], PageId(number * PROMPT_PAGES + depth))
    index.insert_tail(keys[-1], RecordId(number), kind=TailKind.PROMPT_END)
    index.release(pin)
    written = time.perf_counter()
    evicted = index.evict_pages(index.num_pages - num_pages_max)
    done = time.perf_counter()
    times.keys.append((hashed - start) / len(keys))
    times.match.append((matched - hashed) / len(keys))
    times.insert.append((written - matched) / len(keys))
    if evicted.pages:
        times.evict.append((done - written) / len(evicted.pages))
    return keys


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
