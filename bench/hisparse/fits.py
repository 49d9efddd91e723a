"""How many requests of one length a device's bytes hold, with and without HiSparse: measured, beside the formula.

The bytes are all that a worker keeps cached state in: pages, rings of slots, and what says which hot row holds what.
A worker is given slots for n requests, and the rest of the bytes for pages, divided as a rank's process does it; then
requests are opened, one when the one before decodes, until one has to wait or somebody is preempted. The most that
decode in one step, and come to their end without a preemption, is what such a worker holds; the largest of all n is
the figure. Called by `bench.hisparse.command`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.hisparse.worker import Sizes, Worker, layout_of, sizes_for
from engine.model.forward import Model
from engine.plan import RankSettings
from kvstore.hisparse import Capacity, HotShape, capacity, hot_shape, resident_bytes, spilled_bytes
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray

STEPS_SPARE = 12
"""That a request may take to its first token beside the steps of its prompt: plans in flight, copies, turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of one length. Their prompts end so many tokens before the end of their last page but one; they generate
    up to the end of the last one."""

    num_pages: int
    tokens_before: int
    prefill_tokens_max: int = 4096

    @property
    def num_prompt(self) -> int:
        return (self.num_pages - 1) * PAGE_TOKENS - self.tokens_before

    @property
    def num_generated(self) -> int:
        return self.num_pages * PAGE_TOKENS - self.num_prompt

    @property
    def num_steps_max(self) -> int:
        """From the opening of one to a step in which it decodes."""
        return -(-self.num_prompt // self.prefill_tokens_max) + STEPS_SPARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """By one worker."""

    num_running: int
    num_spilled: int  # of those
    device_bytes: int
    num_pages: int
    num_thin: int
    num_slots: int
    num_hot_buffers: int
    pages_used: int  # whole ones, when all ran


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    device_bytes: int  # that there are
    formula: Capacity
    without: Held
    spilling: Held

    @property
    def gain(self) -> float:
        return self.spilling.num_running / self.without.num_running

    @property
    def of_formula(self) -> float:
        """Measured over computed, of requests and of gain: whichever is further from 1."""
        ratios = (
            self.without.num_running / self.formula.num_resident,
            self.spilling.num_running / self.formula.num_spilled,
            self.gain / self.formula.gain_here,
        )
        return max(ratios, key=lambda ratio: abs(ratio - 1))


def measure_fits(model: Model, load: Load, *, num_spilled: int, num_hot: int | None = None) -> Fits:
    """On a device with the bytes of `num_spilled` requests, one of them resident, and half a one to spare: so few
    requests would else be decided by a page."""
    config, layout = model.config, layout_of(model.config)
    shape = hot_shape(
        layout,
        index_topk=config.index_topk,
        num_drafts=0,
        num_tokens_max=config.max_position_embeddings,
        num_hot=num_hot,
    )
    num_tokens = load.num_pages * PAGE_TOKENS
    of_one = spilled_bytes(layout, shape, num_tokens)
    device_bytes = resident_bytes(layout, num_tokens) + (num_spilled - 1) * of_one + of_one // 2
    formula = capacity(layout, shape, num_tokens=num_tokens, device_bytes=device_bytes)
    return Fits(
        device_bytes=device_bytes,
        formula=formula,
        without=_most(model, load, device_bytes, shape, guess=formula.num_resident, hot=False),
        spilling=_most(model, load, device_bytes, shape, guess=formula.num_spilled, hot=True),
    )


def _most(model: Model, load: Load, device_bytes: int, shape: HotShape, *, guess: int, hot: bool) -> Held:
    """The most that any number of slots holds. More slots leave fewer pages: from a number that not all can use, there
    is no more to be had."""

    def hold(num_slots: int) -> Held | None:
        sizes = _sizes(model, load, device_bytes, shape, num_slots=num_slots, hot=hot)
        return None if sizes is None else _hold(model, sizes, load, device_bytes)

    best, num_slots = hold(guess), guess
    if best is not None and best.num_running == num_slots:
        while (more := hold(num_slots + 1)) is not None and more.num_running > best.num_running:
            best, num_slots = more, num_slots + 1
        return best
    while best is None or best.num_running < num_slots - 1:
        num_slots -= 1
        assert num_slots > 0, "not one request fits"
        found = hold(num_slots)
        if found is not None and (best is None or found.num_running >= best.num_running):
            best = found
    return best


def _sizes(
    model: Model, load: Load, device_bytes: int, shape: HotShape, *, num_slots: int, hot: bool
) -> Sizes | None:
    """None: so many slots leave too little for pages."""
    kv_bytes = device_bytes - num_slots * layout_of(model.config).slot_bytes
    if kv_bytes <= 0:
        return None
    settings = RankSettings(
        model="",
        numerics="served",
        exact=False,
        num_pages=None,
        kv_bytes=kv_bytes,
        num_slots=num_slots,
        prefill_tokens_max=load.prefill_tokens_max,
        threads=1,
        kernels={},
        num_host_pages=num_slots * load.num_pages,
        num_hot_buffers=num_slots - 1 if hot else 0,
        num_hot_rows=shape.num_hot if hot else None,
    )
    try:
        return sizes_for(model.config, settings)
    except RorqualError:
        return None


def _hold(model: Model, sizes: Sizes, load: Load, device_bytes: int) -> Held:
    worker = Worker(model, sizes)
    assert worker.device_bytes <= device_bytes, "a worker takes more than its bytes"
    num_running = num_spilled = pages_used = 0
    for _ in range(sizes.num_slots):
        key = worker.open(a_prompt(model, load.num_prompt, seed=num_running), load.num_generated)
        if not _all_decode(worker, num_running + 1, load.num_steps_max):
            worker.cancel(key)
            break
        num_running, num_spilled = num_running + 1, worker.state.num_spilled
        pages_used = sizes.num_pages - worker.scheduler.load().pages_free
    worker.run()
    # Whoever was preempted after all did not have room beside the others.
    num_running -= worker.scheduler.num_preemptions
    answers = [answer for _, answer in sorted(worker.answers.items())][:num_running]
    assert all(len(answer) == load.num_generated for answer in answers), "an answer is short"
    hot = sizes.hot
    return Held(
        num_running=num_running,
        num_spilled=num_spilled,
        device_bytes=worker.device_bytes,
        num_pages=sizes.num_pages,
        num_thin=0 if hot is None else hot.num_thin,
        num_slots=sizes.num_slots,
        num_hot_buffers=0 if hot is None else hot.num_buffers,
        pages_used=pages_used,
    )


def _all_decode(worker: Worker, count: int, num_steps_max: int) -> bool:
    """Whether a step soon gives each of `count` requests a token."""
    for _ in range(num_steps_max):
        step = worker.step()
        if step is None or worker.scheduler.num_preemptions:
            return False
        if len({item.slot for item in step.result.sampled}) == count:
            return True
    return False


def a_prompt(model: Model, length: int, *, seed: int) -> TokenArray:
    return np.random.default_rng(seed).integers(2, model.config.vocab_size, size=length, dtype=np.int32)
