"""The session between a router and a worker, as our own dataclasses: commands up, reports down.

`rorqual.wire` turns these into protobuf and back; nothing else touches the generated stubs. The engine's
host answers them, the router's fleet sends them, and tests connect the two in one process without sockets.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rorqual.errors import InvalidRequest
from rorqual.feed import FeedItem, Subscribe
from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import PROMPT_SCORES_MAX, SamplingParams
from rorqual.usage import Usage

PROTOCOL = 1

TokenArray = npt.NDArray[np.int32]
"""Token ids are kept in int32 arrays from the tokenizer to the rank: a Python list of a long prompt costs
milliseconds to convert and 28 bytes a token."""


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence token
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"
    HANDED_OVER = "handed_over"  # on a prefill worker: a decode worker has read the state and goes on with it


class ErrorCode(enum.Enum):
    """Why a sequence ended with ERROR: what the router may do about it."""

    INVALID = "invalid"  # the request is wrong; another worker would say the same
    OVERLOADED = "overloaded"  # full or draining: another worker may take it
    FAILED = "failed"  # the worker or its rank broke


class Role(enum.Enum):
    """What a worker does with a sequence."""

    BOTH = "both"  # computes the prompt and decodes
    PREFILL = "prefill"  # computes the prompt, samples the first token, lends the state
    DECODE = "decode"  # reads the state of a computed prompt and decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first command of a session."""

    protocol: int
    router_id: str
    observes: bool = False  # an autoscaler: opens nothing, has no share of credit, is told of usage
    version: str = ""  # of Rorqual, to be told to people: nothing goes by it; empty: not said


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    sequence_id: SequenceId
    request_id: str
    prompt: TokenArray
    max_tokens: int
    ignore_eos: bool
    sampling: SamplingParams
    source: Source | None = None  # to a decode worker: where the prompt's state is
    cache_salt: str = ""  # kept prefixes are shared among equal salts alone
    fetch: PeerFetch | None = None  # to a worker that computes prompts: what another one may have of it


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFetch:
    """Before a prompt is computed: another worker is known to keep the state of its first pages. What of it cannot be
    read within `seconds_max` is computed, as what nobody keeps."""

    address: str  # host:port of its gRPC door, as the router reaches it
    num_pages: int  # wanted, from the first on; those that the worker has itself are not read
    wants_tail: bool
    seconds_max: float


