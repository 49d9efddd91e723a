"""What autoscalers are told, as protobuf and back. The half of `rorqual.wire` that carries it."""

from __future__ import annotations

import math

from rorqual.errors import WireError
from rorqual.usage import SAMPLES_MAX, PromptSample, StreamSample, Usage
from rorqual.v1 import worker_pb2 as pb


def usage_to_pb(usage: Usage | None) -> pb.WorkerUsage | None:
    if usage is None:
        return None
    return pb.WorkerUsage(
        num_prompts=usage.num_prompts,
        prompts=[
            pb.PromptSample(
                prompt_tokens=sample.prompt_tokens,
                computed_tokens=sample.computed_tokens,
                ttft_seconds=sample.ttft_seconds,
            )
            for sample in usage.prompts
        ],
        num_streams=usage.num_streams,
        streams=[
            pb.StreamSample(
                context_tokens=sample.context_tokens,
                generated_tokens=sample.generated_tokens,
                itl_seconds=sample.itl_seconds,
            )
            for sample in usage.streams
        ],
    )


def usage_from_pb(message: pb.StepReport) -> Usage | None:
    """Raises WireError for more samples than there may be, or than were counted."""
    if not message.HasField("usage"):
        return None
    usage = message.usage
    for name, samples, count in (
        ("prompts", len(usage.prompts), usage.num_prompts),
        ("streams", len(usage.streams), usage.num_streams),
    ):
        if samples > min(count, SAMPLES_MAX):
            raise WireError(
                f"usage has {samples} samples of {count} {name}; at most {SAMPLES_MAX} are allowed"
            )
    return Usage(
        num_prompts=usage.num_prompts,
        prompts=tuple(
            PromptSample(
                prompt_tokens=sample.prompt_tokens,
                computed_tokens=sample.computed_tokens,
                ttft_seconds=_seconds(sample.ttft_seconds, "ttft_seconds"),
            )
            for sample in usage.prompts
        ),
        num_streams=usage.num_streams,
        streams=tuple(
            StreamSample(
                context_tokens=sample.context_tokens,
                generated_tokens=sample.generated_tokens,
                itl_seconds=_seconds(sample.itl_seconds, "itl_seconds")
                if sample.HasField("itl_seconds")
                else None,
            )
            for sample in usage.streams
        ),
    )


def _seconds(value: float, what: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise WireError(f"{what} of a sample is {value}; it must be a number of at least 0")
    return value
