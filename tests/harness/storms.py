"""Storms over a prefill and a decode worker's schedulers, and over one of both roles: opens, hand-overs and cancels in
any order, and what must be true after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from fake_rank import FakeRank
from fake_state import PAGE_TOKENS, Slot, answer, digest, logprob_of, page_digests

from engine.plan import Fetch, RecordFetch
from engine.worker.cache.imports import Import
from engine.worker.cache.prefix_cache import Packed, PageFacts
from engine.worker.events import SequenceKey, TokenEvent
from kvstore.store.contract import tenant_label
from rorqual.sampling import SamplingParams
from tests.harness.benches import Bench, FeedMirror, Pair, a_prompt, a_related_prompt


class Storm:
    """A pair of workers and what has been asked of them."""

    def __init__(self, pair: Pair, *, prompt_of: Callable[[int, int], list[int]] = a_prompt) -> None:
        self.pair = pair
        self.prompt_of = prompt_of  # of key and length
        self.opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
        self.early: set[int] = set()  # bound as soon as something can be read
        self.bound: set[int] = set()
        self.cancelled: set[int] = set()
        self.here: set[int] = set()  # opened on the decode worker, prompt and all

    def move(self, name: str, value) -> None:
        decode = self.pair.decode
        match name:
            case "open" | "open here":
                self.open(*value, is_here=name == "open here")
            case "prefill":
                for _ in range(value):
                    self.pair.prefill.step()
                    for key in self.early:
                        self.bind(key)
            case "send" | "receive" | "turn":
                for _ in range(value):
                    if name != "receive":
                        decode.send()
                    if name != "send":
                        decode.receive()
            case "swap":
                self.swap(value)
            case _ if live := self.live():
                self.move_one(name, live[value % len(live)])

    def open(self, length: int, max_tokens: int, ignore_eos: bool, early: bool, *, is_here: bool) -> None:
        key, prompt = len(self.opened), self.prompt_of(len(self.opened), length)
        bench = self.pair.decode if is_here else self.pair.prefill
        params = bench.open(key, prompt, max_tokens, ignore_eos=ignore_eos)
        self.opened[key] = (prompt, max_tokens, ignore_eos, params)
        if is_here:
            self.here.add(key)
        elif early:
            self.early.add(key)

    def move_one(self, name: str, key: int) -> None:
        match name:
            case "begin":
                self.pair.begin(key)
            case "end":
                self.pair.end(key)
            case "cancel":
                self.cancel(key)
            case "cancel decode":
                if self.pair.cancel_decode(key):
                    self.cancelled.add(key)
            case "bind":
                self.bind(key)
            case "hand over":
                self.pair.prefill.drain()
                self.bind(key)
                while self.pair.begin(key) or self.pair.end(key):
                    pass

    def bind(self, key: int) -> None:
        prefill = self.pair.prefill
        if key in self.bound | self.cancelled | self.here or self.has_ended_early(key):
            return
        if not prefill.pages[key] and key not in prefill.lent:
            return  # a sequence that waits for others must not hold what others wait for
        self.bound.add(key)
        prompt, max_tokens, ignore_eos, _ = self.opened[key]
        self.pair.bind(key, prompt, max_tokens, ignore_eos=ignore_eos)

    def cancel(self, key: int) -> None:
        """On the prefill worker; what hangs on it ends too, once its reader is done."""
        if key not in self.here and self.pair.prefill.cancel(key):
            self.cancelled.add(key)
            self.pair.cancel_decode(key)

    def swap(self, value: int) -> None:
        """One gives up its room on the decode worker while a plan uses it, and others read into it at once."""
        decode = self.pair.decode
        decode.send()
        running = [key for key in self.live() if key in self.bound | self.here]
        if running:
            self.move_one("cancel decode", running[value % len(running)])
        for key in self.opened:
            if self.pair.begin(key):
                self.pair.end(key)

    def live(self) -> list[int]:
        def events(key: int) -> list[TokenEvent]:
            return self.pair.prefill.events.get(key, []) + self.pair.decode.events.get(key, [])

        ended = {key for key in self.opened if any(event.finish_reason for event in events(key))}
        return sorted(self.opened.keys() - ended - self.cancelled)

    def has_ended_early(self, key: int) -> bool:
        """With its first token."""
        return any(event.finish_reason for event in self.pair.prefill.events.get(key, ()))

    def finish(self) -> None:
        """Bind what can be bound, let the readers read, and let the owners have everything back."""
        prefill = self.pair.prefill
        for _ in range(2 * len(self.opened) + 2):
            self.pair.drain()
            for key in self.opened.keys() - self.here:
                self.bind(key)
                if self.has_ended_early(key):
                    self.pair.cancel_decode(key)
            self.pair.drain()
            for key in list(prefill.surrendered):
                if key in self.cancelled or self.has_ended_early(key):
                    prefill.take_back(key)


def weather(storm: Storm) -> None:
    """What must be true after any storm."""
    pair = storm.pair
    storm.finish()
    pair.prefill.run()
    pair.decode.run()
    assert pair.readings == {}
    for key, (prompt, max_tokens, ignore_eos, params) in storm.opened.items():
        expected = answer(prompt, max_tokens, params, ignore_eos=ignore_eos)
        before = [] if key in storm.here else pair.prefill.tokens(key)
        got = before + (pair.decode.tokens(key) if key in storm.bound | storm.here else [])
        if key in storm.cancelled:
            assert got == expected[: len(got)]
        else:
            assert got == expected


@dataclass(kw_only=True, eq=False)
class PeerRead:
    """Pages and perhaps a tail that are read from another worker, which has all of the prompt."""

    item: Import
    prompt: list[int]
    number: int
    is_begun: bool = False

    def begin(self, rank: FakeRank) -> None:
        """From now on no plan may use what is read into."""
        self.is_begun = True
        item, rows, packed = self.item, self._slot().rows, self._packed()
        record = None
        if item.record is not None:
            record = RecordFetch(
                source=0,
                target=item.record,
                num_tokens=len(item.keys) * PAGE_TOKENS,
                num_bytes=len(packed),
                digest=digest(packed),
            )
        if not item.pages and record is None:
            return
        rank.begin_fetch(
            Fetch(
                fetch=self.number,
                peer=1,
                seconds=10.0,
                source_pages=tuple(range(item.first, len(item.keys))),
                target_pages=item.pages,
                digests=tuple(one for row in rows[item.first : len(item.keys)] for one in page_digests(row)),
                record=record,
            )
        )

    def end(self, bench: Bench) -> None:
        item, slot, packed = self.item, self._slot(), self._packed()
        owner = FakeRank(num_pages=len(slot.rows), num_slots=1, prefill_tokens_max=256, num_records=1)
        owner.memory = list(slot.rows)
        owner.records = [packed]
        if self.number in bench.rank.fetches:
            assert bench.rank.end_fetch(self.number, owner).error == ""
        bench.scheduler.imports.end(
            item,
            facts=[
                PageFacts(digests=page_digests(rows), tenant=tenant_label(""))
                for rows in slot.rows[item.first : len(item.keys)]
            ],
            tail_depth=len(item.keys) if item.record is not None else 0,
            packed=Packed(num_bytes=len(packed), digest=digest(packed)),
        )

    def _slot(self) -> Slot:
        slot = Slot(
            tokens=self.prompt, num_prompt=1, sampling=SamplingParams(seed=0), tokens_max=len(self.prompt)
        )
        slot.compute(len(self.prompt))
        return slot

    def _packed(self) -> bytes:
        return self._slot().pack(len(self.item.keys) * PAGE_TOKENS)


class Alone:
    """One worker of both roles, and what was asked of it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.mirror = FeedMirror(bench)
        self.opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
        self.cancelled: set[int] = set()
        self.reads: list[PeerRead] = []
        self.numbers = count(1)  # of reads

    def open(self, prompt: list[int], max_tokens: int, ignore_eos: bool, scores: bool) -> None:
        key = len(self.opened)
        room = self.bench.scheduler.config.sequence_tokens_max - max_tokens
        prompt = prompt[:room]
        extra = {"prompt_logprobs": 0} if scores else {}
        params = self.bench.open(key, prompt, max_tokens, ignore_eos=ignore_eos, **extra)
        self.opened[key] = (prompt, max_tokens, ignore_eos, params)

    def move(self, name: str, value) -> None:
        match name:
            case "open":
                length, *rest = value
                self.open(a_related_prompt(len(self.opened), length), *rest)
            case "go on" if self.opened:
                key = value[0] % len(self.opened)
                self.open(self.opened[key][0] + self.bench.tokens(key) + [3, 4], value[1], True, False)
            case "read" if self.opened:
                self.read(self.opened[value % len(self.opened)][0], with_record=value % 3 > 0)
            case "read on" if self.reads:
                self.read_on(self.reads[value % len(self.reads)])
            case "cancel":
                if self.bench.scheduler.cancel(SequenceKey(value)):
                    self.cancelled.add(value)
            case "send" | "receive" | "turn":
                for _ in range(value):
                    if name != "receive":
                        self.bench.send()
                    if name != "send":
                        self.bench.receive()
        self.mirror.follow()

    def read(self, prompt: list[int], *, with_record: bool) -> None:
        """Another worker has this prompt: take room for what is missing of it."""
        cache = self.bench.scheduler.cache
        assert cache is not None
        keys = cache.keys_of(np.array(prompt, dtype=np.int32), salt="")
        item = self.bench.scheduler.imports.begin(keys, with_record=with_record) if keys else None
        if item is not None:
            self.reads.append(PeerRead(item=item, prompt=prompt, number=next(self.numbers)))

    def read_on(self, read: PeerRead) -> None:
        """Begin to read into the room once that may be, or end."""
        bench = self.bench
        if not read.is_begun:
            if read.item.after <= bench.scheduler.last_applied:
                read.begin(bench.rank)
            return
        self.reads.remove(read)
        read.end(bench)
        bench.scheduler.check_all()

    def finish(self) -> None:
        while self.reads:
            self.bench.drain()
            for read in list(self.reads):
                # Nobody else has to do anything for the room to become free of plans.
                assert read.is_begun or read.item.after <= self.bench.scheduler.last_applied
                self.read_on(read)
        work = sum(len(prompt) + max_tokens for prompt, max_tokens, _, _ in self.opened.values())
        self.bench.run(steps_max=20 * work + 100)
        self.bench.scheduler.check_all()
        self.mirror.follow()
        for key, (prompt, max_tokens, ignore_eos, params) in self.opened.items():
            expected = answer(prompt, max_tokens, params, ignore_eos=ignore_eos)
            got = self.bench.tokens(key)
            assert got == (expected[: len(got)] if key in self.cancelled else expected)
            wants_scores = params.prompt_logprobs is not None
            scores = [logprob_of(prompt[index], index) for index in range(1, len(prompt)) if wants_scores]
            assert self.bench.scores[key] == (scores if got else scores[: len(self.bench.scores[key])])
