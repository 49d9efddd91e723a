"""What pods tell of a pool: who is starting for how long, and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.targets.contract import PoolReading
from autoscaler.targets.pods import read_pods

WALL = 1_700_000_000.0
CREATED = "2023-11-14T22:11:20Z"  # 120 s before


def a_pod(name: str, *, ready: bool = False, created: str = CREATED, **status: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}, *status.pop("conditions", [])]
    return {
        "metadata": {"name": name, "creationTimestamp": created},
        "status": {"phase": "Running", "conditions": conditions, **status},
    }


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


def read(*pods: dict[str, Any], replicas: int, shortage: float = 0.0) -> PoolReading:
    return read_pods(pods, replicas=replicas, wall=WALL, shortage_seconds=shortage)


def test_pods_that_are_ready_are_not_starting() -> None:
    assert read(a_pod("a", ready=True), replicas=1) == PoolReading(replicas=1)


def test_those_that_are_not_have_been_starting_since_they_were_made() -> None:
    pods = a_pod("a", ready=True), a_pod("b"), a_pod("c", created="2023-11-14T22:13:10Z")
    assert read(*pods, replicas=3).starting_seconds == (120.0, 10.0)


def test_a_replica_without_a_pod_has_been_starting_since_it_was_missed() -> None:
    reading = read(a_pod("a", ready=True), replicas=3, shortage=7.0)
    assert (reading.starting_seconds, reading.problem) == ((7.0, 7.0), "")
    assert "2 replicas have had no pod for 90 s" in read(a_pod("a"), replicas=3, shortage=90.0).problem


def a_started_pod(name: str, *, started: bool = True, **options: Any) -> dict[str, Any]:
    return a_pod(name, containerStatuses=[{"started": started, "state": {"running": {}}}], **options)


def test_a_pod_that_has_started_and_is_not_ready_is_not_starting() -> None:
    """As the control plane leaves the pods of nodes that it does not hear of; they may well serve."""
    pods = a_started_pod("a"), a_started_pod("b", started=False), a_pod("c", ready=True)
    assert read(*pods, replicas=3) == PoolReading(replicas=3, starting_seconds=(120.0,))


def test_a_worker_that_ended_in_its_pod_has_been_starting_since_then() -> None:
    pod = a_started_pod("a", started=False, created="2023-11-04T22:13:20Z")
    pod["status"]["conditions"][0]["lastTransitionTime"] = "2023-11-14T22:13:10Z"
    assert read(pod, replicas=1).starting_seconds == (10.0,)


def test_the_pod_that_a_roll_has_too_many_stands_for_no_replica() -> None:
    ready = [a_pod(name, ready=True) for name in "abc"]
    assert read(*ready, a_pod("new"), replicas=3).starting_seconds == ()
    # One of those that are ready does go: the oldest of those that start is in its place.
    ready[0]["metadata"]["deletionTimestamp"] = CREATED
    late = a_pod("newer", created="2023-11-14T22:13:10Z")
    assert read(*ready, late, a_pod("new"), replicas=3).starting_seconds == (120.0,)


def test_pods_that_go_or_have_ended_do_not_count() -> None:
    going = a_pod("a")
    going["metadata"]["deletionTimestamp"] = CREATED
    assert read(going, a_pod("b", phase="Failed"), replicas=0) == PoolReading(replicas=0)


def test_a_clock_behind_the_servers_makes_no_negative_age() -> None:
    assert read(a_pod("a", created="2023-11-14T23:00:00Z"), replicas=1).starting_seconds == (0.0,)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (waiting("ImagePullBackOff", "no such image"), "a: ImagePullBackOff: no such image"),
        (waiting("CrashLoopBackOff"), "a: CrashLoopBackOff"),
        (
            {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3 nodes"}]},
            "a: Unschedulable: 0/3 nodes",
        ),
        (waiting("ContainerCreating"), ""),
        ({}, ""),
    ],
)
def test_what_hinders_a_pod_is_the_pools_problem(status: dict[str, Any], text: str) -> None:
    assert read(a_pod("a", **status), replicas=1).problem == text


def test_of_several_problems_the_first_stands_for_all() -> None:
    pods = [a_pod(name, **waiting("CrashLoopBackOff")) for name in "abc"]
    assert read(*pods, replicas=3).problem == "a: CrashLoopBackOff (and 2 more)"
