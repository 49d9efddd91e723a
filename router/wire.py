"""The public gRPC messages, turned into our own dataclasses and back. Nothing else in the router imports
the stubs.

Called by `router.grpc_gateway`. It checks presence and types only; ranges are the gateway's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from rorqual.v1 import generate_pb2
from router.generation import ChoiceUpdate, Usage

SERVICE_NAME = generate_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A GenerateRequest. None: the client did not set the field. `sampling` holds only what was set."""

    model: str
    text: str | None
    token_ids: list[int] | None
    max_tokens: int | None
    num_choices: int | None
    stops: tuple[str, ...]
    ignore_eos: bool
    session_key: str
    seed: int | None
    logprobs: int | None
    logit_bias: tuple[tuple[int, float], ...]
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


class CallContext:
    """A call in progress: the client's metadata, and where its responses go."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    def metadata(self, key: str) -> str:
        for name, value in self._context.invocation_metadata() or ():
            if name == key and isinstance(value, str):
                return value
        return ""

    async def write(
        self, update: ChoiceUpdate, *, request_id: str, seed: int, finish_reason: str, usage: Usage | None
    ) -> None:
        await self._context.write(_response(update, request_id, seed, finish_reason, usage))

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """Sets what the call ends with once its handler returns."""
        self._context.set_code(code)
        self._context.set_details(details)


Generate = Callable[[GenerateCall, CallContext], Awaitable[None]]


def add_generation_service(server: grpc.aio.Server, generate: Generate) -> None:
    """Decodes requests itself: gRPC would answer UNKNOWN, with the name of a Python class, to what is none."""

    async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        call_context = CallContext(context)
        try:
            request = generate_pb2.GenerateRequest.FromString(data)
        except DecodeError:
            call_context.fail(grpc.StatusCode.INVALID_ARGUMENT, "the message is no GenerateRequest")
            return
        await generate(_call(request), call_context)

    handler = grpc.unary_stream_rpc_method_handler(
        answer, response_serializer=generate_pb2.GenerateResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE_NAME, {"Generate": handler}),)
    )


def _call(request: generate_pb2.GenerateRequest) -> GenerateCall:
    prompt = request.WhichOneof("prompt")
    sampling = request.sampling
    return GenerateCall(
        model=request.model,
        text=request.text if prompt == "text" else None,
        token_ids=list(request.token_ids.ids) if prompt == "token_ids" else None,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        num_choices=request.n or None,
        stops=tuple(request.stop),
        ignore_eos=request.ignore_eos,
        session_key=request.session_key,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        sampling={name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)},
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _response(
    update: ChoiceUpdate, request_id: str, seed: int, finish_reason: str, usage: Usage | None
) -> generate_pb2.GenerateResponse:
    return generate_pb2.GenerateResponse(
        request_id=request_id,
        choice=update.choice,
        tokens=[
            generate_pb2.Token(
                index=update.first_index + offset,
                token_id=token.token_id,
                logprob=token.logprob,
                alternatives=[
                    generate_pb2.Alternative(token_id=token_id, logprob=logprob)
                    for token_id, logprob in token.alternatives
                ],
            )
            for offset, token in enumerate(update.tokens)
        ],
        text=update.text,
        finish_reason=finish_reason,
        usage=None
        if usage is None
        else generate_pb2.Usage(
            prompt_tokens=usage.num_prompt_tokens,
            completion_tokens=usage.num_completion_tokens,
            cached_tokens=usage.num_cached_tokens,
        ),
        seed=seed,
    )
