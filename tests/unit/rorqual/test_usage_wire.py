"""Usage on the wire, and that routers and workers of before understand each other."""

from __future__ import annotations

import math

import pytest

from rorqual.errors import WireError
from rorqual.session import Hello, Load, StepReport
from rorqual.usage import SAMPLES_MAX, PromptSample, StreamSample, Usage
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import decode_command, decode_report, encode_command, encode_report

LOAD = Load(
    sequences_running=1,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=1,
    pages_total=2,
    slots_free=1,
    slots_total=2,
    step_ms=1.5,
)
USAGE = Usage(
    num_prompts=3,
    prompts=(PromptSample(prompt_tokens=9000, computed_tokens=10, ttft_seconds=0.5),),
    num_streams=2,
    streams=(
        StreamSample(context_tokens=9001, generated_tokens=1, itl_seconds=None),
        StreamSample(context_tokens=10_000, generated_tokens=2, itl_seconds=0.25),
    ),
)


@pytest.mark.parametrize("usage", [None, Usage(), USAGE])
def test_a_report_keeps_its_usage(usage: Usage | None) -> None:
    report = StepReport(number=1, sequences=(), load=LOAD, draining=False, usage=usage)
    assert decode_report(encode_report(report)) == report


@pytest.mark.parametrize("observes", [False, True])
def test_a_hello_says_whether_it_observes(observes: bool) -> None:
    hello = Hello(protocol=1, router_id="r", observes=observes)
    assert decode_command(encode_command(hello)) == hello


def test_a_hello_that_does_not_know_of_observing_does_not_observe() -> None:
    data = pb.Command(hello=pb.Hello(protocol=1, router_id="r")).SerializeToString()
    assert decode_command(data) == Hello(protocol=1, router_id="r")
    assert encode_command(Hello(protocol=1, router_id="r")) == data


@pytest.mark.parametrize(
    ("usage", "text"),
    [
        (pb.WorkerUsage(num_prompts=1, prompts=[pb.PromptSample()] * 2), "2 samples of 1 prompts"),
        (
            pb.WorkerUsage(num_streams=9999, streams=[pb.StreamSample()] * (SAMPLES_MAX + 1)),
            "at most 256",
        ),
        (pb.WorkerUsage(num_prompts=1, prompts=[pb.PromptSample(ttft_seconds=math.nan)]), "ttft_seconds"),
        (pb.WorkerUsage(num_streams=1, streams=[pb.StreamSample(itl_seconds=-1)]), "itl_seconds"),
    ],
)
def test_usage_that_breaks_a_rule_says_which(usage: pb.WorkerUsage, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_report(pb.Report(step=pb.StepReport(usage=usage)).SerializeToString())
