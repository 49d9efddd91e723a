"""What routers are told of a worker's cache: exact, in reports that go out anyway, anew after whatever was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import numpy as np
import pytest
from fake_content import FakeContent
from fake_link import FakeLink
from fake_rank import FakeRank

from engine.worker.cache import feed as cache_feed
from engine.worker.cache import prefix_cache
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.session import Session
from kvstore.feed import FeedReader
from kvstore.keys import PageKey, page_keys, root_key
from kvstore.shadow_radix import ShadowRadix
from rorqual.feed import HOST_PAGE, PAGE, TAIL, Subscribe
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import Open, StepReport

INCARNATION = Incarnation(7)


class Router:
    """One session and what its reader has made of the feed."""

    def __init__(self, host: Host) -> None:
        self.content = FakeContent()
        self.reader = FeedReader(self.content)
        self.num_reports = 0
        self.num_items = 0
        self.session: Session = host.connect("r")
        self.session.submit(self.reader.welcome(INCARNATION))

    async def read(self) -> StepReport:
        report = await self.session.next_report()
        self.num_reports += 1
        self.num_items += len(report.feed)
        for item in report.feed:
            assert self.reader.take(item) is None
        return report

    async def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.read()

    async def read_answer(self) -> None:
        while not any(item.finish_reason for item in (await self.read()).sequences):
            pass


@asynccontextmanager
async def a_host(
    *, num_pages: int = 16, prefix_cache: bool = True, heartbeat: float = 0.02, num_host_pages: int = 0
) -> AsyncIterator[Host]:
    rank = FakeRank(
        num_pages=num_pages,
        num_slots=4,
        prefill_tokens_max=512,
        num_records=6,
        num_host_pages=num_host_pages,
        num_host_records=num_host_pages // 2,
    )
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=INCARNATION,
        exact=False,
        prefill_tokens_max=512,
        prefix_cache=prefix_cache,
        heartbeat_seconds=heartbeat,
        feed_seconds_max=0.005,
    )
    host = Host(link=FakeLink(rank), ready=rank.ready(), config=config, metrics=WorkerMetrics())
    serving = asyncio.create_task(host.run())
    try:
        async with asyncio.timeout(20):
            yield host
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def an_open(number: int, *, length: int, max_tokens: int = 2) -> Open:
    return Open(
        sequence_id=SequenceId(number),
        request_id=f"r{number}",
        prompt=a_prompt(number, length),
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=number),
    )


def a_prompt(number: int, length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return (np.arange(length, dtype=np.int32) * (number + 1)) % 90


def keys_of(host: Host, command: Open) -> tuple[PageKey, ...]:
    welcome = host.welcome()
    root = root_key(
        fingerprint=welcome.model_fingerprint, numerics=welcome.numerics, wire_id=welcome.wire_id, salt=""
    )
    return page_keys(root, command.prompt)


def metric(host: Host, name: str, **labels: str) -> float:
    return host.metrics.registry.get_sample_value(f"rorqual_worker_{name}", labels) or 0.0


async def test_a_router_learns_of_a_prompts_pages_and_tail_with_its_answer() -> None:
    async with a_host(heartbeat=5) as host:
        router = Router(host)
        await router.read()
        command = an_open(1, length=600)
        router.session.submit(command)
        await router.read_answer()
        await router.read_until(lambda: router.reader.number == host.feed.writer.number)
        first, second = keys_of(host, command)
        assert router.content.visible.keys() == {first, second}
        assert router.content.visible[second] == PAGE | TAIL


async def test_a_router_that_comes_later_gets_a_snapshot_and_both_are_exact() -> None:
    async with a_host() as host:
        early = Router(host)
        early.session.submit(an_open(1, length=1500))
        await early.read_answer()
        late = Router(host)
        await late.read_until(lambda: late.reader.number == host.feed.writer.number)
        await early.read_until(lambda: early.reader.number == host.feed.writer.number)
        assert late.content.visible == early.content.visible
        assert len(late.content.visible) == 5
        host.feed.writer.check()
        assert metric(host, "feed_snapshots_total") == 2  # the first one empty


@pytest.mark.parametrize("num_host_pages", [0, 5])
@pytest.mark.parametrize("changes_max", [1 << 16, 3])
async def test_routers_stay_exact_while_everything_is_evicted_all_the_time(
    num_host_pages: int, changes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with host memory below the cache, and when there is more to tell than is remembered."""
    monkeypatch.setattr(prefix_cache, "ShadowRadix", partial(ShadowRadix, num_changes_max=changes_max))
    async with a_host(num_pages=6, num_host_pages=num_host_pages) as host:
        router = Router(host)
        for number in [*range(1, 12), 4, 8, 11]:
            router.session.submit(an_open(number, length=256 * (1 + number % 4) + 7))
            await router.read_answer()
        await router.read_until(lambda: router.reader.number == host.feed.writer.number)
        cache = host.scheduler.cache
        assert cache is not None
        held = dict(cache.contents())
        assert router.content.visible == held
        assert any(flags & HOST_PAGE for flags in held.values()) == (num_host_pages > 0)
        assert sum(not flags & HOST_PAGE for flags in held.values()) == cache.num_pages
        assert 6 * (num_host_pages > 0) < len(held) <= 6 + num_host_pages
        host.feed.writer.check()


