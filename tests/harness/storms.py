"""Storms over a prefill and a decode worker's schedulers, and over one of both roles: opens, hand-overs and cancels in
any order, and what must be true after them."""

from __future__ import annotations

from collections.abc import Callable

from fake_state import answer, logprob_of

from engine.worker.events import SequenceKey, TokenEvent
from rorqual.sampling import SamplingParams
from tests.harness.benches import Bench, Pair, a_prompt, a_related_prompt


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


class Alone:
    """One worker of both roles, and what was asked of it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
        self.cancelled: set[int] = set()

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
            case "cancel":
                if self.bench.scheduler.cancel(SequenceKey(value)):
                    self.cancelled.add(value)
            case "send" | "receive" | "turn":
                for _ in range(value):
                    if name != "receive":
                        self.bench.send()
                    if name != "send":
                        self.bench.receive()

    def finish(self) -> None:
        work = sum(len(prompt) + max_tokens for prompt, max_tokens, _, _ in self.opened.values())
        self.bench.run(steps_max=20 * work + 100)
        self.bench.scheduler.check_all()
        for key, (prompt, max_tokens, ignore_eos, params) in self.opened.items():
            expected = answer(prompt, max_tokens, params, ignore_eos=ignore_eos)
            got = self.bench.tokens(key)
            assert got == (expected[: len(got)] if key in self.cancelled else expected)
            wants_scores = params.prompt_logprobs is not None
            scores = [logprob_of(prompt[index], index) for index in range(1, len(prompt)) if wants_scores]
            assert self.bench.scores[key] == (scores if got else scores[: len(self.bench.scores[key])])
