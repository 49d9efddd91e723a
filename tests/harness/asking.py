"""Clients that ask for one streamed completion on a thread of their own, while the test does harm elsewhere.

Called by the failure tests, which stop and kill processes and so cannot run an event loop beside it. What was heard is
an `Answer` (`tests.harness.clients`), which holds the server to one error at most and to nothing after it. A client may
leave at any time, rudely.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import grpc

from rorqual.v1 import generate_pb2 as pb
from tests.harness.clients import GENERATE, Answer
from tests.harness.system import SECONDS_MAX, Served, greedy_body, wait_until

Door = Literal["http", "grpc"]
LOOK_SECONDS = 0.01


def ask(served: Served, prompt: list[int], *, max_tokens: int, door: Door = "http") -> Asking:
    """A greedy completion that goes on to its last token."""
    body = greedy_body(prompt, max_tokens=max_tokens)
    line: Line = HttpLine(served.http, body) if door == "http" else GrpcLine(served.grpc, body)
    return Asking(line)


class Line(Protocol):
    """How a client hears its answer."""

    def hear(self, answer: Answer) -> None:
        """Until the answer ends or the client has left; on the client's thread."""
        ...

    def leave(self) -> None:
        """From any thread."""
        ...


class Asking:
    def __init__(self, line: Line) -> None:
        self._answer = Answer.of(1)
        self._line = line
        self._failure: BaseException | None = None
        self._has_left = False
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> list[int]:
        return list(self._answer.tokens[0])

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait_for_tokens(self, count: int) -> None:
        """Fails when the answer ends before."""
        wait_until(lambda: len(self.tokens) >= count or self.is_over, seconds_max=SECONDS_MAX)
        assert len(self.tokens) >= count, (
            f"after {len(self.tokens)} tokens: {self._failure or self._answer.errors}"
        )

    def wait_until_over(self, *, seconds_max: float) -> None:
        """Ended well or badly, by the server's word."""
        self._thread.join(seconds_max)
        assert self.is_over, f"no end within {seconds_max:g} s; heard {len(self.tokens)} tokens"
        if self._failure is not None:
            raise self._failure

    def result(self, *, seconds_max: float = SECONDS_MAX) -> list[int]:
        """The tokens of an answer that ends well."""
        self.wait_until_over(seconds_max=seconds_max)
        assert not self._answer.errors, f"after {len(self.tokens)} tokens: {self._answer.errors}"
        assert self._answer.is_finished, "the answer has no finish reason"
        return self.tokens

    def error(self, *, seconds_max: float = SECONDS_MAX) -> tuple[str, str]:
        """Code and message of the one error that an answer ends with."""
        self.wait_until_over(seconds_max=seconds_max)
        assert not self._answer.is_finished, "the answer has a finish reason"
        (error,) = self._answer.errors
        return error

    def wait_until_cut_off(self, *, seconds_max: float) -> None:
        """The server is gone, in the middle of the answer."""
        self._thread.join(seconds_max)
        assert self.is_over, f"no end within {seconds_max:g} s"
        assert self._failure is not None, "the answer had an end"
        assert not self._answer.is_finished

    def leave(self) -> None:
        """As one whose process was killed: no good-bye to the server."""
        self._has_left = True
        self._line.leave()
        self._thread.join(SECONDS_MAX)
        assert self.is_over
        assert self._failure is None, self._failure

    def _hear(self) -> None:
        try:
            self._line.hear(self._answer)
            assert self._has_left or self._answer.is_finished != bool(self._answer.errors), (
                "no word at the end"
            )
        except BaseException as error:  # noqa: BLE001  for the test's own thread
            self._failure = error


class HttpLine:
    """HTTP/1.0, so that the body is its events and nothing else. Leaving is a reset."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        data = json.dumps(body | {"stream": True}).encode()
        self._leaving = threading.Event()
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=SECONDS_MAX)
        head = f"POST /v1/completions HTTP/1.0\r\nhost: test\r\ncontent-length: {len(data)}\r\n\r\n"
        self._socket.sendall(head.encode() + data)

    def hear(self, answer: Answer) -> None:
        with self._socket:
            unread = self._read_head()
            if unread is None:
                return
            status, rest = unread
            if status == 200:
                self._hear_events(answer, rest)
            else:
                answer.take_json(json.loads(self._read_to_end(rest)))
                assert status >= 500, answer.errors

    def leave(self) -> None:
        self._leaving.set()

    def _read_head(self) -> tuple[int, bytes] | None:
        """The status and what came behind the head; None when the client leaves."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = self._receive()
            if more is None:
                return None
            assert more, f"the connection was closed after {data!r}"
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), rest

    def _hear_events(self, answer: Answer, data: bytes) -> None:
        is_done = False
        while True:
            *events, data = data.split(b"\n\n")
            for event in events:
                assert not is_done, f"{event!r} came after the end"
                is_done = event == b"data: [DONE]"
                if not is_done:
                    answer.take_json(json.loads(event.removeprefix(b"data: ")))
            more = self._receive()
            if more is None:
                return
            if not more:
                break
            data += more
        assert not data, f"the stream ends with {data!r}"
        assert is_done != bool(answer.errors), "a stream ended without a word"

    def _read_to_end(self, data: bytes) -> bytes:
        while more := self._receive():
            data += more
        return data

    def _receive(self) -> bytes | None:
        while not self._leaving.is_set():
            if select.select([self._socket], [], [], LOOK_SECONDS)[0]:
                return self._socket.recv(65536)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
        return None


class GrpcLine:
    """Leaving is a cancel."""

    def __init__(self, address: str, body: dict[str, Any]) -> None:
        message = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=body["prompt"]),
            max_tokens=body["max_tokens"],
            ignore_eos=body["ignore_eos"],
            sampling=pb.Sampling(temperature=body["temperature"]),
        )
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        generate: Any = self._channel.unary_stream(
            GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        self._call: Any = generate(message, timeout=SECONDS_MAX)
        self._is_leaving = False

    def hear(self, answer: Answer) -> None:
        try:
            for part in self._call:
                answer.take(part.choice, [token.token_id for token in part.tokens], part.finish_reason)
        except grpc.RpcError:
            if not self._is_leaving:
                answer.errors.append((self._call.code().name, self._call.details()))
        finally:
            self._channel.close()

    def leave(self) -> None:
        self._is_leaving = True
        self._call.cancel()