async def test_news_alone_waits_for_a_report_to_travel_with() -> None:
    """Another router's sequences change the cache at every step: this one hears of them in fewer messages."""
    async with a_host(heartbeat=5) as host:
        busy, quiet = Router(host), Router(host)
        await quiet.read()
        busy.session.submit(an_open(1, length=2048, max_tokens=1))
        await busy.read_answer()
        number = host.feed.writer.number
        assert number >= 3
        await quiet.read()
        assert (quiet.num_reports, quiet.reader.number) == (2, number)


async def test_a_heartbeat_says_what_the_content_is() -> None:
    async with a_host() as host:
        router = Router(host)
        router.session.submit(an_open(1, length=300))
        await router.read_answer()
        await router.read_until(lambda: metric(host, "feed_items_total", kind="digest") >= 2)
        assert router.reader.number == host.feed.writer.number


async def test_a_worker_without_a_cache_describes_an_empty_one() -> None:
    async with a_host(prefix_cache=False) as host:
        router = Router(host)
        router.session.submit(an_open(1, length=600))
        await router.read_answer()
        await router.read_until(lambda: router.reader.number == 0)
        assert router.content.visible == {}


async def test_a_router_that_has_lost_its_place_begins_anew() -> None:
    async with a_host() as host:
        router = Router(host)
        router.session.submit(an_open(1, length=600))
        await router.read_answer()
        router.session.submit(Subscribe(incarnation=Incarnation(99), number=5))
        router.reader.leave()
        router.reader.welcome(INCARNATION)
        await router.read_until(lambda: router.reader.number is not None)
        assert len(router.content.visible) == 2


@pytest.mark.parametrize("is_closed_first", [True, False])
async def test_a_session_that_ends_takes_no_more_of_the_feed(is_closed_first: bool) -> None:
    async with a_host() as host:
        router = Router(host)
        if not is_closed_first:
            await router.read()
        router.session.close()
        host.connect("other").submit(an_open(1, length=600))
        while host.feed.writer.number == 0:
            await asyncio.sleep(0.001)
        assert (await router.session.next_report()).feed == ()


async def test_a_router_far_behind_is_told_in_several_reports_that_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_feed, "ITEMS_MAX", 1)
    async with a_host(heartbeat=5) as host:
        busy, quiet = Router(host), Router(host)
        await quiet.read()
        busy.session.submit(an_open(1, length=2048, max_tokens=1))
        await busy.read_answer()
        async with asyncio.timeout(2):
            await quiet.read_until(lambda: quiet.reader.number == host.feed.writer.number)
        assert quiet.num_reports >= 4
