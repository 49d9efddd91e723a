"""What checks say of given facts: no machine, no network."""

from __future__ import annotations

import asyncio
import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from kvstore.checks import StoreFacts, judge_store, judge_transfer
from rorqual.doctor import cluster, machine, network
from rorqual.doctor.finding import Check, Finding, Status, fail, in_thread, ok, run_checks
from rorqual.doctor.process import as_json, as_text


def statuses(findings: list[Finding]) -> list[Status]:
    return [finding.status for finding in findings]


def test_a_pin_that_is_not_met_is_told():
    pins = {"torch": "2.13.0", "grpcio": ""}
    installed = {"torch": "2.13.0+cpu", "grpcio": "1.85.1", "nixl-cu13": "1.5.1"}
    assert statuses(machine.judge_versions("3.11.7", installed, pins)) == [Status.OK]
    told = machine.judge_versions("3.11.7", installed | {"torch": "2.12.0"}, pins)[1]
    assert told.status is Status.WARN
    assert told.cure == "pip install torch==2.13.0"


def test_a_missing_package_fails_and_a_missing_nixl_warns():
    pins = {"grpcio": "", "nixl-cu13": "1.5.1"}
    told = machine.judge_versions("3.11.7", {"grpcio": None, "nixl-cu13": None}, pins)[1:]
    assert statuses(told) == [Status.FAIL, Status.WARN]


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, Status.OK, "2 shards"),
        ({"has_config": False}, Status.FAIL, "config.json"),
        ({"config_error": "hidden_size is missing"}, Status.FAIL, "hidden_size"),
        ({"shards": {"a": 10}}, Status.FAIL, "1 of 2 shards are missing, first b"),
        ({"shards_wanted": (), "shards": {}}, Status.FAIL, "no weights"),
        ({"has_tokenizer": False}, Status.WARN, "tokenizer.json"),
        ({"bytes_free": 15}, Status.WARN, "memory are free"),
    ],
)
def test_a_model_directory(changes: dict[str, Any], status: Status, text: str):
    good: dict[str, Any] = {
        "has_config": True,
        "has_tokenizer": True,
        "shards_wanted": ("a", "b"),
        "shards": {"a": 10, "b": 10},
        "bytes_free": 100,
    }
    (found,) = machine.judge_model(machine.ModelFacts(**(good | changes)))
    assert found.status is status
    assert text in found.found


def test_gpus():
    assert machine.judge_gpus(0, "H200, 580.1, 143771 MiB, 0 MiB\n")[0].status is Status.OK
    assert machine.judge_gpus(9, "Driver/library version mismatch\n")[0].status is Status.FAIL


@pytest.mark.parametrize(
    ("status", "held"),
    [
        ("CapPrm:\t0000000000004000\nCapEff:\t0000000000004000\n", True),  # root, all dropped but this one
        (
            "CapPrm:\t0000000000004000\nCapEff:\t0000000000000000\n",
            False,
        ),  # another user of the same container
        ("CapEff:\t000001ffffffbfff\n", False),
        ("Name:\tpython\n", False),
    ],
)
def test_what_a_process_may_lock_goes_by_its_effective_capabilities(status: str, held: bool):
    assert machine.has_ipc_lock(status) is held


def test_small_limits_warn():
    def told(**changes: Any) -> dict[str, Status]:
        good: dict[str, Any] = {
            "shm_bytes": 8 * 10**9,
            "memlock_bytes": -1,
            "ipc_lock": False,
            "files_max": 65536,
            "rdma": [("mlx5_0", "4: ACTIVE")],
        }
        return {each.check: each.status for each in machine.judge_system(**(good | changes))}

    assert set(told().values()) == {Status.OK}
    assert told(shm_bytes=64 << 20)["shared memory"] is Status.WARN
    assert told(files_max=1024)["open files"] is Status.WARN
    assert told(memlock_bytes=65536)["locked memory"] is Status.WARN
    assert "locked memory" not in told(memlock_bytes=65536, ipc_lock=True)
    assert told(rdma=[("mlx5_0", "1: DOWN")])["rdma"] is Status.WARN
    assert told(rdma=[])["rdma"] is Status.OK


@pytest.mark.parametrize(
    ("code", "text", "status", "said"),
    [
        ("UNAVAILABLE", "worker is loading", Status.WARN, "loading"),
        ("UNAVAILABLE", "Connection refused", Status.FAIL, "cannot be reached"),
        ("UNAVAILABLE", "Socket closed", Status.FAIL, "does it speak TLS"),
        ("FAILED_PRECONDITION", "this worker speaks 3", Status.FAIL, "speaks 3"),
        ("DEADLINE_EXCEEDED", "", Status.FAIL, "no answer"),
        ("UNIMPLEMENTED", "Method not found", Status.FAIL, "something else"),
        ("RESOURCE_EXHAUSTED", "16 sessions", Status.WARN, "16 sessions"),
    ],
)
def test_refusals_of_workers_are_told_apart(code: str, text: str, status: Status, said: str):
    greeting = network.Greeting(address="10.0.0.1:9000", code=code, text=text)
    found = network.judge_worker(greeting, is_tls=False)
    assert (found.status, said in found.found) == (status, True)


def test_a_clock_is_wrong_only_when_it_is_for_certain():
    now = time.time() // 1 + 0.5
    for seconds, expected in ((0, 0.0), (-1, -0.5), (-10, -9.5), (10, 9.5)):
        date = formatdate(now + seconds, usegmt=True)
        assert network.clock_offset(date, asked=now, answered=now) == pytest.approx(expected)
    assert network.clock_offset("yesterday", asked=now, answered=now) is None
    assert network.judge_clock("router", 0.9).status is Status.OK
    assert network.judge_clock("router", -1.1).status is Status.WARN


