"""A prefill and a decode worker's schedulers with strict ranks: any storm of opens, hand-overs and cancels ends with
the sequential answers and with nothing in use anywhere."""

from __future__ import annotations

from fake_rank import answer
from hypothesis import given, settings
from hypothesis import strategies as st

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
    st.tuples(st.just("hand over"), numbers),
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
            case _ if self.opened:
                self.move_one(name, value % len(self.opened))

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
    pair = Pair(prefill=lending(num_pages=8, **options), decode=adopting(num_pages=num_pages, **options))
    storm = Storm(pair)
    for name, value in story:
        storm.move(name, value)
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
