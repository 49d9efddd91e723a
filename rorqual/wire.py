"""The session on the wire: our dataclasses to protobuf bytes and back, and the names gRPC knows the session
by.

The worker's session server and the router's fleet both send and receive plain bytes through gRPC and turn
them here, so that bytes which do not decode are an error of ours with a clear line, never an exception inside
gRPC. Counts that must agree are compared here too: past this module a message is whole. The Lending service's
messages, which only workers speak, are in `engine.worker.wire`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from rorqual.errors import WireError
from rorqual.feed import ITEMS_MAX, Subscribe
from rorqual.feed_wire import item_from_pb, item_to_pb, subscribe_from_pb, subscribe_to_pb
from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import (
    PROTOCOL,
    Alternatives,
    Cancel,
    Command,
    Credit,
    ErrorCode,
    FinishReason,
    Hello,
    Load,
    Offer,
    Open,
    PeerFetch,
    PromptLogprobs,
    RecordOffer,
    Renew,
    Role,
    SequenceReport,
    Source,
    StepReport,
    Take,
    TokenArray,
    Welcome,
)
from rorqual.usage_wire import usage_from_pb, usage_to_pb
from rorqual.v1 import worker_pb2 as pb

SERVICE = "rorqual.v1.Worker"
SESSION_METHOD = "Session"
SESSION_PATH = f"/{SERVICE}/{SESSION_METHOD}"

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Bound on one message in either direction. Neither side comes near it, since gRPC ends the whole session over
one message beyond: a prompt of a million tokens is 4 MB up, and a host cuts its reports into messages of
under a megabyte, or one step of one sequence, at most `rorqual.sampling.PROMPT_SCORES_MAX` values."""

T = TypeVar("T")

_sampling_encoder = msgspec.msgpack.Encoder()
_sampling_decoder = msgspec.msgpack.Decoder(SamplingParams)


def encode_command(command: Hello | Command) -> bytes:
    match command:
        case Open():
            message = pb.Command(open=_open_to_pb(command))
        case Take():
            message = pb.Command(take=_take_to_pb(command))
        case Renew():
            message = pb.Command(renew=pb.Renew(sequence_ids=command.sequence_ids))
        case Cancel():
            message = pb.Command(cancel=pb.Cancel(sequence_id=command.sequence_id))
        case Subscribe():
            message = pb.Command(subscribe=subscribe_to_pb(command))
        case Hello():
            message = pb.Command(
                hello=pb.Hello(
                    protocol=command.protocol,
                    router_id=command.router_id,
                    observes=command.observes,
                    version=command.version,
                )
            )
    return message.SerializeToString()


def decode_command(data: bytes) -> Hello | Command:
    """Raises WireError when the bytes are no command."""
    message = pb.Command()
    parse(message, data, "command")
    match message.WhichOneof("command"):
        case "open":
            return _open_from_pb(message.open)
        case "take":
            return _take_from_pb(message.take)
        case "renew":
            return Renew(sequence_ids=tuple(map(SequenceId, message.renew.sequence_ids)))
        case "cancel":
            return Cancel(sequence_id=SequenceId(message.cancel.sequence_id))
        case "subscribe":
            return subscribe_from_pb(message.subscribe)
        case "hello":
            return Hello(
                protocol=message.hello.protocol,
                router_id=message.hello.router_id,
                observes=message.hello.observes,
                version=message.hello.version,
            )
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
    parse(message, data, "report")
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


def parse(message: Any, data: bytes, what: str) -> None:
    """Fill a protobuf message; `what` names it in the error. Raises WireError."""
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"{what} does not decode: {error}") from None


