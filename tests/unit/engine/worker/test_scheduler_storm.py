"""A prefill and a decode worker's schedulers with strict ranks: any storm of opens, hand-overs and cancels ends with
the sequential answers and with nothing in use anywhere."""

from __future__ import annotations

import random

import pytest
from fake_rank import answer
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.scheduler import TokenEvent
from rorqual.sampling import SamplingParams
from tests.harness.benches import Pair, a_prompt, adopting, lending

# A request: prompt length, max_tokens, ignore_eos; bound before its prompt is computed, or after.
lengths = st.one_of(st.integers(1, 500), st.sampled_from([180, 250, 255, 256, 257, 440, 511, 512]))
requests = st.tuples(lengths, st.integers(2, 300), st.booleans(), st.booleans())
numbers = st.integers(0, 30)
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("open here"), requests),
    st.tuples(st.sampled_from(["bind", "begin", "begin", "end", "end", "cancel", "cancel decode"]), numbers),
    st.tuples(st.sampled_from(["hand over", "swap"]), numbers),
    st.tuples(st.just("prefill"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["send", "receive"]), st.integers(1, 4)),
    st.tuples(st.just("turn"), st.integers(1, 200)),
)


class Storm:
    """A pair of workers and what has been asked of them."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
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
        key, prompt = len(self.opened), a_prompt(len(self.opened), length)
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


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(4, 7),
    num_slots=st.integers(1, 5),
    num_records=st.integers(1, 4),
    budget=st.sampled_from([256, 512]),
    inflight=st.integers(1, 3),
    story=st.lists(moves, min_size=1, max_size=50),
)
def test_any_storm_of_hand_overs_ends_with_the_sequential_answers_and_nothing_in_use(
    num_pages: int, num_slots: int, num_records: int, budget: int, inflight: int, story: list
) -> None:
    options = {
        "num_slots": num_slots,
        "num_records": num_records,
        "prefill_tokens_max": budget,
        "plans_inflight_max": inflight,
    }
    storm = Storm(
        Pair(prefill=lending(num_pages=8, **options), decode=adopting(num_pages=num_pages, **options))
    )
    for name, value in story:
        storm.move(name, value)
    weather(storm)


@pytest.mark.parametrize("seed", range(16))
def test_a_long_storm_in_a_crowded_worker_does_too(seed: int) -> None:
    """Denser than a story that is drawn to be shrunk: many are handed over, preempted, and cancelled with plans out."""
    rng = random.Random(seed)
    options = {"num_records": rng.randint(2, 5), "plans_inflight_max": rng.randint(1, 3)}
    decode = adopting(num_pages=rng.randint(4, 8), num_slots=rng.randint(3, 6), **options)
    storm = Storm(Pair(prefill=lending(num_pages=16, num_slots=4, **options), decode=decode))
    names = {
        "open": 5, "open here": 1, "prefill": 8, "bind": 8, "begin": 8, "end": 8, "hand over": 3, "swap": 4, "send": 3,
        "receive": 3, "turn": 5, "cancel": 1, "cancel decode": 2,
    }  # fmt: skip
    for name in rng.choices(list(names), weights=names.values(), k=400):
        if not name.startswith("open"):
            storm.move(name, rng.randint(1, 30))
        elif decode.scheduler.num_sequences < 6:
            length = rng.choice([rng.randint(1, 700), 180, 250, 255, 256, 257, 440, 511, 512])
            storm.move(name, (length, rng.randint(2, 300), rng.random() < 0.8, rng.random() < 0.3))
    weather(storm)
