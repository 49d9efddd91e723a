"""Two real ranks: what one has computed the other reads, and goes on with as if it had computed it itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.plan import (
    Expose,
    Fetch,
    Fetched,
    Lent,
    PeerClose,
    PeerOpen,
    PeerOpened,
    RecordFetch,
    Restore,
    Segment,
    SlotOpen,
    StepPlan,
    StepResult,
)
from kvstore.pages import pages_for
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from tests.harness.ranks import RankUnderTest
from tests.harness.system import IDS_CONFIG, make_checkpoint

pytestmark = pytest.mark.minutes

NUM_DECODED = 40
LENGTHS = (3, 256, 701)
"""Prompts: nothing pooled yet; no record of a partial page; two full pages and something of everything."""

COMPONENTS = ("c4", "c4_index", "c128")


def a_prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, IDS_CONFIG["vocab_size"], length).tolist()


def some_sampling(length: int) -> SamplingParams:
    """The penalty is of prompt and output: a rank must know all tokens of what it takes over."""
    return SamplingParams(seed=length, repetition_penalty=1.2, temperature=0.8)


class Driver:
    """Numbers the plans of one rank and finds its pages, without ever giving one back."""

    def __init__(self, rank: RankUnderTest) -> None:
        self.rank = rank
        self.ready = rank.ready()
        self._num_plans = 0
        # Not in order: pages that follow each other at one end do not at the other.
        self._pages = iter(np.random.default_rng(rank.process.pid).permutation(self.ready.num_pages).tolist())

    def take_pages(self, count: int) -> tuple[int, ...]:
        return tuple(next(self._pages) for _ in range(count))

    def send(self, *segments: Segment, opens: Sequence[SlotOpen] = (), closes: Sequence[int] = ()) -> None:
        self._num_plans += 1
        self.rank.send(
            StepPlan(number=self._num_plans, closes=tuple(closes), opens=tuple(opens), segments=segments)
        )

    def step(
        self, *segments: Segment, opens: Sequence[SlotOpen] = (), closes: Sequence[int] = ()
    ) -> StepResult:
        self.send(*segments, opens=opens, closes=closes)
        return self.rank.expect(StepResult)

    def decode(self, slot: int, *, start: int, count: int, free: list[int]) -> list[int]:
        """Tokens sampled at positions start+1 .. start+count; `free` are pages for what does not fit."""
        tokens: list[int] = []
        for position in range(start, start + count):
            pages = (free.pop(),) if position % PAGE_TOKENS == 0 else ()
            segment = Segment(slot=slot, start=position, count=1, pages=pages, sample=True)
            [sampled] = self.step(segment).sampled
            tokens.append(sampled.token_id)
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """A prompt computed and lent."""

    prompt: list[int]
    pages: tuple[int, ...]  # all of the prompt's
    digests: tuple[int, ...]  # of the full ones
    record: RecordFetch  # into the record of the same number
    first: int  # the first token

    @property
    def full_pages(self) -> tuple[int, ...]:
        return self.pages[: len(self.prompt) // PAGE_TOKENS]


def opened(slot: int, tokens: Sequence[int], *, num_prompt: int, restore: Restore | None = None) -> SlotOpen:
    return SlotOpen(
        slot=slot,
        tokens=np.array(tokens, dtype="<i4").tobytes(),
        num_prompt=num_prompt,
        sampling=some_sampling(num_prompt),
        restore=restore,
    )


def lend(driver: Driver, length: int, *, record: int) -> Loan:
    """In chunks that end within pages, and with a plan sent before the last one's result is there."""
    prompt = a_prompt(length)
    pages = driver.take_pages(pages_for(length))
    cuts = [0, *range(200, length, 200), length]
    given = 0
    for start, end in itertools.pairwise(cuts):
        needed = pages_for(end)
        is_last = end == length
        segment = Segment(
            slot=0,
            start=start,
            count=end - start,
            pages=pages[given:needed],
            sample=is_last,
            lend=True,
            record=record if is_last else -1,
        )
        driver.send(segment, opens=() if start else [opened(0, prompt, num_prompt=length)])
        given = needed
    results = [driver.rank.expect(StepResult) for _ in cuts[1:]]
    driver.step(closes=[0])
    parts: list[Lent] = [part for result in results for part in result.lent]
    assert [part.record_bytes > 0 for part in parts] == [False] * (len(parts) - 1) + [True]
    [sampled] = results[-1].sampled
    return Loan(
        prompt=prompt,
        pages=pages,
        digests=tuple(digest for part in parts for digest in part.page_digests),
        record=RecordFetch(
            source=record,
            target=record,
            num_tokens=len(prompt),
            num_bytes=parts[-1].record_bytes,
            digest=parts[-1].record_digest,
        ),
        first=sampled.token_id,
    )


def a_fetch(number: int, loan: Loan, targets: Sequence[int], *, record: int = 0) -> Fetch:
    return Fetch(
        fetch=number,
        peer=1,
        seconds=30.0,
        source_pages=loan.full_pages,
        target_pages=tuple(targets[: len(loan.full_pages)]),
        digests=loan.digests,
        record=msgspec.structs.replace(loan.record, target=record),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    lender: Driver
    borrower: Driver
    numerics: str


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "float32": make_checkpoint(folder, IDS_CONFIG, name="plain"),
        "served": make_checkpoint(folder, IDS_CONFIG, name="quantised", weights="quantised"),
    }


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, dict[int, list[int]]]:
    """By numerics and length of prompt: the tokens of a rank that does everything by itself."""
    found: dict[str, dict[int, list[int]]] = {}
    for numerics, model in checkpoints.items():
        rank = RankUnderTest(model, numerics=numerics, exact=True)
        try:
            driver = Driver(rank)
            found[numerics] = {length: tokens_alone(driver, length) for length in LENGTHS}
        finally:
            rank.close()
    return found