RENEWALS_PER_LEASE = 3
"""Whoever renews a lease, router or reader, does so this often in its duration: two renewals may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A prompt's state on the worker that computed it, to be read from there."""

    address: str  # host:port of its gRPC door, as the router reaches it
    lease: LeaseName
    wire_id: str  # of the bytes: model, numerics, layout. Another one's state cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOffer:
    """A hand-over record: all state of a sequence but its full pages (`kvstore.handover`)."""

    record: int  # at the owner
    num_tokens: int  # computed: the prompt's length
    num_bytes: int
    digest: int  # unsigned 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Leased state that may be read now: full pages in order, in the last offer the record too. What a prefill
    worker reports goes on, unchanged, to the decode worker that is bound."""

    lease: LeaseName
    wire_id: str
    lease_seconds: float  # from each renewal, on the owner's clock
    transfer_seconds: float  # no read may take longer: the owner keeps its memory for so long after the lease
    first_page: int  # the number within the sequence of pages[0]
    pages: tuple[int, ...]  # ids at the owner
    digests: tuple[int, ...]  # unsigned 64 bits; of each page one for each paged component, in layout order
    record: RecordOffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    sequence_id: SequenceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """To a prefill worker: the leases of these sequences are still wanted. Unknown ids are passed over."""

    sequence_ids: tuple[SequenceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """To a decode worker: an offer for a sequence opened with a source. With the record, which is the last
    one, come the tokens generated so far: the first, which the prefill worker has sampled."""

    sequence_id: SequenceId
    offer: Offer
    token_ids: tuple[int, ...] = ()


Command = Open | Cancel | Renew | Take | Subscribe


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Of the prompt's tokens from number `first` on. Token 0 follows nothing and has none."""

    first: int = 1
    logprobs: tuple[float, ...]
    alternatives: tuple[Alternatives, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """What one step did to one sequence. `logprobs` and `alternatives` are as long as `token_ids`, or
    empty. The prompt's logprobs come in parts as it is computed, each token's once and in order, the last of
    them before the first token."""

    sequence_id: SequenceId
    first_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    error_code: ErrorCode | None = None
    prompt_logprobs: PromptLogprobs | None = None
    offer: Offer | None = None  # from a prefill worker: state that has become readable
    bound: bool = False  # from a decode worker, once: it has room, reads, and renews the lease from now on
    cached_tokens: int = 0  # with token 0: of the prompt, those that did not have to be computed

    @property
    def num_values(self) -> int:
        """Tokens and alternatives it carries, the prompt's too: what bounds on unread reports count. One is
        about 10 bytes on the wire and 70 as Python objects."""
        count = len(self.token_ids)
        if self.alternatives:
            count += sum(len(item.token_ids) for item in self.alternatives)
        if self.prompt_logprobs is not None:
            count += len(self.prompt_logprobs.logprobs)
            count += sum(len(item.token_ids) for item in self.prompt_logprobs.alternatives)
        if self.offer is not None:
            count += len(self.offer.pages) + len(self.offer.digests)
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    sequences_running: int
    sequences_waiting: int
    tokens_waiting: int
    pages_free: int
    pages_total: int
    slots_free: int
    slots_total: int
    step_ms: float
    prefill_tokens_per_second: float = 0.0  # measured lately, 0 before there was any
    peer_bytes_per_second: float = 0.0  # of what it reads from other workers, measured lately; 0: it was not
    peer_latency_seconds: float = 0.0  # of such a read, however short
    host_bytes_per_second: float = 0.0  # the same of its host memory
    host_latency_seconds: float = 0.0
    store_bytes_per_second: float = 0.0  # and of the store that all workers share
    store_latency_seconds: float = 0.0
    pages_leased: int = 0  # lent out, or kept until nobody can be reading or writing them any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """How much one session may have promised to a decode worker and open on it, together: its share of the
    worker. A sequence is charged one sequence and `credit_pages` from before its prefill until its end. A soft bound:
    beyond it a sequence waits for room on the worker, under its lease."""

    sequences: int
    pages: int


def credit_pages(num_prompt: int) -> int:
    """Pages a sequence is charged for: its prompt's and those its first page of output needs."""
    return -(-(num_prompt + PAGE_TOKENS) // PAGE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    worker_id: WorkerId
    incarnation: Incarnation
    model_fingerprint: str
    numerics: str
    exact: bool
    vocab_size: int
    sequence_tokens_max: int
    eos_token_ids: tuple[int, ...]
    sequences_max: int
    load: Load
    role: Role = Role.BOTH
    wire_id: str = ""  # of the state it lends or reads; empty with Role.BOTH
    credit: Credit | None = None  # with Role.DECODE
    version: str = ""  # of Rorqual, to be told to people: nothing goes by it; empty: not said


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    number: int
    sequences: tuple[SequenceReport, ...]
    load: Load
    draining: bool
    credit: Credit | None = None  # with Role.DECODE
    feed: tuple[FeedItem, ...] = ()  # to a router that has subscribed: in order, ITEMS_MAX at most
    usage: Usage | None = None  # to a session that observes


def alternatives_of(pairs: tuple[tuple[int, float], ...]) -> Alternatives:
    """From (token id, logprob) pairs, best first, as the rank sends them."""
    if not pairs:
        return _NO_ALTERNATIVES
    return Alternatives(
        token_ids=tuple(token_id for token_id, _ in pairs), logprobs=tuple(logprob for _, logprob in pairs)
    )


def check_sequence(
    *,
    prompt: TokenArray,
    max_tokens: int,
    sampling: SamplingParams,
    vocab_size: int,
    sequence_tokens_max: int,
    num_choices: int = 1,
) -> None:
    """Refuse what could never be served, naming the field. The one place for these rules: the router asks
    before it sends, the worker before it queues. Raises InvalidRequest."""
    if len(prompt) == 0:
        raise InvalidRequest("prompt must have at least one token", field="prompt")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"prompt has token {wrong}; the vocabulary has {vocab_size}", field="prompt")
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}", field="max_tokens")
    if len(prompt) + max_tokens > sequence_tokens_max:
        raise InvalidRequest(
            f"prompt of {len(prompt)} and max_tokens of {max_tokens} tokens exceed"
            f" the {sequence_tokens_max} tokens a sequence can have",
            field="prompt" if len(prompt) >= sequence_tokens_max else "max_tokens",
            code="context_length_exceeded",
        )
    sampling.check(vocab_size)
    check_prompt_scores(sampling, num_tokens=num_choices * len(prompt))


def check_prompt_scores(sampling: SamplingParams, *, num_tokens: int) -> None:
    """Refuse more prompt logprobs than one answer may hold; `num_tokens` over all choices and prompts."""
    num_scores = sampling.num_prompt_scores(num_tokens)
    if num_scores > PROMPT_SCORES_MAX:
        raise InvalidRequest(
            f"logprobs of {num_tokens} prompt tokens with {sampling.prompt_logprobs} alternatives each are"
            f" {num_scores} values over all choices; at most {PROMPT_SCORES_MAX} are returned",
            field="logprobs",
        )


_NO_ALTERNATIVES = Alternatives(token_ids=(), logprobs=())
