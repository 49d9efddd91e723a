"""The router's picture of caches, fed by sessions of real hosts: exact, or empty where nothing is known."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
from fake_transport import FakeChannel

from kvstore.keys import PageKey, page_keys, root_key
from rorqual.feed import CONTENT_ENTRIES_MAX, Delta, FeedItem, SnapshotPart
from rorqual.ids import Incarnation
from rorqual.session import StepReport, TokenArray, Welcome
from router.picture import Found
from tests.harness.cluster import Cluster, a_cluster, a_generation, collect, the_answer, until


def keys_of(cluster: Cluster, address: str, prompt: TokenArray) -> tuple[PageKey, ...]:
    welcome = cluster.transport.hosts[address].welcome()
    root = root_key(
        fingerprint=welcome.model_fingerprint, numerics=welcome.numerics, wire_id=welcome.wire_id, salt=""
    )
    return page_keys(root, prompt)


def look_up(cluster: Cluster, address: str, prompt: TokenArray) -> Found:
    return cluster.fleet.picture.look_up(keys_of(cluster, address, prompt))


def holds(cluster: Cluster, address: str) -> set[bytes]:
    """Keys of what the worker's index has."""
    cache = cluster.transport.hosts[address].scheduler.cache
    assert cache is not None
    return {key for key, _ in cache.contents()}


def is_exact(cluster: Cluster, address: str) -> bool:
    """The router's number and digest are the worker's."""
    feed = cluster.fleet.link(address).feed
    writer = cluster.transport.hosts[address].feed.writer
    return feed.reader.number == writer.number and not feed.reader.is_loading


async def test_the_picture_has_what_a_worker_has_computed_when_its_first_token_arrives() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        for address in ("a", "b"):
            cluster.start_worker(address, num_records=6)
        await cluster.connected(2)
        generation = a_generation(length=600)
        await collect(cluster, generation)
        found = look_up(cluster, "a", generation.prompt)
        assert sorted(found.pages_W.tolist()) == [0, 2]
        await until(lambda: look_up(cluster, "a", generation.prompt).tail_W.max() == 2)
        await until(lambda: is_exact(cluster, "a") and is_exact(cluster, "b"))
        cluster.fleet.picture.check()


async def test_a_worker_whose_session_is_lost_counts_as_empty_until_it_is_back() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(length=600)
        await collect(cluster, generation)
        await until(lambda: look_up(cluster, "a", generation.prompt).num_pages == 2)
        host = cluster.transport.hosts.pop("a")
        cluster.transport.latest["a"].cut()
        await until(lambda: not cluster.fleet.welcomes())
        assert look_up_all(cluster, generation.prompt) == 0
        cluster.transport.hosts["a"] = host
        await until(lambda: look_up_all(cluster, generation.prompt) == 2)
        assert is_exact(cluster, "a")


def look_up_all(cluster: Cluster, prompt: TokenArray) -> int:
    root = root_key(fingerprint="fake", numerics="float32", wire_id="", salt="")
    return cluster.fleet.picture.look_up(page_keys(root, prompt)).num_pages


async def test_a_worker_that_was_started_anew_is_followed_from_nothing() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(length=600)
        await collect(cluster, generation)
        await until(lambda: look_up_all(cluster, generation.prompt) == 2)
        cluster.transport.latest["a"].cut()
        cluster.start_worker("a", incarnation=2)
        await until(lambda: len(cluster.transport.channels) > 1 and bool(cluster.fleet.welcomes()))
        await until(lambda: cluster.fleet.link("a").feed.reader.number == 0)
        assert look_up_all(cluster, generation.prompt) == 0
        await collect(cluster, generation)
        await until(lambda: look_up_all(cluster, generation.prompt) == 2)


class Tampering:
    """The first delta that passes is changed: None, it is left out."""

    def __init__(self, channel: FakeChannel, change: Callable[[Delta], FeedItem | None]) -> None:
        self.num_changed = 0
        self._change = change
        self._receive = channel.receive
        channel.receive = self.receive  # type: ignore[method-assign]

    async def receive(self) -> Welcome | StepReport:
        report = await self._receive()
        if isinstance(report, StepReport) and not self.num_changed:
            items: list[FeedItem] = []
            for item in report.feed:
                changed: FeedItem | None = item
                if isinstance(item, Delta) and not self.num_changed:
                    self.num_changed += 1
                    changed = self._change(item)
                items += [changed] if changed is not None else []
            report = dataclasses.replace(report, feed=tuple(items))
        return report


