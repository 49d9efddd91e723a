"""The Lending service on the wire: its messages to protobuf bytes and back, and the names gRPC knows it by.

Used by the owner's door and by the reader's client. Both pass plain bytes through gRPC and turn them here, so that
bytes which do not decode are an error of ours. What an owner says about its memory is checked whole before anybody
hands it to a transfer engine: an engine may not survive metadata that was cut or changed on its way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from kvstore.keys import KEY_BYTES, PageKey
from kvstore.transfer.contract import Endpoint
from rorqual.ids import Incarnation, LeaseName
from rorqual.session import Offer
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import (
    WireError,
    check_number,
    lease_from_pb,
    lease_to_pb,
    offer_from_pb,
    offer_to_pb,
    parse,
    unpack,
)

LENDING_SERVICE = "rorqual.v1.Lending"
ATTACH_METHOD = "Attach"
RENEW_METHOD = "Renew"
RELEASE_METHOD = "Release"
LEASE_KEYS_METHOD = "LeaseKeys"
ATTACH_PATH = f"/{LENDING_SERVICE}/{ATTACH_METHOD}"
RENEW_PATH = f"/{LENDING_SERVICE}/{RENEW_METHOD}"
RELEASE_PATH = f"/{LENDING_SERVICE}/{RELEASE_METHOD}"
LEASE_KEYS_PATH = f"/{LENDING_SERVICE}/{LEASE_KEYS_METHOD}"

LENDING_BYTES_MAX = 1024 * 1024
"""Bound on one message in either direction. The largest offers pages by keys: 30 bytes of ids and digests for each of
at most KEYS_MAX."""

KEYS_MAX = 16384
"""Of one request for pages by keys: four million tokens."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseKeysRequest:
    """A reader asks for pages of a path by their keys, from the path's first one on, and for a tail."""

    wire_id: str
    keys: tuple[PageKey, ...]
    first_page: int  # the reader has those before
    wants_tail: bool


def encode_lease_keys_request(request: LeaseKeysRequest) -> bytes:
    return pb.LeaseKeysRequest(
        wire_id=request.wire_id,
        keys=b"".join(request.keys),
        first_page=request.first_page,
        wants_tail=request.wants_tail,
    ).SerializeToString()


def decode_lease_keys_request(data: bytes) -> LeaseKeysRequest:
    """Raises WireError."""
    message = pb.LeaseKeysRequest()
    parse(message, data, "lease keys request")
    keys = message.keys
    num_keys = len(keys) // KEY_BYTES
    if len(keys) % KEY_BYTES or not 1 <= num_keys <= KEYS_MAX:
        raise WireError(f"a request for pages has {len(keys)} bytes of keys")
    if message.first_page > num_keys:
        raise WireError(f"a request for pages from {message.first_page} on has {num_keys} keys")
    return LeaseKeysRequest(
        wire_id=message.wire_id,
        keys=tuple(PageKey(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES)),
        first_page=message.first_page,
        wants_tail=message.wants_tail,
    )


def encode_lease_keys_reply(offer: Offer | None) -> bytes:
    return pb.LeaseKeysReply(offer=None if offer is None else offer_to_pb(offer)).SerializeToString()


def decode_lease_keys_reply(data: bytes) -> Offer | None:
    """Raises WireError."""
    message = pb.LeaseKeysReply()
    parse(message, data, "lease keys reply")
    return offer_from_pb(message.offer) if message.HasField("offer") else None


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
