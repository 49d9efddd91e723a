"""A worker's gRPC door as a test uses it itself: a session as a router has one, and the calls of a decode worker to a
prefill worker, with whatever a test wants to say wrongly.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from engine.worker.wire import (
    ATTACH_PATH,
    RELEASE_PATH,
    RENEW_PATH,
    AttachRequest,
    LeaseReply,
    decode_attach_reply,
    decode_lease_reply,
    encode_attach_request,
    encode_lease_request,
)
from kvstore.transfer.contract import Endpoint
from rorqual.ids import Incarnation, LeaseName
from rorqual.session import PROTOCOL, Command, Hello, SequenceReport, StepReport, Welcome
from rorqual.wire import SESSION_PATH, decode_report, encode_command
from tests.harness.system import SECONDS_MAX


class RawSession:
    """`welcome` is the worker's. Closing it ends every sequence opened on it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        open_stream: Any = channel.stream_stream(SESSION_PATH, None, None)
        self._reports: Any = open_stream(iter(self._commands.get, None), timeout=SECONDS_MAX)
        self.send(Hello(protocol=PROTOCOL, router_id="a test"))
        welcome = decode_report(next(self._reports))
        assert isinstance(welcome, Welcome)
        self.welcome = welcome

    def send(self, command: Hello | Command) -> None:
        self._commands.put(encode_command(command))

    def wait_for(self, condition: Callable[[SequenceReport], bool]) -> SequenceReport:
        """The next report of a sequence of which it is true; others before it are lost."""
        for data in self._reports:
            report = decode_report(data)
            assert isinstance(report, StepReport)
            for item in report.sequences:
                if condition(item):
                    return item
        raise AssertionError("the session has ended")

    def close(self) -> None:
        self._commands.put(None)
        self._reports.cancel()


@contextmanager
def raw_session(address: str) -> Iterator[RawSession]:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        session = RawSession(channel)
        try:
            yield session
        finally:
            session.close()


def attach(address: str, *, incarnation: int, wire_id: str) -> Endpoint:
    """Raises grpc.RpcError."""
    request = AttachRequest(incarnation=Incarnation(incarnation), wire_id=wire_id)
    return decode_attach_reply(call(address, ATTACH_PATH, encode_attach_request(request)))


def renew(address: str, lease: LeaseName) -> LeaseReply:
    return decode_lease_reply(call(address, RENEW_PATH, encode_lease_request(lease)))


def release(address: str, lease: LeaseName) -> LeaseReply:
    return decode_lease_reply(call(address, RELEASE_PATH, encode_lease_request(lease)))


def call(address: str, path: str, data: bytes) -> bytes:
    """Raises grpc.RpcError."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        unary: Any = channel.unary_unary(path, None, None)
        return unary(data, timeout=SECONDS_MAX)


def refusal(address: str, path: str, data: bytes) -> tuple[str, str]:
    """Code and text of a call that fails."""
    try:
        call(address, path, data)
    except grpc.RpcError as error:
        told: Any = error
        return told.code().name, told.details()
    raise AssertionError("the call was answered")
