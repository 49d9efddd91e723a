"""The Lending service on the wire: its messages to protobuf bytes and back, and the names gRPC knows it by.

Used by the owner's door and by the reader's client. Both pass plain bytes through gRPC and turn them here, so that
bytes which do not decode are an error of ours. What an owner says about its memory is checked whole before anybody
hands it to a transfer engine: an engine may not survive metadata that was cut or changed on its way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from kvstore.transfer.contract import Endpoint
from rorqual.ids import Incarnation, LeaseName
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import WireError, check_number, lease_from_pb, lease_to_pb, parse, unpack

LENDING_SERVICE = "rorqual.v1.Lending"
ATTACH_METHOD = "Attach"
RENEW_METHOD = "Renew"
RELEASE_METHOD = "Release"
ATTACH_PATH = f"/{LENDING_SERVICE}/{ATTACH_METHOD}"
RENEW_PATH = f"/{LENDING_SERVICE}/{RENEW_METHOD}"
RELEASE_PATH = f"/{LENDING_SERVICE}/{RELEASE_METHOD}"

LENDING_BYTES_MAX = 1024 * 1024
"""Bound on one message in either direction. The largest is an endpoint: a few kilobytes of an agent's metadata."""

_endpoint_encoder = msgspec.msgpack.Encoder()
_endpoint_decoder = msgspec.msgpack.Decoder(Endpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """A reader asks for the endpoint of the owner it means, for state in the form it can read."""

    incarnation: Incarnation
    wire_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReply:
    """To a renewal or a release. When `live` is false the lease has ended, and so has every right to read."""

    live: bool
    remaining_seconds: float = 0.0  # on the owner's clock; the reader counts from before its request


def encode_attach_request(request: AttachRequest) -> bytes:
    return pb.AttachRequest(incarnation=request.incarnation, wire_id=request.wire_id).SerializeToString()


def decode_attach_request(data: bytes) -> AttachRequest:
    """Raises WireError."""
    message = pb.AttachRequest()
    parse(message, data, "attach request")
    return AttachRequest(incarnation=Incarnation(message.incarnation), wire_id=message.wire_id)


def encode_attach_reply(endpoint: Endpoint) -> bytes:
    data = _endpoint_encoder.encode(endpoint)
    return pb.AttachReply(endpoint=data, digest=endpoint_digest(data)).SerializeToString()


def decode_attach_reply(data: bytes) -> Endpoint:
    """Raises WireError: bytes that do not match their digest, or regions that can be none."""
    message = pb.AttachReply()
    parse(message, data, "attach reply")
    if message.digest != endpoint_digest(message.endpoint):
        raise WireError("the digest of an endpoint differs")
    endpoint = unpack(_endpoint_decoder, message.endpoint, "an endpoint's bytes")
    for region in endpoint.regions:
        if region.address < 0 or region.unit_bytes < 1 or region.num_units < 1:
            raise WireError(
                f"region {region.name!r} of an endpoint has {region.num_units} units of {region.unit_bytes} bytes"
                f" at {region.address}"
            )
    if len({region.name for region in endpoint.regions}) != len(endpoint.regions):
        raise WireError("endpoint has two regions of one name")
    return endpoint


def endpoint_digest(data: bytes) -> int:
    """Of an endpoint's bytes; unsigned 64 bits."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def encode_lease_request(lease: LeaseName) -> bytes:
    """A renewal's or a release's."""
    return pb.LeaseRequest(lease=lease_to_pb(lease)).SerializeToString()


def decode_lease_request(data: bytes) -> LeaseName:
    """Raises WireError."""
    message = pb.LeaseRequest()
    parse(message, data, "lease request")
    return lease_from_pb(message)


def encode_lease_reply(reply: LeaseReply) -> bytes:
    return pb.LeaseReply(live=reply.live, remaining_seconds=reply.remaining_seconds).SerializeToString()


def decode_lease_reply(data: bytes) -> LeaseReply:
    """Raises WireError."""
    message = pb.LeaseReply()
    parse(message, data, "lease reply")
    seconds = check_number(message.remaining_seconds, "remaining_seconds of a lease reply")
    return LeaseReply(live=message.live, remaining_seconds=seconds)