def store_facts(**changes: Any) -> StoreFacts:
    info = {"redis_version": "8.0", "used_memory": "1", "maxmemory": "100", "maxmemory_policy": "allkeys-lru"}
    info |= changes.pop("info", {})
    good: dict[str, Any] = {"node": "r:1", "info": info, "ping_seconds": 0.001, "offset_seconds": 0.0}
    return StoreFacts(**(good | changes))


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"info": {"maxmemory": "0"}}, Status.WARN, "no limit"),
        ({"info": {"maxmemory_policy": "noeviction"}}, Status.WARN, "noeviction"),
        ({"offset_seconds": -2.0}, Status.WARN, "2.0 s behind"),
        ({"write_error": "READONLY"}, Status.FAIL, "READONLY"),
    ],
)
def test_what_is_wrong_with_a_store(changes: dict[str, Any], status: Status, text: str):
    assert set(statuses(judge_store(store_facts()))) == {Status.OK}
    (found,) = [each for each in judge_store(store_facts(**changes)) if each.status is not Status.OK]
    assert found.status is status
    assert text in found.found


def test_what_a_probe_of_reads_tells():
    def told(answer: dict[str, object] | None) -> Status:
        return judge_transfer(answer, environment={"UCX_TLS": "tcp"})[0].status

    assert told({"kind": "nixl", "reason": "nixl, since it loads", "bytes_per_second": 1e9}) is Status.OK
    assert (
        told({"kind": "shm", "reason": "shm, since nixl is missing", "bytes_per_second": 1e9}) is Status.WARN
    )
    assert told({"kind": "shm", "reason": "shm, as configured", "bytes_per_second": 1e9}) is Status.OK
    assert told({"error": "no"}) is Status.FAIL
    assert told(None) is Status.FAIL


def rule(group: str, resources: list[str], verbs: list[str], *names: str) -> dict[str, list[str]]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs, "resourceNames": list(names)}


ROUTER = [rule("discovery.k8s.io", ["endpointslices"], ["get", "list", "watch"])]
AUTOSCALER = [
    rule("apps", ["deployments/scale"], ["get", "patch"], "r-decode"),
    rule("", ["pods"], ["get", "list"]),
    rule("", ["events"], ["create", "patch"]),
    rule("coordination.k8s.io", ["leases"], ["create"]),
    rule("coordination.k8s.io", ["leases"], ["get", "update"], "r-autoscaler"),
]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([*ROUTER, *AUTOSCALER], "all that router and autoscaler need"),
        ([rule("*", ["*"], ["*"])], "all that router and autoscaler need"),
        (
            [*ROUTER, rule("leaderworkerset.x-k8s.io", ["*/scale"], ["*"]), *AUTOSCALER[1:]],
            "all that router and",
        ),
        (ROUTER, "all that a router needs, and none of an autoscaler's"),
    ],
)
def test_rights_are_enough_for_who_has_them(rules: list[dict[str, list[str]]], told: str):
    (found,) = cluster.judge_rights(rules, is_complete=True)
    assert found.status is Status.OK
    assert told in found.found


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([], "list endpointslices (router)"),
        (AUTOSCALER, "watch endpointslices (router)"),
        ([*ROUTER, *AUTOSCALER[1:]], "patch deployments/scale (autoscaler, one of them)"),
        ([*ROUTER, *AUTOSCALER[:-1]], "update leases (autoscaler)"),
        ([*ROUTER, rule("apps", ["deployments"], ["*"]), *AUTOSCALER[1:]], "patch deployments/scale"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_rights_that_are_missing_are_named(rules: list[dict[str, list[str]]], told: str, is_complete: bool):
    (found,) = cluster.judge_rights(rules, is_complete=is_complete)
    assert found.status is Status.WARN
    assert told in found.found
    assert found.found.startswith("this account may not" if is_complete else "not told of")


def test_a_pod_without_a_token_has_no_cluster_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    token = tmp_path / "token"
    assert "not in a pod" in cluster.why_left_out(token)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert "without a token" in cluster.why_left_out(token)
    token.write_text("t")
    assert cluster.why_left_out(token) == ""


async def test_a_check_that_hangs_or_fails_does_not_touch_the_others():
    async def good() -> list[Finding]:
        return [ok("good", "fine")]

    async def hanging() -> list[Finding]:
        return await in_thread(lambda: time.sleep(20) or [])

    async def bad() -> list[Finding]:
        raise OSError("broken")

    checks = [
        Check(name="hanging", look=hanging, seconds_max=0.05),
        Check(name="good", look=good),
        Check(name="bad", look=bad),
    ]
    async with asyncio.timeout(10):
        found = await run_checks(checks)
    assert [(each.check, each.status) for each in found] == [
        ("hanging", Status.FAIL),
        ("good", Status.OK),
        ("bad", Status.FAIL),
    ]
    assert "broken" in found[2].found


def test_text_and_json_say_the_same():
    findings = [ok("a", "fine"), fail("b", "broken", "mend it")]
    text = as_text(findings)
    assert "-> mend it" in text
    assert text.endswith("1 ok, 0 warn, 1 fail")
    assert [each["status"] for each in json.loads(as_json(findings))] == ["ok", "fail"]
