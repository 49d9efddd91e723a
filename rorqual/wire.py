"""The session on the wire: our dataclasses to protobuf bytes and back, and the names gRPC knows the session
by.

The only module that imports the stubs of worker.proto. The worker's session server and the router's fleet
both send and receive plain bytes through gRPC and turn them here, so that bytes which do not decode are an
error of ours with a clear line, never an exception inside gRPC.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from rorqual.errors import RorqualError
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import (
    PROTOCOL,
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
    TokenArray,
    Welcome,
)
from rorqual.v1 import worker_pb2 as pb

SERVICE = "rorqual.v1.Worker"
SESSION_METHOD = "Session"
SESSION_PATH = f"/{SERVICE}/{SESSION_METHOD}"

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Bound on one message in either direction. Neither side comes near it, since gRPC ends the whole session over
one message beyond: a prompt of a million tokens is 4 MB up, and a host cuts its reports into messages of
under a megabyte, or one step of one sequence, at most `rorqual.sampling.PROMPT_SCORES_MAX` values."""

_sampling_encoder = msgspec.msgpack.Encoder()
_sampling_decoder = msgspec.msgpack.Decoder(SamplingParams)


class WireError(RorqualError):
    """Bytes from a peer that are not a message of this protocol."""


def encode_command(command: Hello | Open | Cancel) -> bytes:
    match command:
        case Open():
            message = pb.Command(open=_open_to_pb(command))
        case Cancel():
            message = pb.Command(cancel=pb.Cancel(sequence_id=command.sequence_id))
        case Hello():
            message = pb.Command(hello=pb.Hello(protocol=command.protocol, router_id=command.router_id))
    return message.SerializeToString()


def decode_command(data: bytes) -> Hello | Open | Cancel:
    """Raises WireError when the bytes are no command."""
    message = pb.Command()
    _parse(message, data, "command")
    match message.WhichOneof("command"):
        case "open":
            return _open_from_pb(message.open)
        case "cancel":
            return Cancel(sequence_id=SequenceId(message.cancel.sequence_id))
        case "hello":
            return Hello(protocol=message.hello.protocol, router_id=message.hello.router_id)
        case _:
            raise WireError("command is empty or of a kind this version does not know")


def encode_report(report: Welcome | StepReport) -> bytes:
    match report:
        case StepReport():
            message = pb.Report(step=_step_to_pb(report))
        case Welcome():
            message = pb.Report(welcome=_welcome_to_pb(report))
    return message.SerializeToString()


def decode_report(data: bytes) -> Welcome | StepReport:
    """Raises WireError when the bytes are no report, or a welcome of another protocol."""
    message = pb.Report()
    _parse(message, data, "report")
    match message.WhichOneof("report"):
        case "step":
            return _step_from_pb(message.step)
        case "welcome":
            return _welcome_from_pb(message.welcome)
        case _:
            raise WireError("report is empty or of a kind this version does not know")


def tokens_to_bytes(tokens: TokenArray) -> bytes:
    """Little-endian, whatever the machine."""
    return tokens.astype("<i4", copy=False).tobytes()


def tokens_from_bytes(data: bytes) -> TokenArray:
    """Raises WireError for a length that is not whole tokens. The sign bit must be clear: ids are below
    2**31."""
    if len(data) % 4:
        raise WireError(f"prompt has {len(data)} bytes, which is not a multiple of 4")
    tokens = np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
    if tokens.size and int(tokens.min()) < 0:
        raise WireError("prompt has a token id of 2**31 or more")
    return tokens


def _parse(message: Any, data: bytes, what: str) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"{what} does not decode: {error}") from None


def _open_to_pb(command: Open) -> pb.Open:
    return pb.Open(
        sequence_id=command.sequence_id,
        request_id=command.request_id,
        prompt=tokens_to_bytes(command.prompt),
        max_tokens=command.max_tokens,
        ignore_eos=command.ignore_eos,
        sampling=_sampling_encoder.encode(command.sampling),
    )


def _open_from_pb(message: pb.Open) -> Open:
    try:
        sampling = _sampling_decoder.decode(message.sampling)
    except msgspec.DecodeError as error:
        raise WireError(f"sampling parameters do not decode: {error}") from None
    return Open(
        sequence_id=SequenceId(message.sequence_id),
        request_id=message.request_id,
        prompt=tokens_from_bytes(message.prompt),
        max_tokens=message.max_tokens,
        ignore_eos=message.ignore_eos,
        sampling=sampling,
    )


def _step_to_pb(report: StepReport) -> pb.StepReport:
    return pb.StepReport(
        number=report.number,
        sequences=[_sequence_to_pb(sequence) for sequence in report.sequences],
        load=_load_to_pb(report.load),
        draining=report.draining,
    )


def _step_from_pb(message: pb.StepReport) -> StepReport:
    return StepReport(
        number=message.number,
        sequences=tuple(_sequence_from_pb(sequence) for sequence in message.sequences),
        load=_load_from_pb(message.load),
        draining=message.draining,
    )


