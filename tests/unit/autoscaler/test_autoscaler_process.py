"""The process: a dry run for a person, a policy that changes under it, two of them on one API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes.aio import config
from kubernetes.aio.config import kube_config

from autoscaler.election import Election, Elector
from rorqual.clock import SystemClock
from rorqual.cluster_api import ClusterApi
from tests.cluster.stand_in.cluster import StandIn

pytestmark = pytest.mark.slow

SECONDS_MAX = 40.0
POLICY = """
version: 1
interval_seconds: 1
objectives: {ttft: {percentile: 90, seconds: 2}, itl: {percentile: 90, seconds: 0.1}}
pools:
  decode: {role: decode, replicas: {min: 1, max: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "workers.json").write_text(
        json.dumps({"workers": [], "pools": {"decode": {"wanted": 0, "starting_seconds": []}}})
    )
    return tmp_path


def command(folder: Path, *options: str) -> list[str]:
    given = ["--policy", str(folder / "policy.yaml"), "--target", "local", "--local-folder", str(folder)]
    return [sys.executable, "-m", "rorqual.cli", "autoscaler", *given, *options]


@pytest.mark.minutes  # it waits
def test_a_dry_run_once_prints_the_decision_and_sets_nothing(folder: Path) -> None:
    done = subprocess.run(
        command(folder, "--once", "--dry-run"),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "decode: 0 wanted, 0 ready" in done.stdout
    assert "decode 0 -> 1: the limits of the policy" in done.stdout
    assert done.stderr.count("would set replicas") == 1
    assert "0 prompts" in done.stdout
    assert not (folder / "wanted.json").exists()


def test_a_policy_that_cannot_be_used_ends_it_with_one_line(folder: Path) -> None:
    (folder / "policy.yaml").write_text(POLICY.replace("objectives", "objektives"))
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 1
    assert "did you mean objectives" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_acts_tells_and_takes_a_changed_policy(folder: Path) -> None:
    ready, log = folder / "ready.json", folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command(folder, "--ready-file", str(ready)), stderr=file)
    try:
        until(ready.exists)
        url = json.loads(ready.read_text())["metrics"].removesuffix("/metrics")
        until((folder / "wanted.json").exists)
        assert json.loads((folder / "wanted.json").read_text()) == {"replicas": {"decode": 1}}
        until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert httpx.get(f"{url}/health").status_code == 200
        most = 'rorqual_autoscaler_replicas_max{pool="decode"}'
        assert f"{most} 2.0" in httpx.get(f"{url}/metrics").text
        replace_policy(folder, POLICY.replace("max: 2", "max: many"))
        until(lambda: "kept the policy in force" in log.read_text())
        replace_policy(folder, POLICY.replace("min: 1", "min: 2").replace("max: 2", "max: 3"))
        until(lambda: "decode 1 -> 2" in log.read_text())
        metrics = httpx.get(f"{url}/metrics").text
        for line in (
            "rorqual_autoscaler_reload_failures_total 1.0",
            "rorqual_autoscaler_reloads_total 1.0",
            'rorqual_autoscaler_decisions_total{direction="up",pool="decode"} 2.0',
            "rorqual_autoscaler_leader 1.0",
            f"{most} 3.0",
        ):
            assert line in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS_MAX) == 0
        assert not ready.exists()
    finally:
        process.kill()
        process.wait()


def replace_policy(folder: Path, text: str) -> None:
    """At once, as a mounted ConfigMap changes: half a file is the matter of test_policy_file."""
    (folder / "new.yaml").write_text(text)
    (folder / "new.yaml").replace(folder / "policy.yaml")


def until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def test_of_two_on_one_api_server_one_leads_and_the_other_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    clock = SystemClock()
    async with StandIn() as stand_in:
        # The official client reads KUBECONFIG when it is imported.
        for module in (kube_config, config):
            monkeypatch.setattr(
                module, "KUBE_CONFIG_DEFAULT_LOCATION", str(stand_in.kubeconfig), raising=False
            )
        api = await ClusterApi.connect(call_seconds_max=0.5)
        failures: list[str] = []
        electors = [
            Elector(
                Election(name="lease", identity=name, duration_seconds=2.0),
                api,
                clock=clock,
                on_failure=failures.append,
            )
            for name in ("one", "two")
        ]
        tasks = [asyncio.create_task(elector.run()) for elector in electors]

        def leaders() -> list[str]:
            found = [item.election.identity for item in electors if item.election.leads(clock.monotonic())]
            assert len(found) <= 1
            return found

        async def until_led_by(*wanted: str) -> None:
            async with asyncio.timeout(20):
                while leaders() != list(wanted):
                    await asyncio.sleep(0.01)

        try:
            async with asyncio.timeout(20):
                while not leaders():
                    await asyncio.sleep(0.01)
            (first,) = leaders()
            second = "two" if first == "one" else "one"
            stand_in.faults.down = True
            await until_led_by()  # nobody acts without the server
            assert failures
            stand_in.faults.down = False
            async with asyncio.timeout(20):
                while not leaders():
                    await asyncio.sleep(0.01)
            (first,) = leaders()
            second = "two" if first == "one" else "one"
            # The one that leads stops without a word, as in a long pause: the other follows.
            number = 0 if first == "one" else 1
            tasks[number].cancel()
            await until_led_by(second)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
            await api.close()
