"""EndpointSlices read as workers, over a real HTTP connection to a server that does everything wrong in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_cluster_api import FakeClusterApi, a_slice

from rorqual.cluster_api import ApiError, ApiUnreachable, ClusterApi, WatchPace
from rorqual.discovery import parse_source
from rorqual.discovery.endpoint_slices import EndpointSliceSource, addresses_of
from rorqual.errors import ConfigError

PACE = WatchPace(
    silence_seconds_max=30.0,
    relist_seconds=60.0,
    backoff_seconds_min=0.01,
    backoff_seconds_max=0.05,
    watch_seconds_min=1.0,
)
PATH = "/apis/discovery.k8s.io/v1/namespaces/here/endpointslices"
RIGHT = "endpointslices of discovery.k8s.io in namespace here"


class Followed:
    def __init__(self, api: FakeClusterApi, source: EndpointSliceSource) -> None:
        self.api = api
        self.source = source
        self.told: list[set[str]] = []

    @property
    def now(self) -> set[str] | None:
        return self.told[-1] if self.told else None

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    async def names(self, *addresses: str) -> None:
        await self.until(lambda: self.now == set(addresses))

    async def watching(self) -> None:
        await self.until(lambda: self.api.num_watching == 1 and not self.source.last_error)

    async def fails(self, times: int = 1) -> None:
        """So many times more."""
        number = self.source.num_failures + times
        await self.until(lambda: self.source.num_failures >= number)


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeClusterApi]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with FakeClusterApi() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "config")))
        yield server


@asynccontextmanager
async def following(
    api: FakeClusterApi, *, pace: WatchPace = PACE, text: str = "kubernetes:?selector=a=b"
) -> AsyncIterator[Followed]:
    source = EndpointSliceSource(
        parse_source(text, option="x"), connect=lambda: ClusterApi.connect(call_seconds_max=5.0, pace=pace)
    )
    followed = Followed(api, source)
    running = asyncio.create_task(source.run(lambda addresses: followed.told.append(set(addresses))))
    try:
        async with asyncio.timeout(20):
            yield followed
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_slices_are_listed_in_pages_and_then_watched(api: FakeClusterApi) -> None:
    for number in range(5):
        api.put(a_slice(f"s{number}", f"10.0.0.{number}"))
    async with following(api) as followed:
        await followed.names(*(f"10.0.0.{number}:9000" for number in range(5)))
        await followed.watching()
        assert api.num_lists == 3
        assert {query["labelSelector"] for query in api.queries} == {"a=b"}
        assert api.queries[-1]["allowWatchBookmarks"] == "true"
        assert set(api.tokens) == {"Bearer a-token"}
        api.put(a_slice("s9", "10.0.0.9"))
        for number in range(5):
            api.delete(f"s{number}")
        await followed.names("10.0.0.9:9000")
        api.delete("s9")
        await followed.names()
        assert api.num_lists == 3
        assert followed.source.num_failures == 0


async def test_a_server_that_is_down_takes_nobody_away(
    api: FakeClusterApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.put(a_slice("s", "10.0.0.1"))
    async with following(api) as followed:
        await followed.watching()
        await api.stop()
        await followed.fails(3)
        assert PATH in followed.source.last_error
        assert followed.told == [{"10.0.0.1:9000"}]
        api.put(a_slice("s", "10.0.0.2"))
        await api.start()
        await followed.names("10.0.0.2:9000")
        await followed.watching()
    assert sum("failed to ask" in record.getMessage() for record in caplog.records) <= 2


async def test_a_server_that_is_not_there_yet_is_waited_for(api: FakeClusterApi) -> None:
    await api.stop()
    async with following(api) as followed:
        await followed.fails(2)
        assert followed.told == []
        await api.start()
        await followed.names()  # it is known now that there is nobody


@pytest.mark.slow
@pytest.mark.parametrize("end", ["at once", "gone", "cut"])
async def test_a_watch_that_ends_leads_to_a_list_and_servers_are_not_asked_in_a_loop(
    end: str, api: FakeClusterApi
) -> None:
    pace = WatchPace(backoff_seconds_min=0.02, backoff_seconds_max=1000.0, watch_seconds_min=1000.0)
    api.put(a_slice("s", "10.0.0.1"))
    async with following(api, pace=pace) as followed:
        await followed.watching()
        api.watches_end = end
        api.end_watches()
        await asyncio.sleep(1.0)
        # Each wait is twice the one before, of which at least half is kept: with the ninth it would be five seconds.
        assert 2 <= api.num_lists < 10
        api.put(a_slice("s", "10.0.0.2"))
        await followed.names("10.0.0.2:9000")
        if end == "cut":
            assert followed.source.num_failures > 0
        api.watches_end = ""
        await followed.watching()
        api.put(a_slice("s", "10.0.0.3"))
        await followed.names("10.0.0.3:9000")


async def test_a_watch_that_is_silent_is_not_trusted(api: FakeClusterApi) -> None:
    pace = WatchPace(silence_seconds_max=0.1, backoff_seconds_min=0.01, relist_seconds=1000.0)
    api.put(a_slice("s", "10.0.0.1"))
    api.is_silent = True
    async with following(api, pace=pace) as followed:
        await followed.until(lambda: api.num_watches == 1)
        api.put(a_slice("s", "10.0.0.2"))
        await followed.names("10.0.0.2:9000")
        assert followed.told == [{"10.0.0.1:9000"}, {"10.0.0.2:9000"}]


@pytest.mark.parametrize("end", ["garbled", "long"])
async def test_a_watch_that_makes_no_sense_is_not_waited_for(end: str, api: FakeClusterApi) -> None:
    pace = WatchPace(silence_seconds_max=0.3, backoff_seconds_min=0.01, relist_seconds=1000.0)
    api.put(a_slice("s", "10.0.0.1"))
    api.watches_end = end
    async with following(api, pace=pace) as followed:
        await followed.fails(2)
        api.watches_end = ""
        api.put(a_slice("s", "10.0.0.2"))
        await followed.names("10.0.0.2:9000")


async def test_watches_that_are_cut_when_idle_are_begun_again_soon(api: FakeClusterApi) -> None:
    """As balancers do. Twelve of them, if each counted as a failure, would take longer than this test may."""
    pace = WatchPace(
        silence_seconds_max=0.06,
        watch_seconds_min=0.05,
        backoff_seconds_min=0.01,
        relist_seconds=1000.0,
        backoff_seconds_max=1000.0,
    )
    api.is_silent = True
    async with following(api, pace=pace) as followed:
        await followed.until(lambda: api.num_watches >= 12)


async def test_everything_is_listed_again_now_and_then_whatever_the_watch_says(api: FakeClusterApi) -> None:
    pace = WatchPace(silence_seconds_max=1000.0, backoff_seconds_min=0.01, relist_seconds=0.1)
    api.put(a_slice("s", "10.0.0.1"))
    api.is_silent = True
    async with following(api, pace=pace) as followed:
        await followed.until(lambda: api.num_watches == 1)
        api.put(a_slice("s", "10.0.0.2"))
        await followed.names("10.0.0.2:9000")
        assert followed.source.num_failures == 0


async def test_a_server_that_is_busy_is_come_back_to_when_it_says(api: FakeClusterApi) -> None:
    api.put(a_slice("s", "10.0.0.1"))
    api.list_refusals = [(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"})]
    async with following(api) as followed:
        await followed.names("10.0.0.1:9000")
        assert followed.source.num_failures == 0
        assert api.num_lists == 3


async def test_a_server_that_is_too_busy_counts_as_unreachable(api: FakeClusterApi) -> None:
    connected = await ClusterApi.connect()
    try:
        for headers, num_calls in (({"Retry-After": "0"}, 3), ({"Retry-After": "3600"}, 1), ({}, 1)):
            api.list_refusals, api.num_lists = [(429, headers)] * 5, 0
            with pytest.raises(ApiUnreachable, match="too busy"):
                await connected.get(PATH)
            assert api.num_lists == num_calls
    finally:
        await connected.close()


async def test_what_is_forbidden_is_said_once_with_the_right_that_is_missing(
    api: FakeClusterApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.list_status, api.message = 403, "User\n cannot"
    async with following(api) as followed:
        await followed.fails(5)
        assert followed.source.last_error == (
            f"the right to list {RIGHT} is missing, grant it by a Role (403: User cannot)"
        )
        assert followed.told == []
        assert sum("failed to ask" in record.getMessage() for record in caplog.records) == 1


async def test_who_may_list_and_not_watch_is_told_so_once_and_lists_are_used(
    api: FakeClusterApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    api.watch_status = 403
    api.put(a_slice("s", "10.0.0.1"))
    async with following(api) as followed:
        await followed.fails(4)
        assert f"the right to watch {RIGHT} is missing" in followed.source.last_error
        api.put(a_slice("s", "10.0.0.2"))
        await followed.names("10.0.0.2:9000")
    messages = [record.getMessage() for record in caplog.records]
    assert sum("to ask" in text or "asked" in text for text in messages) == 1


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"items": "x"},
        {"items": [5]},
        {"items": [{"metadata": 5}]},
        {"metadata": [1], "items": []},
        {"items": [{"metadata": {"name": "x"}, "ports": 5}]},
        {"items": [a_slice("x", {"addresses": 7})]},
        {"items": [{**a_slice("x", "10.0.0.9"), "endpoints": ["what"]}]},
    ],
)
async def test_an_answer_that_makes_no_sense_takes_nobody_away(body: Any, api: FakeClusterApi) -> None:
    api.put(a_slice("s", "10.0.0.1"))
    async with following(api) as followed:
        await followed.watching()
        api.list_body = body
        api.end_watches()
        await followed.fails()
        await asyncio.sleep(0.05)  # also where there is a watch meanwhile
        assert followed.source.last_error
        assert followed.told == [{"10.0.0.1:9000"}]
        api.list_body = None
        api.put(a_slice("s", "10.0.0.2"))
        while followed.now != {"10.0.0.2:9000"}:  # a watch that begins just now is ended the next time
            api.end_watches()
            await asyncio.sleep(0.01)


async def test_endpoints_that_flap_are_told_as_they_do(api: FakeClusterApi) -> None:
    async with following(api) as followed:
        await followed.watching()
        for turn in range(20):
            api.put(a_slice("s", *(["10.0.0.1"] if turn % 2 else ["10.0.0.1", "10.0.0.2"])))
        await followed.names("10.0.0.1:9000")
        api.put(a_slice("s", "10.0.0.1", note="nothing that counts"))
        api.put(a_slice("t", "10.0.0.3"))
        await followed.names("10.0.0.1:9000", "10.0.0.3:9000")
        assert all(before != after for before, after in zip(followed.told, followed.told[1:], strict=False))


async def test_an_event_of_a_million_bytes_is_taken_in(api: FakeClusterApi) -> None:
    async with following(api) as followed:
        await followed.watching()
        addresses = [f"10.{number // 250}.0.{number % 250}" for number in range(1000)]
        big = [{"addresses": [item], "conditions": {}, "hints": {"x": "y" * 1000}} for item in addresses]
        api.put(a_slice("s", *big))
        await followed.names(*(f"{item}:9000" for item in addresses))
        assert followed.source.num_failures == 0


def endpoint(address: str, uid: str = "", **conditions: bool | None) -> dict[str, Any]:
    return {
        "addresses": [address],
        "conditions": conditions,
        **({"targetRef": {"kind": "Pod", "uid": uid}} if uid else {}),
    }


@pytest.mark.parametrize(
    ("conditions", "counts"),
    [
        ({}, True),
        ({"ready": None}, True),
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({"ready": False}, False),
        ({"ready": False, "serving": True, "terminating": False}, False),
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, False),
        ({"ready": False, "terminating": True}, False),
    ],
)
def test_who_is_ready_or_finishes_what_it_has_counts(conditions: dict[str, Any], counts: bool) -> None:
    found = addresses_of([a_slice("s", endpoint("10.0.0.1", **conditions))], port_name="session")
    assert found == ({"10.0.0.1:9000"} if counts else set())


def test_a_service_of_many_slices_of_two_families_names_each_pod_once() -> None:
    slices = [
        a_slice("v6", endpoint("fd00::1", "u1"), endpoint("fd00::3", "u3"), addressType="IPv6"),
        a_slice("a", endpoint("10.0.0.1", "u1"), endpoint("10.0.0.2", "u2")),
        a_slice("b", endpoint("10.0.0.2", "u2"), endpoint("10.0.0.4")),
        a_slice("v6-too", endpoint("fd00::5"), addressType="IPv6"),
    ]
    expected = {"10.0.0.1:9000", "10.0.0.2:9000", "[fd00::3]:9000", "10.0.0.4:9000", "[fd00::5]:9000"}
    assert addresses_of(slices, port_name="session") == expected
    assert addresses_of(reversed(slices), port_name="session") == expected


def test_a_pod_that_is_ready_in_one_family_only_is_reached_by_that() -> None:
    slices = [
        a_slice("a", endpoint("10.0.0.1", "u1", ready=False)),
        a_slice("b", endpoint("fd00::1", "u1"), addressType="IPv6"),
    ]
    assert addresses_of(slices, port_name="session") == {"[fd00::1]:9000"}


def test_the_port_is_that_of_its_name() -> None:
    item = a_slice("s", "10.0.0.1", port=8000, port_name="http")
    assert addresses_of([item], port_name="http") == {"10.0.0.1:8000"}
    assert addresses_of([item], port_name="session") == set()
    assert addresses_of([a_slice("s", "10.0.0.1", port=None)], port_name="session") == set()
    assert addresses_of([{"ports": None, "endpoints": None}], port_name="session") == set()


async def test_without_a_way_to_a_server_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for content in (None, "", "{", "a: b", "current-context: x\nclusters: []\n", "\t"):
        file = tmp_path / "config"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        monkeypatch.setenv("KUBECONFIG", str(file))
        with pytest.raises(ConfigError, match="no way to a Kubernetes API server"):
            await ClusterApi.connect()


async def test_an_answer_that_is_no_success_is_told_with_its_status_and_reason(api: FakeClusterApi) -> None:
    connected = await ClusterApi.connect()
    try:
        api.list_status, api.message = 409, "somebody else was first"
        with pytest.raises(ApiError, match=r"get .*: 409 somebody else was first") as raised:
            await connected.get(PATH)
        assert (raised.value.status, raised.value.reason) == (409, "Because")
    finally:
        await connected.close()
