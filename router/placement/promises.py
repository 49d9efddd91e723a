"""Prompts on their way: what workers will keep once they have computed what they were given. Pure.

Belongs to one policy. Workers tell of pages when these are there; prompts that arrive together would else be placed as
if none of them existed. A promise ends when the prompt is computed: by then the picture knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import numpy as np

from kvstore.keys import PageKey
from router.placement.cache import Bools, Found, Int32s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    keys: tuple[PageKey, ...]  # that the worker does not have yet
    worker: int


class Promises:
    """Bounded by `prompts_max`: beyond, the oldest promise is forgotten. For each page it knows the workers that it is
    promised to as the bits of one integer: a prompt that begins like many is compared with all promises at once, in
    0.1 ms for 390 pages, where going through them took 10 ms once hundreds of workers computed the same head."""

    def __init__(self, *, prompts_max: int = 20_000) -> None:
        self._prompts_max = prompts_max
        self._by_number: dict[int, _Promise] = {}
        self._pages = _Workers()
        self._ends = _Workers()  # for the last two pages of a prompt

    def __len__(self) -> int:
        return len(self._by_number)

    def promise(self, number: int, *, worker: int, keys: tuple[PageKey, ...], num_present: int = 0) -> None:
        """`num_present` leading pages are there already, or promised before."""
        assert number not in self._by_number, f"request {number} is promised already"
        if num_present >= len(keys):
            return
        if len(self._by_number) >= self._prompts_max:
            self.forget(next(iter(self._by_number)))
        promise = _Promise(keys=keys[num_present:], worker=worker)
        self._by_number[number] = promise
        self._pages.add(promise.keys, worker)
        self._ends.add(promise.keys[-ENDS:], worker)

    def forget(self, number: int) -> None:
        """A number that is not promised is ignored: it had no new page, or was too old."""
        promise = self._by_number.pop(number, None)
        if promise is not None:
            self._pages.remove(promise.keys, promise.worker)
            self._ends.remove(promise.keys[-ENDS:], promise.worker)

    def added_to(self, found: Found, keys: Sequence[PageKey]) -> Found:
        """What will be there once all promises are kept: of leading pages, and of boundaries to resume behind, which
        are those at the ends of promised prompts. `found` is what is there now; it is not changed."""
        pages_W, tail_W = found.pages_W.copy(), found.tail_W.copy()
        # What is computed, and all before it, is on the device.
        on_device = tuple(array.copy() for array in found.on_device) if found.has_host else (pages_W, tail_W)
        reached = [pages_W] if on_device[0] is pages_W else [pages_W, on_device[0]]
        bits_D = self._pages.of(keys, num_there=int(pages_W.max(initial=0)))
        workers = np.flatnonzero(_unpacked([reduce(or_, bits_D, 0)], len(pages_W))[0])
        if len(workers):
            is_promised_DV = _unpacked(bits_D, len(pages_W))[:, workers]
            reached_V = _reached(is_promised_DV, reached[-1][workers])
            reached[-1][workers] = reached_V
            # Promises begin behind what is on the device, and mostly go further than host memory.
            rest = np.flatnonzero(reached_V < pages_W[workers]) if found.has_host else ()
            pages_W[workers] = np.maximum(pages_W[workers], reached_V)
            if len(rest):
                pages_W[workers[rest]] = _reached(is_promised_DV[:, rest], pages_W[workers[rest]])
            ends = self._ends.of(keys[: len(bits_D)], num_there=len(bits_D))
            depths = [depth for depth, bits in enumerate(ends, start=1) if bits]
            is_end = _unpacked([bits for bits in ends if bits], len(pages_W))
            at, worker = np.divmod(np.flatnonzero(is_end), len(pages_W))
            depth = np.array(depths, np.int32)[at]
            for array_W, tails_W in zip(reached, (tail_W, on_device[1]), strict=False):
                is_reached = array_W[worker] >= depth
                np.maximum.at(tails_W, worker[is_reached], depth[is_reached])
        return replace(
            found,
            pages_W=pages_W,
            tail_W=tail_W,
            device_pages_W=on_device[0],
            device_tail_W=on_device[1],
        )


ENDS = 2
"""A tail may be taken behind the last page or the one before it: both count as ends of a prompt."""


class _Workers:
    """The workers that each page is promised to."""

    def __init__(self) -> None:
        # Bit w: worker w. Many dicts, since one of 200,000 pages stops the router for 15 ms when it makes room.
        self._shards: list[dict[PageKey, int]] = [{} for _ in range(256)]
        self._more: dict[tuple[PageKey, int], int] = {}  # promises of one page to one worker beyond the first

    def add(self, keys: Sequence[PageKey], worker: int) -> None:
        shards, bit = self._shards, 1 << worker
        for key in keys:
            shard = shards[key[0]]
            bits = shard.get(key, 0)
            if bits & bit:
                self._more[key, worker] = self._more.get((key, worker), 0) + 1
            else:
                shard[key] = bits | bit

    def remove(self, keys: Sequence[PageKey], worker: int) -> None:
        shards, bit = self._shards, 1 << worker
        for key in keys:
            num_more = self._more.get((key, worker), 0) if self._more else 0
            if num_more > 1:
                self._more[key, worker] = num_more - 1
            elif num_more:
                del self._more[key, worker]
            elif bits := shards[key[0]][key] & ~bit:
                shards[key[0]][key] = bits
            else:
                del shards[key[0]][key]

    def of(self, keys: Sequence[PageKey], *, num_there: int) -> list[int]:
        """Of these pages in order, up to the first behind `num_there` that is promised to nobody: what comes after it
        reaches nobody's pages."""
        shards = self._shards
        bits_D: list[int] = []
        for depth, key in enumerate(keys, start=1):
            bits = shards[key[0]].get(key, 0)
            if not bits and depth > num_there:
                break
            bits_D.append(bits)
        return bits_D


def _unpacked(bits_D: Sequence[int], num_workers: int) -> Bools:
    """bool [depths, workers]."""
    num_bytes = -(-num_workers // 8)
    packed = b"".join([bits.to_bytes(num_bytes, "little") for bits in bits_D])
    array = np.frombuffer(packed, np.uint8).reshape(len(bits_D), num_bytes)
    return np.unpackbits(array, axis=1, count=num_workers, bitorder="little").view(np.bool_)


def _reached(is_promised_DV: Bools, pages_V: Int32s) -> Int32s:
    """How far pages reach that are there or promised, of some workers: where they have none of either for the first
    time."""
    num_depths = len(is_promised_DV)
    is_there_VD = is_promised_DV.T | (np.arange(num_depths, dtype=np.int32) < pages_V[:, None])
    reached_V = is_there_VD.argmin(axis=1).astype(np.int32)
    return np.where(is_there_VD.all(axis=1), np.maximum(pages_V, num_depths), reached_V).astype(np.int32)
