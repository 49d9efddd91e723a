"""Versions of workers: the log is told when they differ and when they are alike again; metrics say who has which."""

from __future__ import annotations

import logging

import pytest

from rorqual import __version__
from router.fleet import FleetConfig
from tests.harness.cluster import Cluster, a_cluster, until

QUICK = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.002)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Lines about versions, with their level."""
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "router.fleet" and "version" in record.getMessage()
    ]


def start(cluster: Cluster, **versions: str) -> None:
    """Workers by address, each with the version that it says it runs."""
    cluster.transport.versions.update(versions)
    for address in versions:
        cluster.start_worker(address)


async def replaced(cluster: Cluster, address: str, version: str) -> None:
    """The worker is gone, and another one is there in its place."""
    sessions = cluster.count("sessions_opened_total", worker=address)
    cluster.lose(address)
    start(cluster, **{address: version})
    await until(lambda: cluster.count("sessions_opened_total", worker=address) > sessions)


async def test_a_roll_is_told_when_it_begins_and_when_it_is_over_and_not_in_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        start(cluster, a="0.1.0", b="0.1.0", c="0.1.0")
        cluster.fleet.set_found(set("abc"))
        await cluster.connected(3)
        assert told(caplog) == []
        await replaced(cluster, "a", "0.2.0")
        mixed = f'saw workers of several versions versions="2 of 0.1.0, 1 of 0.2.0" router={__version__}'
        assert told(caplog) == [(logging.WARNING, mixed)]
        await replaced(cluster, "b", "0.2.0")
        # Further ones are no news, nor is a third version.
        cluster.transport.versions["d"] = "0.3.0"
        cluster.start_worker("d")
        cluster.fleet.set_found(set("abcd"))
        await cluster.connected(4)
        await replaced(cluster, "d", "0.2.0")
        assert len(told(caplog)) == 1
        await replaced(cluster, "c", "0.2.0")
        uniform = (logging.INFO, "saw all workers of one version again version=0.2.0")
        assert told(caplog)[1:] == [uniform]
        # The next roll is told again.
        await replaced(cluster, "c", "0.3.0")
        assert [level for level, _ in told(caplog)] == [logging.WARNING, logging.INFO, logging.WARNING]


async def test_a_worker_that_does_not_say_is_of_another_version_than_one_that_does_and_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        start(cluster, a="", b="")
        cluster.fleet.set_found({"a", "b"})
        await cluster.connected(2)
        assert told(caplog) == []
        await replaced(cluster, "a", "0.2.0")
        assert ["1 of unknown, 1 of 0.2.0" in line for _, line in told(caplog)] == [True]
        assert not cluster.fleet.missing()


async def test_metrics_tell_the_version_of_each_worker_while_it_has_a_session() -> None:
    async with a_cluster(fleet=QUICK, start=False) as cluster:

        def info(worker: str, version: str) -> float | None:
            labels = {"worker": worker, "role": "both", "version": version}
            return cluster.registry.get_sample_value("rorqual_router_worker_info", labels)

        start(cluster, a="0.1.0", b="")
        cluster.fleet.set_found({"a", "b"})
        await cluster.connected(2)
        assert (info("a", "0.1.0"), info("b", "unknown")) == (1, 1)
        await replaced(cluster, "a", "0.2.0")
        assert (info("a", "0.1.0"), info("a", "0.2.0")) == (None, 1)
        cluster.lose("b")
        await cluster.connected(1)
        assert info("b", "unknown") is None
