"""What workers say to each other about leases survives the wire; an endpoint that was changed on its way does not."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.worker import wire
from engine.worker.wire import AttachRequest, LeaseReply
from kvstore.transfer.contract import Endpoint, Region
from rorqual.ids import Incarnation, LeaseName, WorkerId
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import WireError

uint64 = st.integers(0, 2**64 - 1)
texts = st.text(max_size=12)
leases = st.builds(
    LeaseName,
    worker_id=texts.map(WorkerId),
    incarnation=uint64.map(Incarnation),
    lease_id=uint64,
    generation=uint64,
)
endpoints = st.builds(
    Endpoint,
    backend=st.sampled_from(["nixl", "shm"]),
    agent=texts,
    metadata=st.binary(max_size=40),
    regions=st.lists(
        st.builds(
            Region,
            name=texts,
            address=uint64,
            unit_bytes=st.integers(1, 2**40),
            num_units=st.integers(1, 2**32),
        ),
        max_size=4,
        unique_by=lambda region: region.name,
    ).map(tuple),
)
ENDPOINT = Endpoint(
    backend="shm",
    agent="prefill-0",
    metadata=b"m" * 20,
    regions=(Region(name="c4", address=4096, unit_bytes=512, num_units=8),),
)


@given(st.builds(AttachRequest, incarnation=uint64.map(Incarnation), wire_id=texts))
def test_a_request_to_attach_survives_the_wire(request: AttachRequest) -> None:
    assert wire.decode_attach_request(wire.encode_attach_request(request)) == request


@given(endpoints)
def test_an_endpoint_survives_the_wire(endpoint: Endpoint) -> None:
    assert wire.decode_attach_reply(wire.encode_attach_reply(endpoint)) == endpoint


@given(leases)
def test_a_request_about_a_lease_survives_the_wire(lease: LeaseName) -> None:
    assert wire.decode_lease_request(wire.encode_lease_request(lease)) == lease


@given(st.builds(LeaseReply, live=st.booleans(), remaining_seconds=st.floats(0, 3600, width=32)))
def test_a_reply_about_a_lease_survives_the_wire(reply: LeaseReply) -> None:
    assert wire.decode_lease_reply(wire.encode_lease_reply(reply)) == reply


def test_the_digest_is_the_first_half_of_a_sha256_read_from_the_left() -> None:
    # sha256 of nothing begins e3b0c442 98fc1c14.
    assert wire.endpoint_digest(b"") == 0xE3B0C44298FC1C14


@given(st.data())
def test_no_changed_bit_of_an_endpoint_gets_through(data: st.DataObject) -> None:
    reply = pb.AttachReply.FromString(wire.encode_attach_reply(ENDPOINT))
    changed = bytearray(reply.endpoint)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    reply.endpoint = bytes(changed)
    with pytest.raises(WireError, match="digest"):
        wire.decode_attach_reply(reply.SerializeToString())


def sealed(data: bytes) -> bytes:
    return pb.AttachReply(endpoint=data, digest=wire.endpoint_digest(data)).SerializeToString()


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_a_wire_error_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(WireError):
        wire.decode_attach_reply(sealed(data))
    for decode in (
        wire.decode_attach_request,
        wire.decode_attach_reply,
        wire.decode_lease_request,
        wire.decode_lease_reply,
    ):
        with contextlib.suppress(WireError):
            decode(data)


def sealed_endpoint(regions: tuple[Region, ...]) -> bytes:
    return wire.encode_attach_reply(msgspec.structs.replace(ENDPOINT, regions=regions))


@pytest.mark.parametrize(
    ("decode", "data", "text"),
    [
        (wire.decode_attach_reply, b"", "digest"),
        (
            wire.decode_attach_reply,
            sealed(b"\x05"),
            "an endpoint's bytes do not decode",
        ),
        (
            wire.decode_attach_reply,
            sealed(msgspec.msgpack.encode(ENDPOINT).replace(b"prefill", b"\xffrefill")),
            "utf-8",
        ),
        (
            wire.decode_attach_reply,
            sealed(b"\x96" + msgspec.msgpack.encode(ENDPOINT)[1:] + b"\x91" * 200_000),
            "recursion",
        ),
        (
            wire.decode_attach_reply,
            sealed_endpoint((Region(name="c4", address=-1, unit_bytes=8, num_units=8),)),
            "region 'c4'",
        ),
        (
            wire.decode_attach_reply,
            sealed_endpoint((Region(name="c4", address=0, unit_bytes=0, num_units=8),)),
            "8 units of 0 bytes",
        ),
        (
            wire.decode_attach_reply,
            sealed_endpoint((Region(name="c4", address=0, unit_bytes=8, num_units=0),)),
            "0 units of 8 bytes",
        ),
        (wire.decode_attach_reply, sealed_endpoint(2 * ENDPOINT.regions), "two regions of one name"),
        (wire.decode_lease_request, b"", "names no lease"),
        (
            wire.decode_lease_reply,
            pb.LeaseReply(live=True, remaining_seconds=float("nan")).SerializeToString(),
            "remaining_seconds of a lease reply is nan",
        ),
    ],
)
def test_a_message_that_breaks_a_rule_says_which(decode, data: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        decode(data)


def test_the_paths_are_those_of_the_service() -> None:
    service = pb.DESCRIPTOR.services_by_name["Lending"]
    paths = {f"/{service.full_name}/{method.name}" for method in service.methods}
    known = {wire.ATTACH_PATH, wire.RENEW_PATH, wire.RELEASE_PATH, wire.LEASE_KEYS_PATH}
    assert known == paths
