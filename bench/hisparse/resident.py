"""What HiSparse costs while nobody is spilled: operations, and processor time of a step, beside a worker without it.

Workers in one process compute the same requests in turn; all have pages for all of them, and one has hot buffers
besides. Called by `bench.hisparse.command`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.hisparse.trace import Trace
from bench.hisparse.worker import Sizes, Worker
from bench.pairs import Ratio, ratio_of
from engine.model.forward import Model
from engine.rank_budget import HotBudget
from kvstore.hisparse import HotShape
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The same requests for all workers that are compared."""

    prompts: Sequence[TokenArray]
    num_generated: int
    prefill_tokens_max: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    num_steps: int  # whose operations were compared
    num_operations: int  # of them, without HiSparse
    first_difference: str  # "": there is none
    seconds: float  # CPU, of a decode step without HiSparse, all requests together
    ratio: Ratio  # of that with HiSparse
    control: Ratio  # of that of a second worker without: what the machine alone does


def measure_resident(
    model: Model, work: Work, shape: HotShape, *, num_pairs: int, num_steps: int, compared: Work
) -> Resident:
    """`num_pairs` pairs of `num_steps` decode steps each; of `compared` the operations are, from beginning to end."""
    off, on = sides(model, work, shape)
    control, _ = sides(model, work, shape)
    everybody = (off, on, control)
    for worker in everybody:
        start(worker, work)
    seconds: list[list[float]] = [[] for _ in everybody]
    orders = list(itertools.permutations(range(len(everybody))))
    for pair in range(num_pairs):
        for index in orders[pair % len(orders)]:
            seconds[index].append(decode_seconds(everybody[index], num_steps))
    for worker in everybody:
        worker.run()
    assert on.answers == off.answers, "answers differ"
    assert on.state.counts.num_spills == 0, "somebody was spilled"
    num_compared, num_operations, difference = compare_operations(model, compared, shape)
    return Resident(
        num_steps=num_compared,
        num_operations=num_operations,
        first_difference=difference,
        seconds=statistics.median(seconds[0]),
        ratio=_ratio(seconds[1], seconds[0]),
        control=_ratio(seconds[2], seconds[0]),
    )


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    return ratio_of([one / other for one, other in zip(seconds, base, strict=True)])


def sides(
    model: Model, work: Work, shape: HotShape, traces: tuple[Trace, Trace] | None = None
) -> tuple[Worker, Worker]:
    """Without HiSparse, and with it. Whole pages are as many on both and there are no thin ones, so that plans and the
    shapes of pools are the same."""
    longest = max(len(prompt) for prompt in work.prompts) + work.num_generated
    num_slots, per_slot = len(work.prompts), longest // PAGE_TOKENS + 2
    sizes = Sizes(
        num_pages=2 * num_slots * per_slot,
        num_slots=num_slots,
        num_host_pages=4 * per_slot,
        prefill_tokens_max=work.prefill_tokens_max,
    )
    hot = HotBudget(shape=shape, num_buffers=num_slots, num_pages=sizes.num_pages, num_thin=0)
    both = (sizes, replace(sizes, hot=hot))
    if traces is None:
        off, on = (Worker(model, item) for item in both)
    else:
        off, on = (
            Worker(trace.model(model), item, kernels=trace.implementations())
            for item, trace in zip(both, traces, strict=True)
        )
    return off, on


def start(worker: Worker, work: Work) -> None:
    """One after another, until all decode."""
    for count, prompt in enumerate(work.prompts, start=1):
        worker.open(prompt, work.num_generated)
        num_sampled = 0
        while num_sampled < count:
            step = worker.step()
            assert step is not None, "requests ended before all of them decoded: generate more"
            num_sampled = len(step.result.sampled)


def decode_seconds(worker: Worker, num_steps: int) -> float:
    """CPU seconds of a step, the mean of so many."""
    total = 0.0
    for _ in range(num_steps):
        step = worker.step()
        assert step is not None, "requests ended before all was measured: generate more"
        total += step.cpu_seconds
    return total / num_steps


def compare_operations(model: Model, work: Work, shape: HotShape) -> tuple[int, int, str]:
    """Of every step from the first chunk to the last token: how many steps, how many operations, and the first that
    differs."""
    traces = Trace(), Trace()
    warm, *_ = sides(model, work, shape)  # tables are made once in a process
    start(warm, work)
    off, on = sides(model, work, shape, traces)
    for worker in (off, on):
        for prompt in work.prompts:
            worker.open(prompt, work.num_generated)
    num_steps = num_operations = 0
    while True:
        with traces[0].recording() as plain:
            step = off.step()
        with traces[1].recording() as able:
            other = on.step()
        if step is None or other is None:
            return num_steps, num_operations, "" if step is other else "one has more steps"
        num_steps, num_operations = num_steps + 1, num_operations + len(plain)
        if plain != able:
            return num_steps, num_operations, _first_difference(num_steps, plain, able)


def _first_difference(number: int, plain: Sequence[str], able: Sequence[str]) -> str:
    for index, (one, other) in enumerate(zip(plain, able, strict=False)):
        if one != other:
            return f"step {number}, operation {index}: {one} without HiSparse, {other} with it"
    longer = able if len(able) > len(plain) else plain
    extra = longer[min(len(plain), len(able))]
    return f"step {number}: {extra} is only there {'with' if longer is able else 'without'} HiSparse"
