"""One worker in this process: the production scheduler over a real rank, two plans in flight, as served.

Called by the measurements of `bench.hisparse`. Sizes are made of options as a rank's process makes them
(`engine.rank_budget`); nothing here decides what is spilled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.checkpoint.init import random_weight
from engine.checkpoint.manifest import expected_weights
from engine.host_memory import HostMemory
from engine.kernels.registry import Implementation, choose
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.model.weights import allocate_weights
from engine.plan import RankSettings, StepPlan, StepResult
from engine.rank import Rank
from engine.rank_budget import HotBudget, device_budget, host_budget, hot_budget
from engine.runner import Runner
from engine.sampler import Sampler
from engine.spilled import SpilledSlots
from engine.worker.cache.prefix_cache import CacheConfig
from engine.worker.events import SequenceKey, TokenEvent
from engine.worker.scheduler import Scheduler
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.tiers.hisparse import HiSparseConfig, HiSparseState
from engine.worker.tiers.host_tier import HostTierConfig
from kvstore.handover import rebuild_tokens, record_bytes_max
from kvstore.layout import Numerics, StateLayout, build_layout
from kvstore.pages import pages_for
from kvstore.shadow_radix import Costs
from rorqual.model_config import PAGE_TOKENS, ModelConfig, parse_model_config
from rorqual.sampling import SamplingParams
from rorqual.session import TokenArray

GREEDY = SamplingParams(seed=1, temperature=0)

RAW_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 16,
    "o_groups": 1,
    "o_lora_rank": 16,
    "sliding_window": 32,
    "index_n_heads": 1,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.0,
    "num_hash_layers": 0,
    "compress_ratios": [4, 128, 4, 4],
    "num_nextn_predict_layers": 0,
}
"""Small and quick, with most bytes of a long request in C4 rows, as those of the released models are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a worker has; in the rank's own units."""

    num_pages: int
    num_slots: int
    num_host_pages: int
    hot: HotBudget | None = None
    prefill_tokens_max: int = 2048
    many_pages: float = 1 / 2  # as `HiSparseConfig`; above 1 nobody ever returns


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    result: StepResult
    cpu_seconds: float  # of planning, computing and taking in: one thread does it all


def random_model(*, num_pages: int, seed: int = 1) -> Model:
    """Of RAW_CONFIG, for requests of up to so many pages; served numerics."""
    config = parse_model_config(RAW_CONFIG | {"max_position_embeddings": num_pages * PAGE_TOKENS})
    weights = allocate_weights(config)
    for weight in expected_weights(config):
        weights.named[weight.name].copy_(random_weight(config, weight, seed))
    return Model(config, weights, numerics=Numerics.SERVED, kernels=choose_kernels(), exact=False)


def sizes_for(config: ModelConfig, settings: RankSettings, **changed: Any) -> Sizes:
    """As a rank's process divides its memory. Raises RorqualError where that is too little."""
    numerics = Numerics.SERVED
    budget = device_budget(config, numerics, settings, drafts=False)
    hot = hot_budget(config, numerics, settings, budget, drafts_max=0)
    below = host_budget(config, numerics, settings, budget, drafts=False)
    sizes = Sizes(
        num_pages=budget.num_pages if hot is None else hot.num_pages,
        num_slots=settings.num_slots,
        num_host_pages=below.num_pages,
        hot=hot,
        prefill_tokens_max=settings.prefill_tokens_max,
    )
    return replace(sizes, **changed)


class Worker:
    def __init__(
        self, model: Model, sizes: Sizes, *, kernels: Mapping[str, Implementation] | None = None
    ) -> None:
        """`kernels`: the sampler's and the rank's own, where they are not the best."""
        self.model = model
        hot = sizes.hot
        self.runner = Runner(
            model,
            num_pages=sizes.num_pages,
            num_slots=sizes.num_slots,
            num_thin=0 if hot is None else hot.num_thin,
        )
        host_memory = HostMemory(
            self.runner.pools, self.runner.records, num_pages=sizes.num_host_pages, num_records=0
        )
        self.spilled: SpilledSlots | None = None
        if hot is not None:
            self.spilled = self.runner.allow_spills(host_memory, hot.shape, num_buffers=hot.num_buffers)
        kernels = kernels or choose("cpu", {})
        self.rank = Rank(
            self.runner,
            sampler=Sampler(vocab_size=model.config.vocab_size, device=torch.device("cpu"), kernels=kernels),
            page_digest=kernels["page_digest"].function,
            host_memory=host_memory,
        )
        self.scheduler = Scheduler(self._config(sizes))
        self.answers: dict[int, list[int]] = {}
        self._pipe: deque[StepPlan] = deque()

    @property
    def layout(self) -> StateLayout:
        return self.runner.layout

    @property
    def device_bytes(self) -> int:
        """All that is on the device for cached state."""
        return self.runner.pools.num_bytes + (self.spilled.num_bytes if self.spilled is not None else 0)

    @property
    def state(self) -> HiSparseState:
        return self.scheduler.hisparse_state

    def open(self, prompt: TokenArray, max_tokens: int) -> int:
        key = len(self.answers)
        self.answers[key] = []
        self.scheduler.open(
            SequenceKey(key), prompt=prompt, max_tokens=max_tokens, ignore_eos=True, sampling=GREEDY
        )
        return key

    def cancel(self, key: int) -> None:
        self.scheduler.cancel(SequenceKey(key))

    def step(self) -> Step | None:
        """Plan as far ahead as may be, and let the rank do one plan. None when there is nothing to do."""
        began = time.process_time()
        while (plan := self.scheduler.plan()) is not None:
            self._pipe.append(plan)
        if not self._pipe:
            return None
        result = self.rank.step(self._pipe.popleft())
        for event in self.scheduler.apply(result):
            if isinstance(event, TokenEvent):
                self.answers[event.key].append(event.token_id)
        return Step(result=result, cpu_seconds=time.process_time() - began)

    def run(self) -> None:
        """To the end of everything."""
        while self.step() is not None:
            pass
        self.scheduler.check_all()
        assert self.scheduler.is_idle

    def _config(self, sizes: Sizes) -> SchedulerConfig:
        hot, config = sizes.hot, self.model.config
        hisparse = None
        if self.spilled is not None and hot is not None:
            hisparse = HiSparseConfig(
                num_thin_pages=hot.num_thin,
                num_buffers=hot.num_buffers,
                num_hot_pages=self.spilled.num_hot_pages,
                many_pages=sizes.many_pages,
            )
        costs = Costs(
            page_bytes=self.layout.page_bytes,
            tail_bytes=record_bytes_max(self.layout, drafts=False),
            rebuild_pages=pages_for(rebuild_tokens(self.layout)),
        )
        return SchedulerConfig(
            num_pages=sizes.num_pages,
            num_slots=sizes.num_slots,
            vocab_size=config.vocab_size,
            sequence_tokens_max=min(config.max_position_embeddings, sizes.num_pages * PAGE_TOKENS),
            eos_token_ids=frozenset(),
            prefill_tokens_max=sizes.prefill_tokens_max,
            num_page_components=len(self.rank.digests.components),
            cache=CacheConfig(fingerprint="bench", numerics="served", wire_id="", costs=costs),
            host_tier=HostTierConfig(num_pages=sizes.num_host_pages, num_records=0),
            hisparse=hisparse,
        )


def layout_of(config: ModelConfig) -> StateLayout:
    return build_layout(config, Numerics.SERVED)
