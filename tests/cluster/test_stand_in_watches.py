"""The project's own client of Kubernetes keeps its picture true while the stand-in's watches fail in every way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from rorqual.cluster_api import ApiError, ApiUnreachable, ClusterApi
from tests.cluster.stand_in.cluster import StandIn
from tests.harness.helm import until

MAPS = "/api/v1/namespaces/default/configmaps"
SILENCE_SECONDS = 20.0


@contextlib.asynccontextmanager
async def begun(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[StandIn, ClusterApi]]:
    async with StandIn() as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        api = await ClusterApi.connect(call_seconds_max=5.0)
        try:
            yield cluster, api
        finally:
            await api.close()


def config_map(name: str, value: str = "", **labels: str) -> dict:
    return {"metadata": {"name": name, "labels": labels}, "data": {"value": value}}


class Picture:
    """What a watch has told last, by name."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.num_calls = 0
        self.failures: list[str] = []

    @contextlib.asynccontextmanager
    async def kept(self, cluster: StandIn, api: ClusterApi, **query: str) -> AsyncIterator[None]:
        watching = asyncio.create_task(
            api.watch(MAPS, query=query, on_change=self._take, on_failure=self.failures.append)
        )
        try:
            await until(lambda: len(cluster.server.watchers) == 1, what="a watch")
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def until(self, values: dict[str, str]) -> None:
        await until(lambda: self.values == values, what=f"{values}")

    def _take(self, objects) -> None:
        self.num_calls += 1
        self.values = {item["metadata"]["name"]: item["data"]["value"] for item in objects.values()}


async def test_what_is_written_is_told_in_order(monkeypatch):
    async with begun(monkeypatch) as (_, api):
        picture = Picture()
        await api.create(MAPS, config_map("first", "1"))
        async with picture.kept(_, api):
            await picture.until({"first": "1"})
            await api.create(MAPS, config_map("second", "1"))
            await picture.until({"first": "1", "second": "1"})
            await api.merge_patch(f"{MAPS}/second", {"data": {"value": "2"}})
            await picture.until({"first": "1", "second": "2"})
            assert picture.failures == [""]


