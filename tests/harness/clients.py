"""Clients of a served model: the same request over HTTP, streamed or whole, and over gRPC, as one kind of answer.

Called by tests against `tests.harness.system` and `tests.harness.pools`. A client holds the server to the form of its
answers: every token before its choice's finish reason, one error at most, and nothing after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import httpx

from rorqual.v1 import generate_pb2 as pb
from tests.harness.system import SECONDS_MAX

GENERATE = "/rorqual.v1.Generation/Generate"
SAMPLING = ("temperature", "top_p", "top_k", "frequency_penalty", "seed")


@dataclass(slots=True)
class Answer:
    """What has been heard so far, by choice."""

    tokens: list[list[int]]
    reasons: list[str]
    errors: list[tuple[str, str]] = field(default_factory=list)  # (kind, message); one at most

    @staticmethod
    def of(num_choices: int) -> Answer:
        return Answer(tokens=[[] for _ in range(num_choices)], reasons=[""] * num_choices)

    @property
    def is_finished(self) -> bool:
        return all(self.reasons)

    def take(self, choice: int, token_ids: list[int], reason: str | None) -> None:
        assert not self.errors, "tokens came after an error"
        assert not self.reasons[choice], "tokens came after a finish reason"
        self.tokens[choice] += token_ids
        self.reasons[choice] = reason or ""

    def take_json(self, event: dict[str, Any]) -> None:
        """An event of a stream, or a whole answer."""
        if "error" in event:
            assert not self.errors, f"a second error: {event}"
            self.errors.append((event["error"]["code"] or event["error"]["type"], event["error"]["message"]))
            return
        for choice in event["choices"]:
            self.take(choice["index"], choice["token_ids"], choice["finish_reason"])


class Client:
    """`heard` is called whenever an answer has grown."""

    def __init__(
        self, http: httpx.AsyncClient, channel: Any, *, heard: Callable[[], None] | None = None
    ) -> None:
        self.http = http
        self._heard = heard or (lambda: None)
        self._generate = channel.unary_stream(
            GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )

    async def whole(self, route: str, body: dict[str, Any], answer: Answer) -> None:
        response = await self.http.post(route, json=body)
        answer.take_json(response.json())
        assert (response.status_code >= 500) == bool(answer.errors), response.text
        self._heard()

    async def stream(self, route: str, body: dict[str, Any], answer: Answer) -> None:
        is_done = False
        async with self.http.stream("POST", route, json=body | {"stream": True}) as response:
            if response.status_code != 200:
                answer.take_json(json.loads(await response.aread()))
                assert response.status_code >= 500, answer
                return
            async for line in response.aiter_lines():
                if not line:
                    continue  # the end of an event
                assert not is_done, f"{line} came after the end"
                if line == "data: [DONE]":
                    is_done = True
                else:
                    answer.take_json(json.loads(line.removeprefix("data: ")))
                    self._heard()
        assert is_done != bool(answer.errors), "a stream ended without a word"

    async def grpc(self, body: dict[str, Any], answer: Answer) -> None:
        """`body` is that of a completion of token ids."""
        message = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=body["prompt"]),
            max_tokens=body["max_tokens"],
            n=body.get("n", 1),
            ignore_eos=body["ignore_eos"],
            sampling=pb.Sampling(**{name: body[name] for name in SAMPLING if name in body}),
        )
        try:
            async for part in self._generate(message, timeout=SECONDS_MAX):
                answer.take(part.choice, [token.token_id for token in part.tokens], part.finish_reason)
                self._heard()
        except grpc.aio.AioRpcError as error:
            answer.errors.append((error.code().name, error.details() or ""))
