"""What a rank that is to draft says of itself, as a process with a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.plan import RankFailed, RankReady, Segment, SlotOpen, StepPlan, StepResult
from rorqual.sampling import SamplingParams
from tests.harness.ranks import RankUnderTest
from tests.harness.system import IDS_CONFIG, make_checkpoint

pytestmark = pytest.mark.minutes

WITHOUT_MTP = IDS_CONFIG | {
    "num_nextn_predict_layers": 0,
    "compress_ratios": IDS_CONFIG["compress_ratios"][: IDS_CONFIG["num_hidden_layers"]],
}


def ready_of(model: Path, *, drafts_max: int) -> RankReady:
    rank = RankUnderTest(model, transfer="shm", drafts_max=drafts_max)
    try:
        return rank.ready()
    finally:
        rank.close()


def test_with_drafts_a_rank_reads_the_records_of_its_like_only(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, IDS_CONFIG, name="m")
    without, two, four = (ready_of(model, drafts_max=drafts_max) for drafts_max in (0, 2, 4))
    assert [item.drafts_max for item in (without, two, four)] == [0, 2, 4]
    assert without.wire_id != two.wire_id == four.wire_id


def test_a_checkpoint_without_an_mtp_block_has_no_drafts(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, WITHOUT_MTP, name="m")
    without, asked = (ready_of(model, drafts_max=drafts_max) for drafts_max in (0, 4))
    assert not asked.has_mtp
    assert asked.drafts_max == 0
    assert asked.wire_id == without.wire_id


def test_drafts_that_are_required_and_not_to_be_had_are_refused_before_weights_are_read(
    tmp_path: Path,
) -> None:
    rank = RankUnderTest(make_checkpoint(tmp_path, WITHOUT_MTP, name="m"), drafts_max=2, drafts_required=True)
    try:
        first = rank.receive()
    finally:
        rank.close()
    assert isinstance(first, RankFailed), first
    assert first.message.startswith("--drafts 2: ")
    assert "has no MTP block" in first.message


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_a_rank_drafts_in_fast_and_in_exact_mode(tmp_path: Path, exact: bool) -> None:
    model = make_checkpoint(tmp_path, IDS_CONFIG, name="m", weights="quantised")
    rank = RankUnderTest(model, numerics=None, exact=exact, drafts_max=3)
    try:
        assert rank.ready().drafts_max == 3
        opened = SlotOpen(
            slot=0,
            tokens=b"".join(token.to_bytes(4, "little") for token in range(100)),
            num_prompt=100,
            sampling=SamplingParams(seed=1),
            tokens_max=130,
        )
        prompt = Segment(slot=0, start=0, count=100, pages=(0,), sample=True)
        rank.send(StepPlan(number=1, closes=(), opens=(opened,), segments=(prompt,)))
        num_tokens = 100 + len(rank.expect(StepResult).sampled)
        for number in range(2, 40):
            segment = Segment(slot=0, start=num_tokens - 1, count=1, pages=(), sample=True, drafts=3)
            rank.send(StepPlan(number=number, closes=(), opens=(), segments=(segment,)))
            result = rank.expect(StepResult)
            [verified] = result.verified
            wanted = min(3, 130 - num_tokens - 1)
            assert verified.num_drafts == max(wanted, 0)
            assert len(result.sampled) == (verified.num_accepted + 1 if num_tokens < 130 else 0)
            num_tokens += len(result.sampled)
        assert num_tokens == 130
    finally:
        rank.close()