async def test_a_label_that_is_taken_off_is_a_deletion_also_for_a_watch_that_began_before(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        picture = Picture()
        await api.create(MAPS, config_map("one", "1", pool="a"))
        await api.create(MAPS, config_map("other", "1", pool="b"))
        async with picture.kept(cluster, api, labelSelector="pool=a"):
            await picture.until({"one": "1"})
            await api.merge_patch(f"{MAPS}/other", {"metadata": {"labels": {"pool": "a"}}})
            await picture.until({"one": "1", "other": "1"})
            await api.merge_patch(f"{MAPS}/one", {"metadata": {"labels": {"pool": None}}})
            await picture.until({"other": "1"})


async def test_a_label_that_is_taken_off_between_list_and_watch_is_told(monkeypatch):
    async with begun(monkeypatch) as (_, api):
        await api.create(MAPS, config_map("one", "1", pool="a"))
        listed = await api.get(MAPS, query={"labelSelector": "pool=a"})
        version = listed["metadata"]["resourceVersion"]
        await api.merge_patch(f"{MAPS}/one", {"metadata": {"labels": {"pool": None}}})
        query = {"watch": "true", "labelSelector": "pool=a", "resourceVersion": version}
        async with api.stream(MAPS, query=query, silence_seconds_max=SILENCE_SECONDS) as events:
            event = await anext(events)
        assert event["type"] == "DELETED"
        assert event["object"]["metadata"]["name"] == "one"


async def test_a_watch_that_is_cut_within_a_line_is_begun_again(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        picture = Picture()
        async with picture.kept(cluster, api):
            await until(lambda: picture.failures == [""], what="a watch that is taken up")
            await cluster.server.cut_watches()
            await until(lambda: len(picture.failures) >= 2, what="a failure that is told")
            await api.create(MAPS, config_map("later", "1"))
            await picture.until({"later": "1"})
            # The list alone may have told it: that the failure is over is told with the watch after it.
            await until(lambda: picture.failures[-1] == "", what="the failure's end")
            assert picture.failures[0] == ""
            assert len(picture.failures) == 3, "one cut is one failure"


async def test_a_server_that_is_down_takes_nothing_away(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        picture = Picture()
        await api.create(MAPS, config_map("kept", "1"))
        async with picture.kept(cluster, api):
            await picture.until({"kept": "1"})
            cluster.faults.down = True
            await cluster.server.cut_watches()
            await until(lambda: len(picture.failures) >= 3, what="failures that are told")
            assert picture.values == {"kept": "1"}
            assert picture.num_calls == 1
            with pytest.raises(ApiUnreachable):
                await api.get(MAPS)


async def test_a_watch_that_is_told_410_lists_again(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        picture = Picture()
        async with picture.kept(cluster, api):
            cluster.server.expire_watches()
            await until(lambda: not cluster.server.watchers, what="the watch is over")
            await api.create(MAPS, config_map("later", "1"))
            await picture.until({"later": "1"})


async def test_a_version_that_is_forgotten_is_refused_and_the_present_one_is_not(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        old = (await api.get(MAPS))["metadata"]["resourceVersion"]
        await api.create(MAPS, config_map("one", "1"))
        cluster.objects.forget_changes()
        with pytest.raises(ApiError) as caught:
            async with api.stream(
                MAPS, query={"watch": "true", "resourceVersion": old}, silence_seconds_max=SILENCE_SECONDS
            ):
                pass
        assert (caught.value.status, caught.value.reason) == (410, "Expired")
        new = (await api.get(MAPS))["metadata"]["resourceVersion"]
        query = {"watch": "true", "resourceVersion": new}
        async with api.stream(MAPS, query=query, silence_seconds_max=SILENCE_SECONDS) as events:
            await api.create(MAPS, config_map("two", "1"))
            assert (await anext(events))["object"]["metadata"]["name"] == "two"


async def test_a_frozen_watch_gives_no_bookmark_either(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        monkeypatch.setattr("tests.cluster.stand_in.server.BOOKMARK_SECONDS", 0.05)
        version = (await api.get(MAPS))["metadata"]["resourceVersion"]
        query = {"watch": "true", "resourceVersion": version}
        async with api.stream(MAPS, query=query, silence_seconds_max=0.5) as events:
            told = [(await anext(events))["type"]]
            cluster.faults.frozen_watches = True
            async with asyncio.timeout(15):
                with pytest.raises(ApiUnreachable, match="no answer in time"):
                    told += [event["type"] async for event in events]
            assert set(told) == {"BOOKMARK"}


async def test_a_frozen_watch_that_thaws_tells_what_it_kept_back(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        picture = Picture()
        async with picture.kept(cluster, api):
            await until(lambda: picture.num_calls == 1, what="the first list")
            cluster.faults.frozen_watches = True
            await api.create(MAPS, config_map("hidden", "1"))
            await api.get(MAPS)
            assert picture.values == {}
            cluster.faults.frozen_watches = False
            await picture.until({"hidden": "1"})


async def test_a_bookmark_names_a_version_to_watch_on_from(monkeypatch):
    async with begun(monkeypatch) as (_, api):
        await api.create(MAPS, config_map("one", "1"))
        query = {"watch": "true", "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        async with api.stream(MAPS, query=query, silence_seconds_max=SILENCE_SECONDS) as events:
            assert (await anext(events))["type"] == "ADDED"
            end = await anext(events)
        assert end["type"] == "BOOKMARK"
        assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        version = end["object"]["metadata"]["resourceVersion"]
        await api.create(MAPS, config_map("two", "1"))
        query = {"watch": "true", "resourceVersion": version}
        async with api.stream(MAPS, query=query, silence_seconds_max=SILENCE_SECONDS) as events:
            event = await anext(events)
        assert (event["type"], event["object"]["metadata"]["name"]) == ("ADDED", "two")


async def test_a_list_comes_in_pages_and_is_whole(monkeypatch):
    async with begun(monkeypatch) as (cluster, api):
        cluster.faults.page_objects_max = 3
        for number in range(8):
            await api.create(MAPS, config_map(f"map-{number}", str(number)))
        page = await api.get(MAPS)
        assert len(page["items"]) == 3
        assert page["metadata"]["continue"]
        picture = Picture()
        async with picture.kept(cluster, api):
            await picture.until({f"map-{number}": str(number) for number in range(8)})
            assert picture.num_calls == 1