def an_absurd_snapshot(delta: Delta) -> SnapshotPart:
    return SnapshotPart(
        incarnation=delta.incarnation,
        number=delta.number,
        part=0,
        num_parts=1,
        num_entries=CONTENT_ENTRIES_MAX + 1,
        digest=delta.digest,
        keys=b"",
        flags=b"",
    )


TAMPERINGS: dict[str, Callable[[Delta], FeedItem | None]] = {
    "digest": lambda delta: dataclasses.replace(delta, digest=delta.digest ^ 1),
    "incarnation": lambda delta: dataclasses.replace(delta, incarnation=Incarnation(delta.incarnation + 1)),
    "gap": lambda _: None,  # which the next item finds
    "duplicate": lambda delta: dataclasses.replace(delta, number=delta.number - 1),
    "count": an_absurd_snapshot,
    "entry": lambda delta: dataclasses.replace(delta, changes=b"\x77" * len(delta.changes)),
}


@pytest.mark.parametrize("reason", TAMPERINGS)
async def test_a_feed_that_cannot_be_right_is_counted_and_asked_for_anew_and_all_are_served(
    reason: str,
) -> None:
    async with a_cluster("a") as cluster:
        tampering = Tampering(cluster.transport.latest["a"], TAMPERINGS[reason])
        await collect(cluster, a_generation(9))  # the report that is awaited now passes as it is
        for number in range(2):
            generation = a_generation(number, length=600)
            (got,) = await collect(cluster, generation)
            assert got.tokens == the_answer(generation)
        await until(lambda: tampering.num_changed == 1 and is_exact(cluster, "a"))
        assert look_up_all(cluster, generation.prompt) == 2
        assert cluster.count("feed_faults_total", worker="a", reason=reason) == 1
        assert cluster.count("feed_pages", worker="a") == len(holds(cluster, "a"))
        cluster.fleet.picture.check()


async def test_items_of_a_workers_life_before_are_counted_and_never_seen() -> None:
    async with a_cluster("a") as cluster:
        old: list[FeedItem] = []

        def remember(delta: Delta) -> FeedItem:
            old.append(delta)
            return delta

        Tampering(cluster.transport.latest["a"], remember)
        await collect(cluster, a_generation(9))
        before = a_generation(1, length=600)
        await collect(cluster, before)
        await until(lambda: look_up_all(cluster, before.prompt) == 2)
        (delta,) = old
        cluster.transport.latest["a"].cut()
        cluster.start_worker("a", incarnation=2)
        await until(lambda: len(cluster.transport.channels) > 1 and bool(cluster.fleet.welcomes()))
        await until(lambda: cluster.fleet.link("a").feed.reader.number == 0)
        cluster.fleet.link("a").feed.take([delta])
        assert look_up_all(cluster, before.prompt) == 0
        assert cluster.count("feed_faults_total", worker="a", reason="incarnation") == 1
        await until(lambda: is_exact(cluster, "a"))
        after = a_generation(2, length=600)
        (got,) = await collect(cluster, after)
        assert got.tokens == the_answer(after)
        await until(lambda: look_up_all(cluster, after.prompt) == 2)
        assert look_up_all(cluster, before.prompt) == 0


async def test_under_eviction_all_the_time_the_picture_is_the_workers_index() -> None:
    async with a_cluster("a", "b") as cluster:
        requests = [a_generation(number, length=300 + 200 * (number % 5)) for number in range(30)]
        await asyncio.gather(*(collect(cluster, item) for item in requests))
        await until(lambda: is_exact(cluster, "a") and is_exact(cluster, "b"))
        for address in ("a", "b"):
            cluster.transport.hosts[address].feed.writer.check()
            assert cluster.count("feed_pages", worker=address) == len(holds(cluster, address)) > 0
        cluster.fleet.picture.check()
        await cluster.empty()
