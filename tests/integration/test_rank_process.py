"""The real rank as a process, with the test as its host."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.plan import RankFailed, RankReady, Segment, Shutdown, SlotOpen, StepPlan, StepResult
from rorqual.sampling import SamplingParams
from tests.harness.ranks import LOOPBACK, NUM_RECORDS, RankUnderTest
from tests.harness.system import IDS_CONFIG, make_checkpoint

pytestmark = pytest.mark.minutes

NUM_TOKENS = 512


@pytest.fixture
def transfer() -> str:
    """Of the rank; tests choose another by a parameter."""
    return ""


@pytest.fixture
def rank(ids_model: Path, transfer: str) -> Iterator[RankUnderTest]:
    rank = RankUnderTest(ids_model, transfer=transfer)
    yield rank
    rank.close()


@pytest.mark.parametrize(("weights", "numerics"), [("quantised", "served"), ("float32", "float32")])
def test_numerics_are_the_checkpoints_own_unless_told(weights: str, numerics: str, tmp_path: Path) -> None:
    rank = RankUnderTest(make_checkpoint(tmp_path, IDS_CONFIG, name="m", weights=weights), numerics=None)
    try:
        assert rank.ready().numerics == numerics
    finally:
        rank.close()


def a_plan(*, prompt_logprobs: int | None = None) -> StepPlan:
    tokens = b"".join(token.to_bytes(4, "little") for token in range(NUM_TOKENS))
    sampling = SamplingParams(seed=1, prompt_logprobs=prompt_logprobs)
    opened = SlotOpen(slot=0, tokens=tokens, num_prompt=NUM_TOKENS, sampling=sampling)
    segment = Segment(slot=0, start=0, count=NUM_TOKENS, pages=(0, 1), sample=True)
    return StepPlan(number=1, closes=(), opens=(opened,), segments=(segment,))


@pytest.mark.parametrize("transfer", ["", "shm", "nixl"])
def test_a_rank_whose_host_is_gone_in_the_middle_of_a_step_ends_without_a_word(rank: RankUnderTest) -> None:
    rank.ready()
    # Stopped, so that the step is certainly not done before the host is gone.
    rank.process.send_signal(signal.SIGSTOP)
    rank.send(a_plan())
    rank.host.close()
    rank.process.send_signal(signal.SIGCONT)
    assert rank.ended() == (0, "")


@pytest.mark.parametrize("transfer", ["nixl"])
def test_a_rank_that_is_told_to_shut_down_finishes_its_plans_and_ends(rank: RankUnderTest) -> None:
    rank.ready()
    rank.send(a_plan())
    rank.send(Shutdown())
    assert rank.expect(StepResult).number == 1
    assert rank.ended() == (0, "")


@pytest.mark.parametrize("transfer", ["shm"])
def test_an_idle_rank_ends_when_its_host_does(rank: RankUnderTest) -> None:
    rank.ready()
    rank.host.close()
    assert rank.ended() == (0, "")


def test_scores_of_a_chunk_come_with_its_step(rank: RankUnderTest) -> None:
    ready = rank.ready()
    assert ready.has_mtp
    assert ready.notices == ()
    assert len(ready.wire_id) == 16, "a store keeps the pages of every worker"
    assert (ready.endpoint, ready.num_records) == (None, 0)
    rank.send(a_plan(prompt_logprobs=1))
    result = rank.expect(StepResult)
    scored = [item.first + index for item in result.prompt_scores for index in range(len(item.logprobs))]
    assert scored == list(range(1, NUM_TOKENS))


@pytest.mark.parametrize("transfer", ["shm", "nixl"])
def test_what_others_may_read_is_told_where_there_is_a_transfer(rank: RankUnderTest, transfer: str) -> None:
    ready = rank.ready()
    assert ready.num_page_components == 3
    assert len(ready.wire_id) == 16
    assert ready.num_records == NUM_RECORDS
    assert ready.endpoint is not None
    assert ready.endpoint.backend == transfer
    assert ready.endpoint.agent == f"rank#{rank.process.pid}"
    regions = {region.name: region for region in ready.endpoint.regions}
    assert set(regions) == {"c4", "c4_index", "c128", "records"}
    exported = sum(region.unit_bytes * region.num_units for region in regions.values())
    assert exported < ready.state_bytes, "rings are not exported, and are state too"


@pytest.mark.parametrize("transfer", ["nixl"])
def test_a_transfer_that_cannot_be_opened_is_told_in_one_line(ids_model: Path, transfer: str) -> None:
    # Shared memory alone has no way to tell that a peer is gone, which UCX is asked for.
    rank = RankUnderTest(ids_model, transfer=transfer, environment=LOOPBACK | {"UCX_TLS": "sysv"})
    try:
        failed = rank.expect(RankFailed)
        assert failed.message.startswith("nixl cannot open its UCX backend: ")
        assert "\n" not in failed.message
        assert rank.ended()[0] == 1
    finally:
        rank.close()


@pytest.mark.parametrize("transfer", ["shm"])
def test_a_host_that_sends_no_frame_ends_a_rank_with_a_reason(rank: RankUnderTest) -> None:
    assert isinstance(rank.ready(), RankReady)
    rank.host.sendall(b"\x01\x00\x00\x00\xc1")
    assert "does not decode" in rank.expect(RankFailed).message
    status, output = rank.ended()
    assert status == 1
    assert "FrameError" in output
