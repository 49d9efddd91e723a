"""Hand-made pictures of fleets, with caches whose content a test writes down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvstore.keys import PageKey
from router.placement.cache import CacheDemand, FleetPicture, Found


def keys(name: str, count: int) -> tuple[PageKey, ...]:
    """`count` keys of the prompt `name`. Prompts that begin with the same letters share a page for each letter."""
    padded = name + name[-1] * max(0, count - len(name))
    return tuple(PageKey(padded[:depth].encode().ljust(16)[-16:]) for depth in range(1, count + 1))


class Caches:
    """What each worker holds: one path of keys, and the depths of its tails. The store has the same of its own, from
    page `store_first` on. `on_device`: of workers that have some of it in host memory only, how many pages and which
    tails are on the device."""

    def __init__(
        self,
        num_workers: int,
        held: Mapping[int, tuple[tuple[PageKey, ...], Sequence[int]]],
        stored: tuple[tuple[PageKey, ...], Sequence[int]] = ((), ()),
        *,
        on_device: Mapping[int, tuple[int, Sequence[int]]] | None = None,
        store_first: int = 0,
    ) -> None:
        self._num_workers = num_workers
        self._held = held
        self._stored = stored
        self._on_device = on_device or {}
        self._store_first = store_first

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        pages_W = np.zeros(self._num_workers, np.int32)
        tail_W = np.zeros(self._num_workers, np.int32)
        for worker, (held, tails) in self._held.items():
            pages_W[worker], tail_W[worker] = _reach(keys, held, tails)
        device_pages_W, device_tail_W = (
            (pages_W, tail_W) if not self._on_device else (pages_W.copy(), tail_W.copy())
        )
        for worker, (num_pages, tails) in self._on_device.items():
            device_pages_W[worker], device_tail_W[worker] = _reach(
                keys, self._held[worker][0][:num_pages], tails
            )
        store_pages, store_tail = _reach(keys, *self._stored)
        return Found(
            pages_W=pages_W,
            tail_W=tail_W,
            device_pages_W=device_pages_W,
            device_tail_W=device_tail_W,
            store_first=self._store_first,
            store_pages=store_pages,
            store_tail=store_tail,
        )


def _reach(keys: Sequence[PageKey], held: Sequence[PageKey], tails: Sequence[int]) -> tuple[int, int]:
    depth = 0
    while depth < min(len(keys), len(held)) and held[depth] == keys[depth]:
        depth += 1
    return depth, max((tail for tail in tails if tail <= depth), default=0)


def a_fleet(
    num_workers: int = 3,
    *,
    held: Mapping[int, tuple[tuple[PageKey, ...], Sequence[int]]] | None = None,
    stored: tuple[tuple[PageKey, ...], Sequence[int]] = ((), ()),
    on_device: Mapping[int, tuple[int, Sequence[int]]] | None = None,
    store_first: int = 0,
    wait: Sequence[float] = (),
    queued: Sequence[float] = (),
    sequences: Sequence[int] = (),
    active: Sequence[int] = (),
    kept: Sequence[int] = (),
    work: Sequence[float] = (),
    draining: Sequence[int] = (),
    decoding: Mapping[int, int] | None = None,
) -> FleetPicture:
    """Everything not said is zero; `decoding` are workers that decode, with their sequences."""

    def floats(values: Sequence[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.array(values or [0.0] * num_workers, np.float64)

    def counts(values: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.array(values or [0] * num_workers, np.int32)

    decoders = decoding or {}
    return FleetPicture(
        caches=Caches(num_workers, held or {}, stored, on_device=on_device, store_first=store_first),
        can_prefill_W=np.array([number not in decoders for number in range(num_workers)]),
        can_decode_W=np.array([number in decoders for number in range(num_workers)]),
        draining_W=np.array([number in draining for number in range(num_workers)]),
        wait_seconds_W=floats(wait),
        queued_tokens_W=floats(queued),
        sequences_W=counts(sequences),
        active_pages_W=counts(active),
        pages_free_W=counts([1000] * num_workers),
        tree_pages_W=counts(kept),
        decode_sequences_W=counts([decoders.get(number, 0) for number in range(num_workers)]),
        work_seconds_W=floats(work),
    )


def a_demand(
    prompt: tuple[PageKey, ...] = (), *, number: int = 0, extra: int = 100, session: str = ""
) -> CacheDemand:
    """A prompt of these full pages and `extra` tokens."""
    return CacheDemand(number=number, keys=prompt, num_tokens=256 * len(prompt) + extra, session=session)
