"""Prefill workers read what decode workers have generated, and a new router knows what all of them keep: real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rorqual.ids import SequenceId
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import Open, PeerFetch, SequenceReport
from tests.harness.failures import endpoint_of, spoil
from tests.harness.pools import Member, Pools
from tests.harness.raw_session import raw_session
from tests.harness.repeating import Answer, a_prompt, ask
from tests.harness.system import IDS_CONFIG, make_checkpoint, wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

SYSTEM = ("--exact", "--pages", "48", "--slots", "4", "--prefill-tokens", "512")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="kept")


@pytest.mark.parametrize(
    ("transfer", "options"), [("nixl", ()), ("shm", ()), ("shm", ("--drafts", "1"))], ids=str
)
def test_the_next_turn_starts_from_what_the_decode_worker_has_generated(
    model: Path, tmp_path: Path, transfer: str, options: tuple[str, ...]
) -> None:
    pools = Pools(model, tmp_path, *SYSTEM, *options, transfer=transfer)
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router()
        history = a_prompt(2, 300)
        turns: list[tuple[list[int], Answer]] = []
        for turn in range(3):
            answer, cached = ask(pools, history, 300)
            turns.append((history, answer))
            if turn:
                # All of the turn before but its last token, in full pages. Generated ones were never computed here.
                assert cached == (len(turns[-2][0]) + 299) // PAGE_TOKENS * PAGE_TOKENS
            history = [*history, *answer[0], *a_prompt(3 + turn, 50)]
        prefill = pools["prefill-0"]
        assert prefill.by_label("rorqual_worker_peer_reads_total", "outcome") == {"read": 2.0}
        assert prefill.metrics()["rorqual_worker_peer_bytes_read_total"] > 0
        pools.wait_until_idle()
    finally:
        pools.close()
    check_by_computing(model, tmp_path / "off", turns)


def check_by_computing(model: Path, folder: Path, turns: list[tuple[list[int], Answer]]) -> None:
    """One worker that keeps nothing gives the same bits."""
    folder.mkdir()
    pools = Pools(model, folder, *SYSTEM, "--prefix-cache", "off")
    try:
        pools.start("both")
        pools.start_router()
        for prompt, answer in turns:
            assert ask(pools, prompt, 300)[0] == answer
    finally:
        pools.close()


def test_a_router_that_was_started_anew_knows_what_workers_keep(model: Path, tmp_path: Path) -> None:
    pools = Pools(model, tmp_path, *SYSTEM, transfer="shm")
    try:
        pools.start("prefill", 2)
        pools.start("decode")
        pools.start_router()
        prompts = [a_prompt(seed, 700) for seed in range(4)]
        for prompt in prompts:
            ask(pools, prompt, 4)
        pools.restart("router")
        router = pools["router"]

        def is_known() -> bool:
            held = sum(worker.metrics()["rorqual_worker_pages_cached"] for worker in pools.workers())
            return router.metrics()["rorqual_router_feed_pages"] == held > 0

        wait_until(is_known, seconds_max=10.0)
        for prompt in prompts:
            assert ask(pools, prompt, 4)[1] == 2 * PAGE_TOKENS
        assert "rorqual_router_feed_faults_total" not in router.metrics()
        pools.wait_until_idle()
    finally:
        pools.close()


@pytest.fixture(scope="module")
def neighbours(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """Two prefill workers, told by the test who reads from whom."""
    pools = Pools(model, tmp_path_factory.mktemp("neighbours"), *SYSTEM, transfer="nixl")
    try:
        pools.start("prefill", 2)
        yield pools
    finally:
        pools.close()


def compute(worker: Member, prompt: list[int], *, source: Member | None = None) -> SequenceReport:
    """One token and its logprob, by a worker that is to read all full pages from another one first."""
    fetch = None
    if source is not None:
        num_pages = len(prompt) // PAGE_TOKENS
        fetch = PeerFetch(address=source.address, num_pages=num_pages, wants_tail=True, seconds_max=20.0)
    with raw_session(worker.address) as session:
        session.send(
            Open(
                sequence_id=SequenceId(1),
                request_id="a test's",
                prompt=np.array(prompt, dtype=np.int32),
                max_tokens=1,
                ignore_eos=True,
                sampling=SamplingParams(seed=3, logprobs=1),
                fetch=fetch,
            )
        )
        report = session.wait_for(lambda item: bool(item.token_ids or item.error))
    assert len(report.token_ids) == 1, report.error
    return report


def outcome_of(worker: Member, before: dict[str, float]) -> str:
    """Of the one read since."""
    now = worker.by_label("rorqual_worker_peer_reads_total", "outcome")
    (outcome,) = [name for name in now if now[name] == before.get(name, 0) + 1]
    return outcome


@pytest.mark.parametrize("region", ["c4", "c128", "records", ""])
def test_bytes_that_are_not_what_a_peer_has_computed_are_computed_anew(
    neighbours: Pools, region: str
) -> None:
    owner, reader = neighbours["prefill-0"], neighbours["prefill-1"]
    prompt = a_prompt(20 + len(region), 2 * PAGE_TOKENS + 90)
    computed = compute(owner, prompt)
    before = reader.by_label("rorqual_worker_peer_reads_total", "outcome")
    if region:
        spoil(owner.rank, endpoint_of(neighbours, owner.name), region, at=100)
    try:
        got = compute(reader, prompt, source=owner)
    finally:
        if region:
            spoil(owner.rank, endpoint_of(neighbours, owner.name), region, at=100)  # as it was
    assert (got.token_ids, got.logprobs) == (computed.token_ids, computed.logprobs)
    assert outcome_of(reader, before) == ("failed" if region else "read")
    assert got.cached_tokens == (0 if region else 2 * PAGE_TOKENS)
    neighbours.wait_until_idle()


def test_a_peer_that_was_started_anew_has_nothing_of_its_life_before(neighbours: Pools) -> None:
    owner, reader = neighbours["prefill-0"], neighbours["prefill-1"]
    prompts = [a_prompt(seed, 2 * PAGE_TOKENS + 90) for seed in (30, 31)]
    first = [compute(owner, prompt) for prompt in prompts]
    assert compute(reader, prompts[0], source=owner).cached_tokens == 2 * PAGE_TOKENS
    neighbours.kill("prefill-0")
    before = reader.by_label("rorqual_worker_peer_reads_total", "outcome")
    lost = compute(reader, prompts[1], source=owner)
    assert (lost.token_ids, lost.logprobs) == (first[1].token_ids, first[1].logprobs)
    assert (outcome_of(reader, before), lost.cached_tokens) == ("failed", 0)
    owner.start()
    owner.wait_until_ready()
    # Known there now: of another prompt nothing is, and what the new life computes can be read.
    other = a_prompt(32, 2 * PAGE_TOKENS + 90)
    before = reader.by_label("rorqual_worker_peer_reads_total", "outcome")
    assert compute(reader, other[: PAGE_TOKENS + 5], source=owner).cached_tokens == 0
    assert outcome_of(reader, before) == "gone"
    computed = compute(owner, other)
    got = compute(reader, other, source=owner)
    assert (got.token_ids, got.logprobs) == (computed.token_ids, computed.logprobs)
    assert got.cached_tokens == 2 * PAGE_TOKENS
    neighbours.wait_until_idle()
