"""The bounds of a worker's scheduler: what its rank has, and how much of it is planned at once.

Made by `engine.worker.host` from what the rank reports; read by `engine.worker.scheduler` and what it owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.worker.cache.prefix_cache import CacheConfig
from engine.worker.tiers.hisparse import HiSparseConfig
from engine.worker.tiers.host_tier import HostTierConfig
from engine.worker.tiers.speeds import SpeedsConfig
from rorqual.errors import InvalidRequest
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    num_pages: int
    num_slots: int
    vocab_size: int
    sequence_tokens_max: int  # prompt + completion of one sequence; all of it fits into num_pages
    eos_token_ids: frozenset[int]
    prefill_tokens_max: int  # of one step's chunks; decode segments come on top: neither starves the other
    plans_inflight_max: int = 2
    sequences_waiting_max: int = 1024
    tokens_waiting_max: int = 8 * 1024 * 1024  # 32 MB of prompts; a single prompt may always wait
    role: Role = Role.BOTH
    num_records: int = 0  # hand-over records; none is needed with Role.BOTH
    num_page_components: int = 0  # digests of a lent page
    drafts_max: int = 0  # of a decode
    draft_rows_max: int = 256  # of all decodes of a step: rows that the rank computes on top of one for each
    cache: CacheConfig | None = None  # None: nothing is kept of a sequence that has ended
    host_tier: HostTierConfig | None = (
        None  # None: what the cache gives up is gone; of use with a cache alone
    )
    hisparse: HiSparseConfig | None = None  # None: nobody spills; of use with host memory alone
    speeds: SpeedsConfig = field(default_factory=SpeedsConfig)
    keeps_digests: bool = False  # of kept pages, also where nothing is lent: a store keeps them, too

    def check_generated(self, token_ids: Sequence[int], *, max_tokens: int) -> None:
        """Tokens that came with the state of a prompt, whose sequence generates `max_tokens`. At most a page: so many
        are computed in one chunk, wherever in a page it begins. Raises InvalidRequest."""
        num_max = min(max_tokens - 1, PAGE_TOKENS)
        if not 1 <= len(token_ids) <= num_max:
            text = f"{len(token_ids)} tokens came with the state; it can go on from 1 to {num_max}"
            raise InvalidRequest(text, field="token_ids")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            text = f"a token that came with the state is not one of {self.vocab_size}"
            raise InvalidRequest(text, field="token_ids")

    def __post_init__(self) -> None:
        assert self.prefill_tokens_max > 0
        assert self.prefill_tokens_max % PAGE_TOKENS == 0, "a chunk ends at a page boundary"
        assert self.sequence_tokens_max <= self.num_pages * PAGE_TOKENS
        assert self.plans_inflight_max > 0
        assert self.role is Role.BOTH or self.num_records > 0, "state is handed over through records"
