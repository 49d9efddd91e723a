"""The session's messages survive the wire, and bytes that are none of ours are an error of ours."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import (
    Alternatives,
    Cancel,
    ErrorCode,
    FinishReason,
    Hello,
    Load,
    Open,
    PromptLogprobs,
    SequenceReport,
    StepReport,
    Welcome,
)
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import (
    WireError,
    decode_command,
    decode_report,
    encode_command,
    encode_report,
    tokens_from_bytes,
    tokens_to_bytes,
)

tokens = st.integers(0, 2**31 - 1)
logprobs = st.floats(-1000, 0, width=32)
ids = st.integers(0, 2**64 - 1).map(SequenceId)
alternatives = st.lists(st.tuples(tokens, logprobs), max_size=3).map(
    lambda pairs: Alternatives(token_ids=tuple(t for t, _ in pairs), logprobs=tuple(p for _, p in pairs))
)
samplings = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    logit_bias=st.lists(st.tuples(tokens, st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    choice=st.integers(0, 1023),
)
loads = st.builds(
    Load,
    sequences_running=st.integers(0, 99),
    sequences_waiting=st.integers(0, 99),
    tokens_waiting=st.integers(0, 2**40),
    pages_free=st.integers(0, 99),
    pages_total=st.integers(0, 99),
    slots_free=st.integers(0, 99),
    slots_total=st.integers(0, 99),
    step_ms=st.floats(0, 1000, width=32),
)


@st.composite
def sequence_reports(draw: st.DrawFn) -> SequenceReport:
    token_ids = draw(st.lists(tokens, max_size=4).map(tuple))
    num = len(token_ids)
    has_logprobs = draw(st.booleans())
    error = draw(st.none() | st.sampled_from(ErrorCode))
    return SequenceReport(
        sequence_id=draw(ids),
        first_index=draw(st.integers(0, 2**31)),
        token_ids=token_ids,
        logprobs=draw(st.lists(logprobs, min_size=num, max_size=num).map(tuple)) if has_logprobs else (),
        alternatives=draw(st.lists(alternatives, min_size=num, max_size=num).map(tuple))
        if has_logprobs
        else (),
        finish_reason=FinishReason.ERROR if error else draw(st.none() | st.sampled_from(FinishReason)),
        error=draw(st.text(max_size=20)) if error else "",
        error_code=error,
        prompt_logprobs=draw(
            st.none()
            | st.builds(
                PromptLogprobs,
                first=st.integers(1, 2**20),
                logprobs=st.lists(logprobs, min_size=num, max_size=num).map(tuple),
                alternatives=st.lists(alternatives, min_size=num, max_size=num).map(tuple),
            )
        ),
    )


@given(ids, st.lists(tokens, max_size=50), st.integers(0, 2**31), st.booleans(), samplings)
def test_an_open_survives_the_wire(
    sequence_id: SequenceId, prompt: list[int], max_tokens: int, ignore_eos: bool, sampling: SamplingParams
) -> None:
    command = Open(
        sequence_id=sequence_id,
        request_id="cmpl-1",
        prompt=np.array(prompt, dtype=np.int32),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        sampling=sampling,
    )
    back = decode_command(encode_command(command))
    assert isinstance(back, Open)
    assert back.prompt.dtype == np.int32
    assert back.prompt.tolist() == prompt
    for name in ("sequence_id", "request_id", "max_tokens", "ignore_eos", "sampling"):
        assert getattr(back, name) == getattr(command, name)


@given(st.builds(Cancel, sequence_id=ids) | st.builds(Hello, protocol=st.integers(0, 9), router_id=st.text()))
def test_other_commands_survive_the_wire(command: Cancel | Hello) -> None:
    assert decode_command(encode_command(command)) == command


@given(
    st.builds(
        StepReport,
        number=st.integers(0, 2**63),
        sequences=st.lists(sequence_reports(), max_size=3).map(tuple),
        load=loads,
        draining=st.booleans(),
    )
)
def test_a_step_report_survives_the_wire(report: StepReport) -> None:
    assert decode_report(encode_report(report)) == report


@given(loads)
def test_a_welcome_survives_the_wire(load: Load) -> None:
    welcome = Welcome(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(2**63 - 1),
        model_fingerprint="abc",
        numerics="served",
        exact=True,
        vocab_size=129280,
        sequence_tokens_max=1 << 20,
        eos_token_ids=(1, 2),
        sequences_max=16,
        load=load,
    )
    assert decode_report(encode_report(welcome)) == welcome


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_a_wire_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_command, decode_report):
        # Some bytes happen to be a message: that is fine, anything else than a WireError is not.
        with contextlib.suppress(WireError):
            decode(data)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Command(), "empty or of a kind"),
        (pb.Command(open=pb.Open(sampling=b"\xc1")), "sampling parameters"),
        (pb.Command(open=pb.Open(sampling=b"\x91\x05", prompt=b"123")), "multiple of 4"),
        (pb.Command(open=pb.Open(sampling=b"\x91\x05", prompt=b"\xff\xff\xff\xff")), "2\\*\\*31"),
    ],
)
def test_a_command_that_breaks_a_rule_says_which(message: pb.Command, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_command(message.SerializeToString())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Report(), "empty or of a kind"),
        (pb.Report(welcome=pb.Welcome(protocol=2)), "protocol 2"),
        (pb.Report(step=pb.StepReport(sequences=[pb.SequenceReport(finish_reason="bored")])), "bored"),
        (pb.Report(step=pb.StepReport(sequences=[pb.SequenceReport(error_code="x")])), "error code"),
        (
            pb.Report(step=pb.StepReport(sequences=[pb.SequenceReport(token_ids=[1, 2], logprobs=[0.0])])),
            "2 tokens and 1 logprobs",
        ),
        (
            pb.Report(
                step=pb.StepReport(
                    sequences=[pb.SequenceReport(prompt_logprobs=pb.PromptLogprobs(logprobs=[0.0]))]
                )
            ),
            "1 prompt logprobs and 0 alternatives",
        ),
    ],
)
def test_a_report_that_breaks_a_rule_says_which(message: pb.Report, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode_report(message.SerializeToString())


def test_tokens_are_little_endian_whatever_the_array_is() -> None:
    assert tokens_to_bytes(np.array([1, 258], dtype=">i4")) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert tokens_from_bytes(b"\x02\x01\x00\x00").tolist() == [258]