def _sequence_to_pb(report: SequenceReport) -> pb.SequenceReport:
    message = pb.SequenceReport(
        sequence_id=report.sequence_id,
        first_index=report.first_index,
        token_ids=report.token_ids,
        logprobs=report.logprobs,
        alternatives=_alternatives_to_pb(report.alternatives) if report.alternatives else None,
        finish_reason=report.finish_reason.value if report.finish_reason else "",
        error=report.error,
        error_code=report.error_code.value if report.error_code else "",
    )
    if report.prompt_logprobs is not None:
        message.prompt_logprobs.first = report.prompt_logprobs.first
        message.prompt_logprobs.logprobs.extend(report.prompt_logprobs.logprobs)
        message.prompt_logprobs.alternatives.extend(_alternatives_to_pb(report.prompt_logprobs.alternatives))
        message.prompt_logprobs.SetInParent()
    return message


def _sequence_from_pb(message: pb.SequenceReport) -> SequenceReport:
    report = SequenceReport(
        sequence_id=SequenceId(message.sequence_id),
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        alternatives=_alternatives_from_pb(message.alternatives) if message.alternatives else (),
        finish_reason=_finish_reason(message.finish_reason),
        error=message.error,
        error_code=_error_code(message.error_code),
        prompt_logprobs=_prompt_logprobs_from_pb(message) if message.HasField("prompt_logprobs") else None,
    )
    if len(report.logprobs) not in (0, len(report.token_ids)):
        raise WireError(f"report has {len(report.token_ids)} tokens and {len(report.logprobs)} logprobs")
    if len(report.alternatives) not in (0, len(report.token_ids)):
        raise WireError(
            f"report has {len(report.token_ids)} tokens and {len(report.alternatives)} alternatives"
        )
    return report


def _finish_reason(text: str) -> FinishReason | None:
    if not text:
        return None
    try:
        return FinishReason(text)
    except ValueError:
        raise WireError(f"unknown finish reason {text!r}") from None


def _error_code(text: str) -> ErrorCode | None:
    if not text:
        return None
    try:
        return ErrorCode(text)
    except ValueError:
        raise WireError(f"unknown error code {text!r}") from None


def _alternatives_to_pb(items: Iterable[Alternatives]) -> list[pb.Alternatives]:
    return [pb.Alternatives(token_ids=item.token_ids, logprobs=item.logprobs) for item in items]


def _alternatives_from_pb(items: Iterable[pb.Alternatives]) -> tuple[Alternatives, ...]:
    return tuple(
        Alternatives(token_ids=tuple(item.token_ids), logprobs=tuple(item.logprobs)) for item in items
    )


def _prompt_logprobs_from_pb(message: pb.SequenceReport) -> PromptLogprobs:
    scores = message.prompt_logprobs
    if len(scores.alternatives) != len(scores.logprobs):
        raise WireError(
            f"report has {len(scores.logprobs)} prompt logprobs and {len(scores.alternatives)} alternatives"
        )
    return PromptLogprobs(
        first=scores.first,
        logprobs=tuple(scores.logprobs),
        alternatives=_alternatives_from_pb(scores.alternatives),
    )


def _welcome_to_pb(welcome: Welcome) -> pb.Welcome:
    return pb.Welcome(
        protocol=PROTOCOL,
        worker_id=welcome.worker_id,
        incarnation=welcome.incarnation,
        model_fingerprint=welcome.model_fingerprint,
        numerics=welcome.numerics,
        exact=welcome.exact,
        vocab_size=welcome.vocab_size,
        sequence_tokens_max=welcome.sequence_tokens_max,
        eos_token_ids=welcome.eos_token_ids,
        sequences_max=welcome.sequences_max,
        load=_load_to_pb(welcome.load),
    )


def _welcome_from_pb(message: pb.Welcome) -> Welcome:
    if message.protocol != PROTOCOL:
        raise WireError(f"worker speaks protocol {message.protocol}; this router speaks {PROTOCOL}")
    return Welcome(
        worker_id=WorkerId(message.worker_id),
        incarnation=Incarnation(message.incarnation),
        model_fingerprint=message.model_fingerprint,
        numerics=message.numerics,
        exact=message.exact,
        vocab_size=message.vocab_size,
        sequence_tokens_max=message.sequence_tokens_max,
        eos_token_ids=tuple(message.eos_token_ids),
        sequences_max=message.sequences_max,
        load=_load_from_pb(message.load),
    )


def _load_to_pb(load: Load) -> pb.Load:
    return pb.Load(
        sequences_running=load.sequences_running,
        sequences_waiting=load.sequences_waiting,
        tokens_waiting=load.tokens_waiting,
        pages_free=load.pages_free,
        pages_total=load.pages_total,
        slots_free=load.slots_free,
        slots_total=load.slots_total,
        step_ms=load.step_ms,
    )


def _load_from_pb(message: pb.Load) -> Load:
    return Load(
        sequences_running=message.sequences_running,
        sequences_waiting=message.sequences_waiting,
        tokens_waiting=message.tokens_waiting,
        pages_free=message.pages_free,
        pages_total=message.pages_total,
        slots_free=message.slots_free,
        slots_total=message.slots_total,
        step_ms=message.step_ms,
    )
