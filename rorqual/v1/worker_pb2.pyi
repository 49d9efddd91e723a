from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseName(_message.Message):
    __slots__ = ("worker_id", "incarnation", "lease_id", "generation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    lease_id: int
    generation: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., lease_id: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("incarnation", "wire_id")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WIRE_ID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    wire_id: str
    def __init__(self, incarnation: _Optional[int] = ..., wire_id: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("endpoint", "digest")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    endpoint: bytes
    digest: int
    def __init__(self, endpoint: _Optional[bytes] = ..., digest: _Optional[int] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseName
    def __init__(self, lease: _Optional[_Union[LeaseName, _Mapping]] = ...) -> None: ...

class LeaseKeysRequest(_message.Message):
    __slots__ = ("wire_id", "keys", "first_page", "wants_tail")
    WIRE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    WANTS_TAIL_FIELD_NUMBER: _ClassVar[int]
    wire_id: str
    keys: bytes
    first_page: int
    wants_tail: bool
    def __init__(self, wire_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., first_page: _Optional[int] = ..., wants_tail: _Optional[bool] = ...) -> None: ...

class LeaseKeysReply(_message.Message):
    __slots__ = ("offer",)
    OFFER_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("live", "remaining_seconds")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    REMAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    live: bool
    remaining_seconds: float
    def __init__(self, live: _Optional[bool] = ..., remaining_seconds: _Optional[float] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("hello", "open", "cancel", "renew", "take", "subscribe")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    cancel: Cancel
    renew: Renew
    take: Take
    subscribe: Subscribe
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., take: _Optional[_Union[Take, _Mapping]] = ..., subscribe: _Optional[_Union[Subscribe, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("sequence_ids",)
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Take(_message.Message):
    __slots__ = ("sequence_id", "offer", "token_ids")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    offer: Offer
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[int] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Subscribe(_message.Message):
    __slots__ = ("incarnation", "number")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    number: int
    def __init__(self, incarnation: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("address", "lease", "wire_id")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WIRE_ID_FIELD_NUMBER: _ClassVar[int]
    address: str
    lease: LeaseName
    wire_id: str
    def __init__(self, address: _Optional[str] = ..., lease: _Optional[_Union[LeaseName, _Mapping]] = ..., wire_id: _Optional[str] = ...) -> None: ...

class PeerFetch(_message.Message):
    __slots__ = ("address", "num_pages", "wants_tail", "seconds_max")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    WANTS_TAIL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_MAX_FIELD_NUMBER: _ClassVar[int]
    address: str
    num_pages: int
    wants_tail: bool
    seconds_max: float
    def __init__(self, address: _Optional[str] = ..., num_pages: _Optional[int] = ..., wants_tail: _Optional[bool] = ..., seconds_max: _Optional[float] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("lease", "wire_id", "lease_seconds", "first_page", "pages", "digests", "record", "transfer_seconds")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WIRE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseName
    wire_id: str
    lease_seconds: float
    first_page: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    record: RecordOffer
    transfer_seconds: float
    def __init__(self, lease: _Optional[_Union[LeaseName, _Mapping]] = ..., wire_id: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., first_page: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ..., record: _Optional[_Union[RecordOffer, _Mapping]] = ..., transfer_seconds: _Optional[float] = ...) -> None: ...

class RecordOffer(_message.Message):
    __slots__ = ("record", "num_tokens", "num_bytes", "digest")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    record: int
    num_tokens: int
    num_bytes: int
    digest: int
    def __init__(self, record: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "router_id", "observes", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    OBSERVES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    router_id: str
    observes: bool
    version: str
    def __init__(self, protocol: _Optional[int] = ..., router_id: _Optional[str] = ..., observes: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("sequence_id", "request_id", "prompt", "max_tokens", "ignore_eos", "sampling", "source", "cache_salt", "fetch")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    request_id: str
    prompt: bytes
    max_tokens: int
    ignore_eos: bool
    sampling: bytes
    source: Source
    cache_salt: str
    fetch: PeerFetch
    def __init__(self, sequence_id: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., sampling: _Optional[bytes] = ..., source: _Optional[_Union[Source, _Mapping]] = ..., cache_salt: _Optional[str] = ..., fetch: _Optional[_Union[PeerFetch, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    def __init__(self, sequence_id: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("welcome", "step")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepReport
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepReport, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "worker_id", "incarnation", "model_fingerprint", "numerics", "exact", "vocab_size", "sequence_tokens_max", "eos_token_ids", "sequences_max", "load", "role", "wire_id", "credit", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WIRE_ID_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker_id: str
    incarnation: int
    model_fingerprint: str
    numerics: str
    exact: bool
    vocab_size: int
    sequence_tokens_max: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sequences_max: int
    load: Load
    role: str
    wire_id: str
    credit: Credit
    version: str
    def __init__(self, protocol: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., numerics: _Optional[str] = ..., exact: _Optional[bool] = ..., vocab_size: _Optional[int] = ..., sequence_tokens_max: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., sequences_max: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., role: _Optional[str] = ..., wire_id: _Optional[str] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("sequences", "pages")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    pages: int
    def __init__(self, sequences: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("number", "sequences", "load", "draining", "credit", "feed", "usage")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceReport]
    load: Load
    draining: bool
    credit: Credit
    feed: _containers.RepeatedCompositeFieldContainer[FeedItem]
    usage: WorkerUsage
    def __init__(self, number: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceReport, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: _Optional[bool] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., feed: _Optional[_Iterable[_Union[FeedItem, _Mapping]]] = ..., usage: _Optional[_Union[WorkerUsage, _Mapping]] = ...) -> None: ...

class WorkerUsage(_message.Message):
    __slots__ = ("num_prompts", "prompts", "num_streams", "streams")
    NUM_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    num_prompts: int
    prompts: _containers.RepeatedCompositeFieldContainer[PromptSample]
    num_streams: int
    streams: _containers.RepeatedCompositeFieldContainer[StreamSample]
    def __init__(self, num_prompts: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[PromptSample, _Mapping]]] = ..., num_streams: _Optional[int] = ..., streams: _Optional[_Iterable[_Union[StreamSample, _Mapping]]] = ...) -> None: ...

class PromptSample(_message.Message):
    __slots__ = ("prompt_tokens", "computed_tokens", "ttft_seconds")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    computed_tokens: int
    ttft_seconds: float
    def __init__(self, prompt_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., ttft_seconds: _Optional[float] = ...) -> None: ...

class StreamSample(_message.Message):
    __slots__ = ("context_tokens", "generated_tokens", "itl_seconds")
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ITL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    context_tokens: int
    generated_tokens: int
    itl_seconds: float
    def __init__(self, context_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., itl_seconds: _Optional[float] = ...) -> None: ...

class FeedItem(_message.Message):
    __slots__ = ("part", "delta", "digest")
    PART_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    part: SnapshotPart
    delta: Delta
    digest: Digest
    def __init__(self, part: _Optional[_Union[SnapshotPart, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., digest: _Optional[_Union[Digest, _Mapping]] = ...) -> None: ...

class SnapshotPart(_message.Message):
    __slots__ = ("incarnation", "number", "part", "num_parts", "num_entries", "digest", "keys", "flags")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    number: int
    part: int
    num_parts: int
    num_entries: int
    digest: int
    keys: bytes
    flags: bytes
    def __init__(self, incarnation: _Optional[int] = ..., number: _Optional[int] = ..., part: _Optional[int] = ..., num_parts: _Optional[int] = ..., num_entries: _Optional[int] = ..., digest: _Optional[int] = ..., keys: _Optional[bytes] = ..., flags: _Optional[bytes] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("incarnation", "number", "digest", "keys", "changes")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    number: int
    digest: int
    keys: bytes
    changes: bytes
    def __init__(self, incarnation: _Optional[int] = ..., number: _Optional[int] = ..., digest: _Optional[int] = ..., keys: _Optional[bytes] = ..., changes: _Optional[bytes] = ...) -> None: ...

class Digest(_message.Message):
    __slots__ = ("incarnation", "number", "num_entries", "digest")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    number: int
    num_entries: int
    digest: int
    def __init__(self, incarnation: _Optional[int] = ..., number: _Optional[int] = ..., num_entries: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class SequenceReport(_message.Message):
    __slots__ = ("sequence_id", "first_index", "token_ids", "logprobs", "alternatives", "finish_reason", "error", "prompt_logprobs", "error_code", "offer", "bound", "cached_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternatives]
    finish_reason: str
    error: str
    prompt_logprobs: PromptLogprobs
    error_code: str
    offer: Offer
    bound: bool
    cached_tokens: int
    def __init__(self, sequence_id: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., alternatives: _Optional[_Iterable[_Union[Alternatives, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., error: _Optional[str] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., error_code: _Optional[str] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., bound: _Optional[bool] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Alternatives(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("logprobs", "alternatives", "first")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternatives]
    first: int
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., alternatives: _Optional[_Iterable[_Union[Alternatives, _Mapping]]] = ..., first: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("sequences_running", "sequences_waiting", "tokens_waiting", "pages_free", "pages_total", "slots_free", "slots_total", "step_ms", "prefill_tokens_per_second", "pages_leased", "peer_bytes_per_second", "peer_latency_seconds", "host_bytes_per_second", "host_latency_seconds", "store_bytes_per_second", "store_latency_seconds")
    SEQUENCES_RUNNING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_WAITING_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PAGES_LEASED_FIELD_NUMBER: _ClassVar[int]
    PEER_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PEER_LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    HOST_LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STORE_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STORE_LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequences_running: int
    sequences_waiting: int
    tokens_waiting: int
    pages_free: int
    pages_total: int
    slots_free: int
    slots_total: int
    step_ms: float
    prefill_tokens_per_second: float
    pages_leased: int
    peer_bytes_per_second: float
    peer_latency_seconds: float
    host_bytes_per_second: float
    host_latency_seconds: float
    store_bytes_per_second: float
    store_latency_seconds: float
    def __init__(self, sequences_running: _Optional[int] = ..., sequences_waiting: _Optional[int] = ..., tokens_waiting: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_total: _Optional[int] = ..., slots_free: _Optional[int] = ..., slots_total: _Optional[int] = ..., step_ms: _Optional[float] = ..., prefill_tokens_per_second: _Optional[float] = ..., pages_leased: _Optional[int] = ..., peer_bytes_per_second: _Optional[float] = ..., peer_latency_seconds: _Optional[float] = ..., host_bytes_per_second: _Optional[float] = ..., host_latency_seconds: _Optional[float] = ..., store_bytes_per_second: _Optional[float] = ..., store_latency_seconds: _Optional[float] = ...) -> None: ...