def unpack(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    """One of our structs that travels as msgpack within a message. Raises WireError."""
    try:
        return decoder.decode(data)
    # Besides its own error msgspec lets these two through: a broken string, and deep nesting in a field too many.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{what} do not decode: {error}") from None


def lease_to_pb(lease: LeaseName) -> pb.LeaseName:
    return pb.LeaseName(
        worker_id=lease.worker_id,
        incarnation=lease.incarnation,
        lease_id=lease.lease_id,
        generation=lease.generation,
    )


def lease_from_pb(message: pb.Source | pb.Offer | pb.LeaseRequest) -> LeaseName:
    """The lease that a message names. Raises WireError when it names none."""
    if not message.HasField("lease"):
        raise WireError(f"{type(message).__name__} names no lease")
    lease = message.lease
    return LeaseName(
        worker_id=WorkerId(lease.worker_id),
        incarnation=Incarnation(lease.incarnation),
        lease_id=lease.lease_id,
        generation=lease.generation,
    )


def check_number(value: float, what: str) -> float:
    """A duration or rate from a peer. Raises WireError: a NaN would make every later comparison false."""
    if not (math.isfinite(value) and value >= 0):
        raise WireError(f"{what} is {value}; it must be a number of at least 0")
    return value


def _open_to_pb(command: Open) -> pb.Open:
    return pb.Open(
        sequence_id=command.sequence_id,
        request_id=command.request_id,
        prompt=tokens_to_bytes(command.prompt),
        max_tokens=command.max_tokens,
        ignore_eos=command.ignore_eos,
        sampling=_sampling_encoder.encode(command.sampling),
        source=None if command.source is None else _source_to_pb(command.source),
        cache_salt=command.cache_salt,
        fetch=None if command.fetch is None else _fetch_to_pb(command.fetch),
    )


def _open_from_pb(message: pb.Open) -> Open:
    sampling = unpack(_sampling_decoder, message.sampling, "sampling parameters")
    return Open(
        sequence_id=SequenceId(message.sequence_id),
        request_id=message.request_id,
        prompt=tokens_from_bytes(message.prompt),
        max_tokens=message.max_tokens,
        ignore_eos=message.ignore_eos,
        sampling=sampling,
        source=_source_from_pb(message.source) if message.HasField("source") else None,
        cache_salt=message.cache_salt,
        fetch=_fetch_from_pb(message.fetch) if message.HasField("fetch") else None,
    )


def _fetch_to_pb(fetch: PeerFetch) -> pb.PeerFetch:
    return pb.PeerFetch(
        address=fetch.address,
        num_pages=fetch.num_pages,
        wants_tail=fetch.wants_tail,
        seconds_max=fetch.seconds_max,
    )


def _fetch_from_pb(message: pb.PeerFetch) -> PeerFetch:
    if not message.address or not message.num_pages:
        raise WireError("fetch has no address or no pages")
    return PeerFetch(
        address=message.address,
        num_pages=message.num_pages,
        wants_tail=message.wants_tail,
        seconds_max=check_number(message.seconds_max, "seconds_max of a fetch"),
    )


def _source_to_pb(source: Source) -> pb.Source:
    return pb.Source(address=source.address, lease=lease_to_pb(source.lease), wire_id=source.wire_id)


def _source_from_pb(message: pb.Source) -> Source:
    if not message.address or not message.wire_id:
        raise WireError("source has no address or no wire id")
    return Source(address=message.address, lease=lease_from_pb(message), wire_id=message.wire_id)


def _take_to_pb(command: Take) -> pb.Take:
    return pb.Take(
        sequence_id=command.sequence_id, offer=offer_to_pb(command.offer), token_ids=command.token_ids
    )


def _take_from_pb(message: pb.Take) -> Take:
    offer = offer_from_pb(message.offer)
    if bool(message.token_ids) != (offer.record is not None):
        has = "a" if offer.record is not None else "no"
        raise WireError(f"take has {has} record and {len(message.token_ids)} tokens")
    if message.token_ids and max(message.token_ids) >= 2**31:
        raise WireError("take has a token id of 2**31 or more")
    return Take(sequence_id=SequenceId(message.sequence_id), offer=offer, token_ids=tuple(message.token_ids))


def offer_to_pb(offer: Offer) -> pb.Offer:
    """Also for `engine.worker.wire`."""
    record = offer.record
    return pb.Offer(
        lease=lease_to_pb(offer.lease),
        wire_id=offer.wire_id,
        lease_seconds=offer.lease_seconds,
        transfer_seconds=offer.transfer_seconds,
        first_page=offer.first_page,
        pages=offer.pages,
        digests=offer.digests,
        record=None
        if record is None
        else pb.RecordOffer(
            record=record.record,
            num_tokens=record.num_tokens,
            num_bytes=record.num_bytes,
            digest=record.digest,
        ),
    )


def offer_from_pb(message: pb.Offer) -> Offer:
    """Raises WireError."""
    num_pages, num_digests = len(message.pages), len(message.digests)
    # How many components are paged is the layout's business; that each page has as many digests is ours.
    if num_digests % num_pages if num_pages else num_digests:
        raise WireError(f"offer has {num_pages} pages and {num_digests} digests")
    if not message.wire_id:
        raise WireError("offer has no wire id")
    return Offer(
        lease=lease_from_pb(message),
        wire_id=message.wire_id,
        lease_seconds=check_number(message.lease_seconds, "lease_seconds of an offer"),
        transfer_seconds=check_number(message.transfer_seconds, "transfer_seconds of an offer"),
        first_page=message.first_page,
        pages=tuple(message.pages),
        digests=tuple(message.digests),
        record=_record_from_pb(message.record) if message.HasField("record") else None,
    )


def _record_from_pb(message: pb.RecordOffer) -> RecordOffer:
    if not message.num_tokens or not message.num_bytes:
        raise WireError(f"record has {message.num_tokens} tokens and {message.num_bytes} bytes")
    return RecordOffer(
        record=message.record,
        num_tokens=message.num_tokens,
        num_bytes=message.num_bytes,
        digest=message.digest,
    )


def _step_to_pb(report: StepReport) -> pb.StepReport:
    return pb.StepReport(
        number=report.number,
        sequences=[_sequence_to_pb(sequence) for sequence in report.sequences],
        load=_load_to_pb(report.load),
        draining=report.draining,
        credit=_credit_to_pb(report.credit),
        feed=[item_to_pb(item) for item in report.feed],
        usage=usage_to_pb(report.usage),
    )


def _step_from_pb(message: pb.StepReport) -> StepReport:
    if len(message.feed) > ITEMS_MAX:
        raise WireError(f"report has {len(message.feed)} feed items; at most {ITEMS_MAX} are allowed")
    return StepReport(
        number=message.number,
        sequences=tuple(_sequence_from_pb(sequence) for sequence in message.sequences),
        load=_load_from_pb(message.load),
        draining=message.draining,
        credit=_credit_from_pb(message),
        feed=tuple(map(item_from_pb, message.feed)),
        usage=usage_from_pb(message),
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
        offer=offer_to_pb(report.offer) if report.offer is not None else None,
        bound=report.bound,
        cached_tokens=report.cached_tokens,
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
        offer=offer_from_pb(message.offer) if message.HasField("offer") else None,
        bound=message.bound,
        cached_tokens=message.cached_tokens,
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
        role=welcome.role.value,
        wire_id=welcome.wire_id,
        credit=_credit_to_pb(welcome.credit),
        version=welcome.version,
    )


def _welcome_from_pb(message: pb.Welcome) -> Welcome:
    if message.protocol != PROTOCOL:
        raise WireError(f"worker speaks protocol {message.protocol}; this router speaks {PROTOCOL}")
    role = _role(message.role)
    if role is not Role.BOTH and not message.wire_id:
        raise WireError(f"{role.value} worker names no wire id")
    if role is Role.DECODE and not message.HasField("credit"):
        raise WireError("decode worker grants no credit")
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
        role=role,
        wire_id=message.wire_id,
        credit=_credit_from_pb(message),
        version=message.version,
    )


