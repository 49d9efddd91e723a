"""Real rank processes and what a worker's host says to them: computed prefixes with tails behind chosen lengths, which
are copied, fetched and begun from. For `bench.restore`; page, record and slot ids are its own.

Device pages 0 .. n-1 are the prompt's in turn with what is restored, so that every way ends in the same place. Host
pages have two halves: what was demoted, and where a store's values are put.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.plan import (
    NO_COPIES,
    Copies,
    Fetch,
    Fetched,
    FromRank,
    PageCopy,
    PeerOpen,
    PeerOpened,
    RankFailed,
    RankReady,
    RankSettings,
    RecordCopy,
    RecordFetch,
    Restore,
    Segment,
    SlotOpen,
    StepPlan,
    StepResult,
    TailPoint,
)
from engine.worker.rank_link import RankProcess, start_rank
from engine.worker.tiers.speeds import Speeds, SpeedsConfig
from kvstore.transfer.contract import ByteArray, Endpoint
from kvstore.transfer.memory import map_segments
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import TokenArray

PREFILL_TOKENS = 1024  # of a step, as served
PLANS_INFLIGHT_MAX = 2
FETCH_SECONDS_MAX = 60.0
GREEDY = SamplingParams(seed=0, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Behind `num_pages` pages, in the record of the same number here and in host memory."""

    record: int
    num_pages: int
    num_bytes: int
    digest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """What a rank has computed of the prompt and keeps: pages 0 .. n-1 and a tail behind each length."""

    digests: tuple[int, ...]  # of all pages, one for each paged component
    tails: dict[int, Tail]  # by number of pages


