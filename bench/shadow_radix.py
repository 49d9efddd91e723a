"""What the index costs a page: keys, match, insertion, eviction, beside one look-up in a plain dictionary.

Prompts of a fixed length share heads, as conversations do; the index is full, so that every new page evicts one. The
dictionary's look-up of the same keys is the least that any index by key can take.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from kvstore.keys import PageKey, page_keys, root_key
from kvstore.shadow_radix import Costs, EvictionOrder, ShadowRadix, TailKind
from rorqual.ids import PageId, RecordId
from rorqual.model_config import PAGE_TOKENS

PROMPT_PAGES = 50
SHARED_PAGES = 20
NUM_HEADS = 40
NUM_ROUNDS = 300
PAGES_DEFAULT = (1_000, 10_000, 100_000)
COSTS = Costs(page_bytes=899_648, tail_bytes=3_726_240, rebuild_pages=22)
ROOT = root_key(fingerprint="bench", numerics="served", wire_id="0" * 16, salt="")


@dataclass(slots=True, kw_only=True)
class Seconds:
    """Summed over pages; the counts say over how many."""

    keys: float = 0.0
    look_up: float = 0.0
    match: float = 0.0
    insert: float = 0.0
    evict: float = 0.0
    num_named: int = 0  # pages of prompts
    num_inserted: int = 0
    num_evicted: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shadow_radix", description=__doc__)
    parser.add_argument(
        "--pages", type=int, nargs="+", default=list(PAGES_DEFAULT), help="sizes of the index"
    )
    sizes = cast("list[int]", parser.parse_args(arguments).pages)
    print(f"{'order':6} {'pages':>8} {'':12}" + "".join(f"{name:>10}" for name in ROWS))
    for order in EvictionOrder:
        for num_pages in sizes:
            per_page = _per_page(_measure(order, num_pages))
            base = per_page["look-up"]
            cells = "".join(f"{1e6 * value:10.2f}" for value in per_page.values())
            print(f"{order.value:6} {num_pages:8} {'us a page':12}{cells}")
            cells = "".join(f"{value / base:9.1f}x" for value in per_page.values())
            print(f"{'':6} {'':8} {'look-ups':12}{cells}", flush=True)
    return 0


ROWS = ("keys", "look-up", "match", "insert", "evict")


def _per_page(seconds: Seconds) -> dict[str, float]:
    named, inserted, evicted = seconds.num_named, seconds.num_inserted, seconds.num_evicted
    return {
        "keys": seconds.keys / named,
        "look-up": seconds.look_up / named,
        "match": seconds.match / named,
        "insert": seconds.insert / inserted,
        "evict": seconds.evict / evicted,
    }


def _measure(order: EvictionOrder, num_pages: int) -> Seconds:
    rng = random.Random(0)
    index = ShadowRadix(costs=COSTS, order=order, num_changes_max=0)
    known: dict[PageKey, int] = {}
    number = 0
    while index.num_pages < num_pages:
        number += 1
        known.update(dict.fromkeys(_serve(index, Seconds(), _prompt(rng), number, num_pages), 0))
    seconds = Seconds()
    for _ in range(NUM_ROUNDS):
        number += 1
        keys = _serve(index, seconds, _prompt(rng), number, num_pages)
        known.update(dict.fromkeys(keys, 0))
        seconds.look_up += _timed(lambda keys=keys: [known.get(key) for key in keys])
    return seconds


def _prompt(rng: random.Random) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    head = np.arange(SHARED_PAGES * PAGE_TOKENS, dtype=np.int32) + rng.randrange(NUM_HEADS)
    rest = np.arange((PROMPT_PAGES - SHARED_PAGES) * PAGE_TOKENS, dtype=np.int32) + rng.randrange(1 << 20)
    return np.concatenate([head, rest])


def _serve(
    index: ShadowRadix,
    seconds: Seconds,
    token_ids: np.ndarray[tuple[int], np.dtype[np.int32]],
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
    seconds.evict += time.perf_counter() - written
    seconds.keys += hashed - start
    seconds.match += matched - hashed
    seconds.insert += written - matched
    seconds.num_named += len(keys)
    seconds.num_inserted += len(keys)
    seconds.num_evicted += len(evicted.pages)
    return keys


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
