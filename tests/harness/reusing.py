"""A scheduler that keeps prefixes over a real rank in this process, with memory that is NaN until it is written.

Called by the tests that hold what is reused to what is computed, bit by bit.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.drafter import MtpDrafter
from engine.host_memory import HostMemory
from engine.kernels.registry import choose
from engine.model.forward import Model
from engine.plan import Copies, StepPlan
from engine.rank import Rank
from engine.runner import Runner
from engine.sampler import Sampler
from engine.spilled import SpilledSlots
from engine.worker.cache.prefix_cache import CacheConfig
from engine.worker.drafts.policy import FixedDrafts
from engine.worker.events import SequenceKey, TokenEvent
from engine.worker.holdings import Holdings
from engine.worker.scheduler import Scheduler
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.tiers.hisparse import HiSparseConfig
from engine.worker.tiers.host_tier import HostTierConfig
from kvstore.handover import rebuild_tokens
from kvstore.hisparse import hot_shape
from kvstore.layout import IndexSpace
from kvstore.pages import pages_for
from kvstore.pools import Pools
from kvstore.shadow_radix import Costs, TailPolicy
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import Role

FIRST_HOST_ID = 1000

Answer = list[tuple[int, float | None]]
"""Tokens and their logprobs."""


class PoisoningMemory(HostMemory):
    """Host memory that the scheduler knows by other ids, in another order. What is copied away and not kept is NaN from
    then on, and host memory until it is copied to."""

    def __init__(self, pools: Pools, records: Tensor, *, num_pages: int, num_records: int) -> None:
        super().__init__(pools, records, num_pages=num_pages, num_records=num_records)
        self.pages.fill_(0xFF)
        self.records.fill_(0xFF)
        draw = random.Random(num_pages)
        self._rows = draw.sample(range(num_pages), num_pages), draw.sample(range(num_records), num_records)
        self._pools, self._records = pools, records
        self.num_promoted = 0
        self.wipes_records = True  # what is copied away is nobody's
        self._gone: tuple[set[int], set[int]] = set(), set()

    def demote(self, copies: Copies) -> None:
        super().demote(self._placed(copies))
        self._gone[0].update(copy.page for copy in copies.pages)
        self._gone[1].update(copy.record for copy in copies.records)

    def poison(self, holdings: Holdings, *, number: int) -> None:
        """Once plan `number` is done: what it has copied away that is nobody's now, and that no later plan uses."""
        gone_pages, gone_records = self._gone
        free, plans = set(holdings._pages._free), holdings._record_plans
        pages = [page for page in gone_pages if page in free and holdings._pages.last_plan((page,)) <= number]
        for item in self._pools.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                self._pools[item.component].bytes_ulb[pages] = 0xFF
        if self.wipes_records:
            free = set(holdings._records._free)
            self._records[[x for x in gone_records if x in free and plans.get(x, 0) <= number]] = 0xFF
        for gone in self._gone:
            gone.clear()

    def promote(self, copies: Copies) -> None:
        super().promote(self._placed(copies))
        self.num_promoted += len(copies.pages)

    def placed(self, host_pages: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._rows[0][page - FIRST_HOST_ID] for page in host_pages)

    def _placed(self, copies: Copies) -> Copies:
        pages, records = self._rows
        return Copies(
            pages=tuple(
                msgspec.structs.replace(item, host_page=pages[item.host_page - FIRST_HOST_ID])
                for item in copies.pages
            ),
            records=tuple(
                msgspec.structs.replace(item, host_record=records[item.host_record - FIRST_HOST_ID])
                for item in copies.records
            ),
        )