class Rank:
    """One rank, stepped by hand. It is measured as a worker measures its own: `speeds`."""

    def __init__(self, link: RankProcess, ready: RankReady, prompt: TokenArray) -> None:
        self.ready = ready
        self.speeds = Speeds(SpeedsConfig())
        self._link = link
        self._prompt = prompt
        self._num_plans = 0
        self._num_fetches = 0

    async def compute(self, num_pages: int, *, tails: Sequence[int] = (), lend: bool = False) -> Computed:
        """From nothing, in chunks, up to the token behind so many pages. Tails go to records 0, 1, ..."""
        end = num_pages * PAGE_TOKENS
        cuts = [*range(0, end, PREFILL_TOKENS), end]
        results: list[StepResult] = []
        num_sent = 0
        for start, stop in itertools.pairwise(cuts):
            segment = Segment(
                slot=0,
                start=start,
                count=stop - start,
                pages=tuple(range(start // PAGE_TOKENS, stop // PAGE_TOKENS)),
                sample=stop == end,
                lend=lend,
                tails=tuple(
                    TailPoint(num_tokens=depth * PAGE_TOKENS, record=record)
                    for record, depth in enumerate(tails)
                    if start < depth * PAGE_TOKENS <= stop
                ),
            )
            self._send(segment, opens=() if start else (self._opened(num_pages, None),))
            num_sent += 1
            if num_sent - len(results) == PLANS_INFLIGHT_MAX:
                results.append(await self._result())
        while len(results) < num_sent:
            results.append(await self._result())
        return Computed(results=tuple(results), token=results[-1].sampled[0].token_id)

    async def begin(self, num_pages: int, record: int, *, promote: Copies = NO_COPIES) -> StepResult:
        """From pages and a record on the device, once these have been brought back, to the token behind them."""
        restore = Restore(num_computed=num_pages * PAGE_TOKENS, pages=tuple(range(num_pages)), record=record)
        segment = Segment(slot=0, start=num_pages * PAGE_TOKENS, count=0, pages=(), sample=True)
        self._send(segment, opens=(self._opened(num_pages, restore),), promote=promote)
        return await self._result()

    async def end(self) -> None:
        """The slot is free again; what it held stays where it is until it is written over."""
        self._send(closes=(0,))
        await self._result()

    async def demote(self, copies: Copies) -> None:
        self._send(demote=copies)
        await self._result()

    async def connect(self, endpoint: Endpoint) -> None:
        """To peer 1. Raises RorqualError."""
        self._link.send(PeerOpen(peer=1, endpoint=endpoint))
        message = await self._receive()
        if not isinstance(message, PeerOpened) or message.error:
            raise RorqualError(f"the rank cannot connect: {message}")

    async def fetch(self, num_pages: int, tail: Tail, digests: Sequence[int], *, record: int) -> Fetched:
        """Pages and a tail of peer 1, checked. Raises RorqualError."""
        self._num_fetches += 1
        pages = tuple(range(num_pages))
        self._link.send(
            Fetch(
                fetch=self._num_fetches,
                peer=1,
                seconds=FETCH_SECONDS_MAX,
                source_pages=pages,
                target_pages=pages,
                digests=tuple(digests[: num_pages * self.ready.num_page_components]),
                record=RecordFetch(
                    source=tail.record,
                    target=record,
                    num_tokens=num_pages * PAGE_TOKENS,
                    num_bytes=tail.num_bytes,
                    digest=tail.digest,
                ),
            )
        )
        message = await self._receive()
        if not isinstance(message, Fetched) or message.error:
            raise RorqualError(f"a fetch failed: {message}")
        return message

    def host_memory(self) -> tuple[ByteArray, ByteArray]:
        """Rows of pages and of records, shared with the rank."""
        ready, shared = self.ready, self.ready.host_memory
        assert shared is not None, "the rank shares no host memory"
        shapes = [(ready.num_host_pages, ready.page_bytes), (ready.num_host_records, ready.record_bytes)]
        pages, records = map_segments(
            shared.metadata, agent=shared.agent, sizes=[rows * size for rows, size in shapes], writable=True
        )
        return pages.reshape(shapes[0]), records.reshape(shapes[1])

    def _opened(self, num_pages: int, restore: Restore | None) -> SlotOpen:
        tokens = self._prompt[: num_pages * PAGE_TOKENS]
        return SlotOpen(
            slot=0,
            tokens=tokens.astype("<i4").tobytes(),
            num_prompt=len(tokens),
            sampling=GREEDY,
            restore=restore,
        )

    def _send(
        self,
        *segments: Segment,
        opens: tuple[SlotOpen, ...] = (),
        closes: tuple[int, ...] = (),
        demote: Copies = NO_COPIES,
        promote: Copies = NO_COPIES,
    ) -> None:
        self._num_plans += 1
        plan = StepPlan(
            number=self._num_plans,
            closes=closes,
            opens=opens,
            segments=segments,
            demote=demote,
            promote=promote,
        )
        self.speeds.planned(plan, page_bytes=self.ready.page_bytes)
        self._link.send(plan)

    async def _result(self) -> StepResult:
        message = await self._receive()
        assert isinstance(message, StepResult), f"the rank answered {message}"
        self.speeds.landed(message)
        return message

    async def _receive(self) -> FromRank:
        message = await self._link.receive()
        if isinstance(message, RankFailed):
            raise RorqualError(message.message)
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    results: tuple[StepResult, ...]
    token: int

    def prefixes(self) -> Prefixes:
        """Of what was computed with `lend` and `tails`."""
        found = [item for result in self.results for item in result.tailed]
        tails = [
            Tail(
                record=record,
                num_pages=item.num_tokens // PAGE_TOKENS,
                num_bytes=item.num_bytes,
                digest=item.digest,
            )
            for record, item in enumerate(found)
        ]
        return Prefixes(
            digests=tuple(
                digest for result in self.results for part in result.lent for digest in part.page_digests
            ),
            tails={tail.num_pages: tail for tail in tails},
        )


def copies(pages: Sequence[tuple[int, int]], tail: Tail, *, record: int, host_record: int) -> Copies:
    """Of pairs of a device page and a host page, and of one record."""
    return Copies(
        pages=tuple(PageCopy(page=page, host_page=host) for page, host in pages),
        records=(RecordCopy(record=record, host_record=host_record, num_bytes=tail.num_bytes),),
    )


@asynccontextmanager
async def running_rank(
    model: Path, prompt: TokenArray, *, transfer: str, name: str, num_tails: int, threads: int
) -> AsyncGenerator[Rank]:
    """Room on the device for the prompt and its tails, and one more; in host memory for twice as much. Raises
    RorqualError."""
    num_pages = len(prompt) // PAGE_TOKENS
    link = await start_rank(
        RankSettings(
            model=str(model),
            numerics="served",
            exact=False,
            num_pages=num_pages,
            kv_bytes=None,
            num_slots=2,
            prefill_tokens_max=PREFILL_TOKENS,
            threads=threads,
            kernels={},
            transfer=transfer,
            num_records=num_tails + 1,
            agent=name,
            host_bytes=_HOST_BYTES,
            shares_host_memory=True,
        )
    )
    try:
        while not isinstance(message := await link.receive(), RankReady):
            if isinstance(message, RankFailed):
                raise RorqualError(message.message)
        assert message.num_pages == num_pages
        assert message.num_host_pages >= 2 * num_pages, "host memory has no room for the prompt twice"
        assert message.num_host_records > num_tails
        yield Rank(link, message, prompt)
    finally:
        await link.stop(seconds_max=5)


_HOST_BYTES = 256 << 20