def tokens_alone(driver: Driver, length: int) -> list[int]:
    prompt = a_prompt(length)
    pages = driver.take_pages(pages_for(length + NUM_DECODED))
    free = list(reversed(pages[pages_for(length) :]))
    segment = Segment(slot=0, start=0, count=length, pages=pages[: pages_for(length)], sample=True)
    [sampled] = driver.step(segment, opens=[opened(0, prompt, num_prompt=length)]).sampled
    tokens = [sampled.token_id, *driver.decode(0, start=length, count=NUM_DECODED, free=free)]
    driver.step(closes=[0])
    return tokens


@contextmanager
def a_pair(model: Path, numerics: str, transfer: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        ranks = [RankUnderTest(model, numerics=numerics, exact=True, transfer=transfer) for _ in range(2)]
        for rank in ranks:
            stack.callback(rank.close)
        lender, borrower = (Driver(rank) for rank in ranks)
        assert lender.ready.wire_id == borrower.ready.wire_id
        assert lender.ready.endpoint is not None
        lender.rank.send(Expose(active=True))
        borrower.rank.send(PeerOpen(peer=1, endpoint=lender.ready.endpoint))
        assert borrower.rank.expect(PeerOpened) == PeerOpened(peer=1)
        yield Pair(lender=lender, borrower=borrower, numerics=numerics)


@pytest.fixture(
    scope="module",
    params=[("nixl", "float32"), ("nixl", "served"), ("shm", "float32"), ("shm", "served")],
    ids="-".join,
)
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Pair]:
    transfer, numerics = request.param
    with a_pair(checkpoints[numerics], numerics, transfer) as pair:
        yield pair


def test_tokens_after_a_hand_over_are_those_of_one_rank_alone(
    pair: Pair, expected: dict[str, dict[int, list[int]]]
) -> None:
    """All are asked for at once; what is read first is decoded while the others may still come."""
    loans = [lend(pair.lender, length, record=index) for index, length in enumerate(LENGTHS)]
    borrower = pair.borrower
    targets = [borrower.take_pages(pages_for(len(loan.prompt) + NUM_DECODED)) for loan in loans]
    for index, loan in enumerate(loans):
        borrower.rank.send(a_fetch(100 + index, loan, targets[index], record=(index + 1) % len(LENGTHS)))
    for index, loan in enumerate(loans):
        fetched = borrower.rank.expect(Fetched)
        assert (fetched.fetch, fetched.error) == (100 + index, "")
        assert fetched.num_bytes > loan.record.num_bytes or not loan.full_pages
        num_pages = pages_for(len(loan.prompt))
        restore = Restore(
            num_computed=len(loan.prompt), pages=targets[index][:num_pages], record=(index + 1) % len(LENGTHS)
        )
        tokens = [*loan.prompt, loan.first]
        borrower.step(opens=[opened(index, tokens, num_prompt=len(loan.prompt), restore=restore)])
        free = list(reversed(targets[index][num_pages:]))
        decoded = borrower.decode(index, start=len(loan.prompt), count=NUM_DECODED, free=free)
        assert [loan.first, *decoded] == expected[pair.numerics][len(loan.prompt)]
    borrower.step(closes=range(len(loans)))


def test_a_page_that_was_given_to_another_sequence_is_noticed(pair: Pair) -> None:
    """The owner has broken its promise: it has computed something else where the offer says the state is."""
    loan = lend(pair.lender, 600, record=0)
    other = opened(0, [7] * 300, num_prompt=300)
    segment = Segment(slot=0, start=0, count=300, pages=loan.pages[1:], sample=False)
    pair.lender.step(segment, opens=[other])
    pair.lender.step(closes=[0])
    pair.borrower.rank.send(a_fetch(200, loan, pair.borrower.take_pages(2)))
    fetched = pair.borrower.rank.expect(Fetched)
    assert fetched.error == f"page {loan.pages[1]} of c4: digest differs"


def test_a_record_that_was_packed_anew_is_noticed(pair: Pair) -> None:
    loan = lend(pair.lender, 5, record=0)
    lend(pair.lender, 6, record=0)
    pair.borrower.rank.send(a_fetch(300, loan, ()))
    assert pair.borrower.rank.expect(Fetched).error == "record 0: digest differs"


def test_an_owner_that_is_killed_fails_its_fetches_and_nothing_else(
    checkpoints: dict[str, Path], expected: dict[str, dict[int, list[int]]]
) -> None:
    with a_pair(checkpoints["float32"], "float32", "nixl") as pair:
        loan = lend(pair.lender, 256, record=0)
        owner = pair.lender.rank.process
        owner.kill()
        owner.wait()
        borrower = pair.borrower.rank
        borrower.send(a_fetch(1, loan, pair.borrower.take_pages(1)))
        assert borrower.expect(Fetched).error.startswith(f"a read from rank#{owner.pid} ")
        borrower.send(PeerClose(peer=1))
        assert tokens_alone(pair.borrower, 256) == expected["float32"][256]