class Reusing:
    """One worker of both roles. With `keeps` False nothing is kept, and the same is the measure of the others."""

    def __init__(
        self,
        model: Model,
        *,
        num_pages: int = 24,
        num_slots: int = 3,
        num_records: int = 6,
        prefill_tokens_max: int = 512,
        drafts: int = 0,
        keeps: bool = True,
        policy: TailPolicy | None = None,
        num_host_pages: int = 0,
        num_host_records: int = 0,
        role: Role = Role.BOTH,
        num_buffers: int = 0,
        num_thin: int = 0,
        num_hot: int = 1,
        hisparse: Mapping[str, float] | None = None,
        **tier: float,
    ) -> None:
        """With `num_buffers` sequences spill."""
        vocab_size = model.config.vocab_size
        self.runner = Runner(
            model,
            num_pages=num_pages,
            num_slots=num_slots,
            num_records=num_records,
            num_thin=num_thin,
            drafts=drafts > 0,
        )
        self.runner.pools.fill(0xFF)
        self.runner.records.fill_(0xFF)
        self.host_memory = PoisoningMemory(
            self.runner.pools, self.runner.records, num_pages=num_host_pages, num_records=num_host_records
        )
        self.host_memory.wipes_records = not tier.get("takes_turns")
        self.spilled: SpilledSlots | None = None
        if num_buffers:
            config = model.config
            shape = hot_shape(
                self.runner.layout,
                index_topk=config.index_topk,
                num_drafts=drafts,
                num_tokens_max=config.max_position_embeddings,
                num_hot=max(num_hot, (drafts + 1) * config.index_topk),
            )
            self.spilled = self.runner.allow_spills(self.host_memory, shape, num_buffers=num_buffers)
        kernels = choose("cpu", {})
        sampler = Sampler(vocab_size=vocab_size, device=torch.device("cpu"), kernels=kernels)
        self.rank = Rank(
            self.runner,
            sampler=sampler,
            page_digest=kernels["page_digest"].function,
            drafter=MtpDrafter(self.runner, sampler) if drafts else None,
            host_memory=self.host_memory,
        )
        layout = self.runner.layout
        cache = CacheConfig(
            fingerprint="model",
            numerics=model.numerics.value,
            wire_id="",
            costs=Costs(
                page_bytes=max(1, layout.page_bytes),
                tail_bytes=self.runner.records.shape[1],
                rebuild_pages=pages_for(rebuild_tokens(layout)),
            ),
            policy=policy or TailPolicy(),
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=num_pages,
                num_slots=num_slots,
                vocab_size=vocab_size,
                sequence_tokens_max=min(model.config.max_position_embeddings, num_pages * PAGE_TOKENS),
                eos_token_ids=frozenset(),
                prefill_tokens_max=prefill_tokens_max,
                role=role,
                num_records=num_records,
                num_page_components=len(self.rank.digests.components),
                drafts_max=drafts,
                cache=cache if keeps else None,
                host_tier=HostTierConfig(
                    num_pages=num_host_pages, num_records=num_host_records, first_id=FIRST_HOST_ID, **tier
                )
                if num_host_pages
                else None,
                hisparse=HiSparseConfig(
                    num_thin_pages=num_thin,
                    num_buffers=num_buffers,
                    num_hot_pages=self.spilled.num_hot_pages,
                    **hisparse or {},
                )
                if self.spilled is not None
                else None,
            ),
            FixedDrafts(drafts),
        )
        self.answers: dict[int, Answer] = {}
        self.cached: dict[int, int] = {}
        self._pipe: deque[StepPlan] = deque()

    def open(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        sampling: SamplingParams,
        salt: str = "",
        fetching: bool = False,
    ) -> int:
        key = len(self.answers)
        self.answers[key] = []
        self.scheduler.open(
            SequenceKey(key),
            prompt=np.array(prompt, dtype=np.int32),
            max_tokens=num_tokens,
            ignore_eos=True,
            sampling=sampling,
            salt=salt,
            num_fetches=int(fetching),
        )
        return key

    def step(self) -> bool:
        """Plan as far ahead as may be, and let the rank do one plan. False when there is nothing to do."""
        while (plan := self.scheduler.plan()) is not None:
            self._pipe.append(plan)
        if not self._pipe:
            return False
        result = self.rank.step(self._placed(self._pipe.popleft()))
        self.host_memory.poison(self.scheduler._holdings, number=result.number)
        for event in self.scheduler.apply(result):
            if isinstance(event, TokenEvent):
                self.answers[event.key].append((event.token_id, event.logprob))
        self.scheduler.check_all()
        return True

    def _placed(self, plan: StepPlan) -> StepPlan:
        spills = tuple(
            msgspec.structs.replace(item, host_pages=self.host_memory.placed(item.host_pages))
            for item in plan.spills
        )
        opens = tuple(
            msgspec.structs.replace(
                item,
                restore=msgspec.structs.replace(
                    item.restore, host_pages=self.host_memory.placed(item.restore.host_pages)
                ),
            )
            if item.restore is not None
            else item
            for item in plan.opens
        )
        return msgspec.structs.replace(plan, spills=spills, opens=opens)

    def run(self) -> None:
        while self.step():
            pass
        assert self.scheduler.is_idle

    def answer(self, prompt: Sequence[int], num_tokens: int, *, sampling: SamplingParams) -> Answer:
        key = self.open(prompt, num_tokens, sampling=sampling)
        self.run()
        return self.answers[key]
