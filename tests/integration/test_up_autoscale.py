"""`rorqual up --autoscale` with real workers, router, ranks and autoscaler: load brings workers, silence takes them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

SECONDS_MAX = 120.0
LOAD_SECONDS_MIN = 40.0
POLICY = """
version: 1
interval_seconds: 1
objectives:
  ttft: {percentile: 90, seconds: 30}
  itl: {percentile: 90, seconds: 5}
survive_losses: 0
pools:
  prefill:
    role: prefill
    replicas: {min: 1, max: 1}
    start_seconds: 5
  decode:
    role: decode
    replicas: {min: 1, max: 2}
    start_seconds: 5
    stabilisation: {up_seconds: 0, down_seconds: 3}
"""
"""Sequences beyond the slots of one decode worker need two of them, whatever the machine's speed."""


class Cluster:
    def __init__(self, process: subprocess.Popen[bytes], ready: dict[str, Any], output: Path) -> None:
        self.process = process
        self.http: str = ready["http"]
        self._output = output

    @property
    def said(self) -> str:
        return self._output.read_text()

    def metric(self, name: str) -> float:
        """Of the router; 0 where it is not there yet."""
        text = httpx.get(f"{self.http}/metrics", timeout=10).text
        found = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(found[0].split()[1]) if found else 0.0

    def descendants(self) -> list[int]:
        return sorted(_descendants(self.process.pid))


def _descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from _descendants(child)


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@contextmanager
def a_cluster(model: Path, folder: Path, policy: str, *options: str) -> Iterator[Cluster]:
    (folder / "policy.yaml").write_text(policy)
    ready, output = folder / "ready.json", folder / "output"
    command = [sys.executable, "-m", "rorqual.cli", "up", "--model", str(model), "--http", "0", "--grpc", "0"]
    command += ["--autoscale", str(folder / "policy.yaml"), "--ready-file", str(ready), "--threads", "1"]
    command += ["--redis", "none", *options]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(ready.exists, process, output)
        yield Cluster(process, json.loads(ready.read_text()), output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.1)


async def generate(client: httpx.AsyncClient, until: Callable[[], bool], seed: int) -> list[int]:
    """Completions one after the other; their statuses."""
    statuses: list[int] = []
    while not until():
        body = {"model": "whale", "prompt": [(seed * 7 + n) % 500 for n in range(20)], "max_tokens": 200}
        reply = await client.post("/v1/completions", json={**body, "ignore_eos": True})
        statuses.append(reply.status_code)
        if reply.status_code == 200:
            assert reply.json()["usage"]["completion_tokens"] == 200
    return statuses


async def test_load_brings_a_decode_worker_and_silence_takes_it_away(ids_model: Path, tmp_path: Path) -> None:
    with a_cluster(ids_model, tmp_path, POLICY, "--slots", "4") as cluster:
        assert cluster.metric("rorqual_router_workers_connected") == 2
        # So long that its end is not taken for noise.
        begin, deadline = time.monotonic(), time.monotonic() + SECONDS_MAX
        state = {"grown": False}

        async def watch(client: httpx.AsyncClient) -> None:
            while time.monotonic() < deadline:
                text = (await client.get("/metrics")).text
                if (
                    "\nrorqual_router_workers_connected 3.0" in text
                    and time.monotonic() - begin > LOAD_SECONDS_MIN
                ):
                    break
                await asyncio.sleep(0.2)
            state["grown"] = True

        async with httpx.AsyncClient(base_url=cluster.http, timeout=SECONDS_MAX) as client:
            loads = [generate(client, lambda: state["grown"], seed) for seed in range(10)]
            _, *statuses = await asyncio.gather(watch(client), *loads)
        assert {status for found in statuses for status in found} == {200}, cluster.said[-6000:]
        assert "started decode-1: 2 decode workers are wanted" in cluster.said, cluster.said[-6000:]
        wait_until(
            lambda: cluster.metric("rorqual_router_workers_connected") == 2,
            cluster.process,
            tmp_path / "output",
        )
        assert "asked decode-1 to go: 1 decode workers are wanted" in cluster.said
        pids = cluster.descendants()
        assert len(pids) >= 5
    assert cluster.process.returncode == 0, cluster.said[-3000:]
    assert [pid for pid in pids if is_there(pid)] == []
