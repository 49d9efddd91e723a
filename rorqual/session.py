"""The session between a router and a worker, as our own dataclasses: commands up, reports down.

`rorqual.wire` turns these into protobuf and back; nothing else touches the generated stubs. The engine's
host answers them, the router's fleet sends them, and tests connect the two in one process without sockets.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams

PROTOCOL = 1

TokenArray = npt.NDArray[np.int32]
"""Token ids are kept in int32 arrays from the tokenizer to the rank: a Python list of a long prompt costs
milliseconds to convert and 28 bytes a token."""


class FinishReason(enum.Enum):
    STOP = "stop"  # an end-of-sequence token
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


class ErrorCode(enum.Enum):
    """Why a sequence ended with ERROR: what the router may do about it."""

    INVALID = "invalid"  # the request is wrong; another worker would say the same
    OVERLOADED = "overloaded"  # full or draining: another worker may take it
    FAILED = "failed"  # the worker or its rank broke


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first command of a session."""

    protocol: int
    router_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    sequence_id: SequenceId
    request_id: str
    prompt: TokenArray
    max_tokens: int
    ignore_eos: bool
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    sequence_id: SequenceId


Command = Open | Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Of prompt tokens 1..N-1 (token 0 has none)."""

    logprobs: tuple[float, ...]
    alternatives: tuple[Alternatives, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """What one step did to one sequence. `logprobs` and `alternatives` are as long as `token_ids`, or
    empty."""

    sequence_id: SequenceId
    first_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    error_code: ErrorCode | None = None
    prompt_logprobs: PromptLogprobs | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    number: int
    sequences: tuple[SequenceReport, ...]
    load: Load
    draining: bool
