"""The session's messages survive the wire, and bytes that are none of ours are an error of ours."""

from __future__ import annotations

import contextlib
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import (
    Alternatives,
    Cancel,
    Credit,
    ErrorCode,
    FinishReason,
    Hello,
    Load,
    Offer,
    Open,
    PromptLogprobs,
    RecordOffer,
    Renew,
    Role,
    SequenceReport,
    Source,
    StepReport,
    Take,
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
    prefill_tokens_per_second=st.floats(0, 2**20, width=32),
    pages_leased=st.integers(0, 2**32 - 1),
    peer_bytes_per_second=st.floats(0, 2**40, width=32),
    peer_latency_seconds=st.floats(0, 100, width=32),
    host_bytes_per_second=st.floats(0, 2**40, width=32),
    host_latency_seconds=st.floats(0, 100, width=32),
    store_bytes_per_second=st.floats(0, 2**40, width=32),
    store_latency_seconds=st.floats(0, 100, width=32),
)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
leases = st.builds(
    LeaseName,
    worker_id=names.map(WorkerId),
    incarnation=uint64.map(Incarnation),
    lease_id=uint64,
    generation=uint64,
)
sources = st.builds(Source, address=names, lease=leases, wire_id=names)
records = st.builds(
    RecordOffer,
    record=uint32,
    num_tokens=st.integers(1, 2**32 - 1),
    num_bytes=st.integers(1, 2**64 - 1),
    digest=uint64,
)
credits_granted = st.builds(Credit, sequences=uint32, pages=uint32)


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    num_pages = draw(st.integers(0, 4))
    num_digests = num_pages * draw(st.integers(1, 3))
    return Offer(
        lease=draw(leases),
        wire_id=draw(names),
        lease_seconds=draw(st.floats(0, 3600, width=32)),
        transfer_seconds=draw(st.floats(0, 3600, width=32)),
        first_page=draw(uint32),
        pages=draw(st.lists(uint32, min_size=num_pages, max_size=num_pages).map(tuple)),
        digests=draw(st.lists(uint64, min_size=num_digests, max_size=num_digests).map(tuple)),
        record=draw(st.none() | records),
    )


@st.composite
def takes(draw: st.DrawFn) -> Take:
    offer = draw(offers())
    token_ids = draw(st.lists(tokens, min_size=1, max_size=3).map(tuple)) if offer.record else ()
    return Take(sequence_id=draw(ids), offer=offer, token_ids=token_ids)


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
        cached_tokens=draw(st.integers(0, 2**31)),
        prompt_logprobs=draw(
            st.none()
            | st.builds(
                PromptLogprobs,
                first=st.integers(1, 2**20),
                logprobs=st.lists(logprobs, min_size=num, max_size=num).map(tuple),
                alternatives=st.lists(alternatives, min_size=num, max_size=num).map(tuple),
            )
        ),
        offer=draw(st.none() | offers()),
        bound=draw(st.booleans()),
    )


@given(
    ids,
    st.lists(tokens, max_size=50),
    st.integers(0, 2**31),
    st.booleans(),
    samplings,
    st.none() | sources,
    st.text(max_size=20),
)
def test_an_open_survives_the_wire(
    sequence_id: SequenceId,
    prompt: list[int],
    max_tokens: int,
    ignore_eos: bool,
    sampling: SamplingParams,
    source: Source | None,
    salt: str,
) -> None:
    command = Open(
        sequence_id=sequence_id,
        request_id="cmpl-1",
        prompt=np.array(prompt, dtype=np.int32),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        sampling=sampling,
        source=source,
        cache_salt=salt,
    )
    back = decode_command(encode_command(command))
    assert isinstance(back, Open)
    assert back.prompt.dtype == np.int32
    assert back.prompt.tolist() == prompt
    for name in ("sequence_id", "request_id", "max_tokens", "ignore_eos", "sampling", "source"):
        assert getattr(back, name) == getattr(command, name)


@given(
    st.builds(Cancel, sequence_id=ids)
    | st.builds(Hello, protocol=st.integers(0, 9), router_id=st.text())
    | st.builds(Renew, sequence_ids=st.lists(ids, max_size=5).map(tuple))
    | takes()
)
def test_other_commands_survive_the_wire(command: Cancel | Hello | Renew | Take) -> None:
    assert decode_command(encode_command(command)) == command


@given(
    st.builds(
        StepReport,
        number=st.integers(0, 2**63),
        sequences=st.lists(sequence_reports(), max_size=3).map(tuple),
        load=loads,
        draining=st.booleans(),
        credit=st.none() | credits_granted,
    )
)
def test_a_step_report_survives_the_wire(report: StepReport) -> None:
    assert decode_report(encode_report(report)) == report


@given(loads, st.sampled_from(Role), names, credits_granted, st.sampled_from(["", "0.1.0", "0.2.0.dev1+g12"]))
def test_a_welcome_survives_the_wire(
    load: Load, role: Role, wire_id: str, credit: Credit, version: str
) -> None:
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
        role=role,
        wire_id="" if role is Role.BOTH else wire_id,
        credit=credit if role is Role.DECODE else None,
        version=version,
    )
    assert decode_report(encode_report(welcome)) == welcome


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_a_wire_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_command, decode_report):
        # Some bytes happen to be a message: that is fine, anything else than a WireError is not.
        with contextlib.suppress(WireError):
            decode(data)