def _role(text: str) -> Role:
    try:
        return Role(text) if text else Role.BOTH
    except ValueError:
        raise WireError(f"unknown role {text!r}") from None


def _credit_to_pb(credit: Credit | None) -> pb.Credit | None:
    return None if credit is None else pb.Credit(sequences=credit.sequences, pages=credit.pages)


def _credit_from_pb(message: pb.Welcome | pb.StepReport) -> Credit | None:
    if not message.HasField("credit"):
        return None
    return Credit(sequences=message.credit.sequences, pages=message.credit.pages)


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
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        pages_leased=load.pages_leased,
        peer_bytes_per_second=load.peer_bytes_per_second,
        peer_latency_seconds=load.peer_latency_seconds,
        host_bytes_per_second=load.host_bytes_per_second,
        host_latency_seconds=load.host_latency_seconds,
        store_bytes_per_second=load.store_bytes_per_second,
        store_latency_seconds=load.store_latency_seconds,
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
        step_ms=check_number(message.step_ms, "step_ms"),
        prefill_tokens_per_second=check_number(
            message.prefill_tokens_per_second, "prefill_tokens_per_second"
        ),
        pages_leased=message.pages_leased,
        peer_bytes_per_second=check_number(message.peer_bytes_per_second, "peer_bytes_per_second"),
        peer_latency_seconds=check_number(message.peer_latency_seconds, "peer_latency_seconds"),
        host_bytes_per_second=check_number(message.host_bytes_per_second, "host_bytes_per_second"),
        host_latency_seconds=check_number(message.host_latency_seconds, "host_latency_seconds"),
        store_bytes_per_second=check_number(message.store_bytes_per_second, "store_bytes_per_second"),
        store_latency_seconds=check_number(message.store_latency_seconds, "store_latency_seconds"),
    )
