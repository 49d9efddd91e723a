"""What comes and goes on a worker, as autoscalers are told of it: counts and samples. Values only.

Made by `engine.worker.usage`, carried by `rorqual.wire`, read by `autoscaler`.
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLES_MAX = 256
"""Of each kind in one report: 5 kB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSample:
    """A prompt whose first token came since the last look."""

    prompt_tokens: int
    computed_tokens: int  # of these, those that no cache had
    ttft_seconds: float  # as near to the user as is known


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSample:
    """A sequence that ended since the last look."""

    context_tokens: int  # prompt and output, at its end
    generated_tokens: int
    itl_seconds: float | None  # mean between two of its tokens; None for fewer than two


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Since the last report. Samples are all of them, or a fair part when there were too many."""

    num_prompts: int = 0
    prompts: tuple[PromptSample, ...] = ()
    num_streams: int = 0
    streams: tuple[StreamSample, ...] = ()