# One field more than there are, nested deeper than any parser goes.
DEEP_SAMPLING = b"\x9d" + msgspec.msgpack.encode(SamplingParams(seed=1))[1:] + b"\x91" * 200_000
LEASE = pb.LeaseName(worker_id="prefill-0", incarnation=5, lease_id=1, generation=2)
RECORD = pb.RecordOffer(record=1, num_tokens=9, num_bytes=100, digest=7)


def open_with(source: pb.Source) -> pb.Command:
    return pb.Command(open=pb.Open(sampling=b"\x91\x05", prompt=b"\x01\x00\x00\x00", source=source))


def take(*, token_ids: tuple[int, ...] = (), **fields) -> pb.Command:
    offer = pb.Offer(**({"lease": LEASE, "wire_id": "w", "lease_seconds": 30.0} | fields))
    return pb.Command(take=pb.Take(sequence_id=1, offer=offer, token_ids=token_ids))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Command(), "empty or of a kind"),
        (pb.Command(open=pb.Open(sampling=b"\xc1")), "sampling parameters"),
        (pb.Command(open=pb.Open(sampling=DEEP_SAMPLING)), "recursion"),
        (pb.Command(open=pb.Open(sampling=b"\x91\x05", prompt=b"123")), "multiple of 4"),
        (pb.Command(open=pb.Open(sampling=b"\x91\x05", prompt=b"\xff\xff\xff\xff")), "2\\*\\*31"),
        (open_with(pb.Source(lease=LEASE, wire_id="w")), "no address"),
        (open_with(pb.Source(lease=LEASE, address="a:1")), "no wire id"),
        (open_with(pb.Source(address="a:1", wire_id="w")), "Source names no lease"),
        (pb.Command(take=pb.Take()), "no wire id"),
        (take(record=RECORD), "a record and 0 tokens"),
        (take(token_ids=(1,)), "no record and 1 tokens"),
        (take(record=RECORD, token_ids=(2**31,)), "2\\*\\*31"),
        (take(pages=(1, 2), digests=(1, 2, 3)), "2 pages and 3 digests"),
        (take(digests=(1,)), "0 pages and 1 digests"),
        (take(record=pb.RecordOffer(num_tokens=1)), "1 tokens and 0 bytes"),
        (take(record=pb.RecordOffer(num_bytes=1)), "0 tokens and 1 bytes"),
        (take(lease_seconds=math.nan), "lease_seconds of an offer is nan"),
        (take(lease_seconds=-1.0), "lease_seconds of an offer is -1"),
        (take(transfer_seconds=math.inf), "transfer_seconds of an offer is inf"),
        (take(lease=None), "Offer names no lease"),
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
        (pb.Report(welcome=pb.Welcome(protocol=1, role="idle")), "unknown role 'idle'"),
        (pb.Report(welcome=pb.Welcome(protocol=1, role="prefill")), "prefill worker names no wire id"),
        (pb.Report(welcome=pb.Welcome(protocol=1, role="decode", wire_id="w")), "grants no credit"),
        (pb.Report(step=pb.StepReport(load=pb.Load(prefill_tokens_per_second=math.inf))), "is inf"),
        (pb.Report(step=pb.StepReport(load=pb.Load(step_ms=-1))), "step_ms"),
        (pb.Report(step=pb.StepReport(load=pb.Load(peer_bytes_per_second=-1))), "peer_bytes_per_second"),
        (pb.Report(step=pb.StepReport(load=pb.Load(peer_latency_seconds=math.nan))), "peer_latency_seconds"),
        (pb.Report(step=pb.StepReport(load=pb.Load(host_bytes_per_second=-1))), "host_bytes_per_second"),
        (pb.Report(step=pb.StepReport(load=pb.Load(store_latency_seconds=-1))), "store_latency_seconds"),
        (pb.Report(step=pb.StepReport(sequences=[pb.SequenceReport(offer=pb.Offer())])), "no wire id"),
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


def test_a_worker_that_names_no_role_does_everything() -> None:
    welcome = decode_report(pb.Report(welcome=pb.Welcome(protocol=1)).SerializeToString())
    assert isinstance(welcome, Welcome)
    assert (welcome.role, welcome.wire_id, welcome.credit) == (Role.BOTH, "", None)


def test_a_peer_of_before_versions_were_told_has_an_unknown_one() -> None:
    welcome = decode_report(pb.Report(welcome=pb.Welcome(protocol=1)).SerializeToString())
    hello = decode_command(pb.Command(hello=pb.Hello(protocol=1, router_id="r")).SerializeToString())
    assert isinstance(welcome, Welcome)
    assert isinstance(hello, Hello)
    assert (welcome.version, hello.version) == ("", "")


def test_a_hello_says_its_version_and_one_without_is_as_it_always_was() -> None:
    hello = Hello(protocol=1, router_id="r", version="0.2.0")
    assert decode_command(encode_command(hello)) == hello
    old = pb.Command(hello=pb.Hello(protocol=1, router_id="r")).SerializeToString()
    assert encode_command(Hello(protocol=1, router_id="r")) == old


def test_a_take_without_a_record_needs_no_token_and_no_page() -> None:
    command = decode_command(take().SerializeToString())
    assert isinstance(command, Take)
    assert (command.token_ids, command.offer.pages, command.offer.record) == ((), (), None)


def test_tokens_are_little_endian_whatever_the_array_is() -> None:
    assert tokens_to_bytes(np.array([1, 258], dtype=">i4")) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert tokens_from_bytes(b"\x02\x01\x00\x00").tolist() == [258]
