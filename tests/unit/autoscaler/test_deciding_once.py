"""`rorqual autoscaler --once` that sets replicas: what it leaves behind, and what hinders it, said in one line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autoscaler.options import AutoscalerOptions
from autoscaler.process import serve
from rorqual.errors import RorqualError
from tests.harness.observed import Worker
from tests.harness.scaled import RULES, World, a_world

pytestmark = pytest.mark.slow

LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
POLICY = """
version: 1
interval_seconds: 1
objectives: {{ttft: {{percentile: 90, seconds: 2}}, itl: {{percentile: 90, seconds: 0.1}}}}
pools:
  both: {{role: both, replicas: {{min: 2, max: 3}}{more}}}
"""


@asynccontextmanager
async def a_worker() -> AsyncIterator[str]:
    worker = Worker()
    try:
        yield await worker.start()
    finally:
        await worker.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    status: int
    output: str
    errors: str

    @property
    def last_word(self) -> str:
        """What a person is told; log lines begin with their time."""
        assert "Traceback" not in self.errors, self.errors
        (line,) = [line for line in self.errors.splitlines() if line.startswith("rorqual autoscaler: ")]
        return line


async def ran(*options: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rorqual.cli", "autoscaler", "--once", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ran(status=process.returncode, output=output.decode(), errors=errors.decode())


# --- on one machine


@asynccontextmanager
async def a_folder(folder: Path) -> AsyncIterator[list[str]]:
    """The options with which one worker is seen of a pool that is to have two."""
    async with a_worker() as address:
        (folder / "policy.yaml").write_text(POLICY.format(more=""))
        workers = [{"address": address, "pool": "both"}]
        pools = {"both": {"wanted": 1, "starting_seconds": []}}
        (folder / "workers.json").write_text(json.dumps({"workers": workers, "pools": pools}))
        (folder / "routers.json").write_text(json.dumps({"workers": []}))
        policy = ["--policy", str(folder / "policy.yaml")]
        yield [*policy, "--target", "local", "--local-folder", str(folder)]


async def test_on_one_machine_what_was_decided_is_wanted(tmp_path: Path) -> None:
    async with a_folder(tmp_path) as options:
        done = await ran(*options)
        assert done.status == 0, done.errors
        assert json.loads((tmp_path / "wanted.json").read_text()) == {"replicas": {"both": 2}}
        assert "both: 1 wanted, 1 ready, 0 starting" in done.output
        assert "both 1 -> 2: the limits of the policy" in done.output
        assert done.errors.count("set replicas") == 1
        again = await ran(*options)
        assert again.status == 0, again.errors
        assert "stays at 2" in again.output
        assert json.loads((tmp_path / "wanted.json").read_text()) == {"replicas": {"both": 2}}


async def test_on_one_machine_what_cannot_be_set_is_a_failure(tmp_path: Path) -> None:
    async with a_folder(tmp_path) as options:
        (tmp_path / "wanted.json.partial").mkdir()
        done = await ran(*options)
        assert done.status == 1
        assert "both 1 -> 2" in done.output
        assert "replicas were not set: both: " in done.last_word
        assert "wanted.json cannot be written" in done.last_word
        assert not (tmp_path / "wanted.json").exists()


async def test_on_one_machine_what_cannot_be_read_is_a_failure_at_once(tmp_path: Path) -> None:
    async with a_folder(tmp_path) as options:
        (tmp_path / "wanted.json").write_text("[")
        done = await ran(*options)
        assert done.status == 1
        assert "nothing was decided: " in done.last_word
        assert "wanted.json is not JSON" in done.last_word


# --- on Kubernetes


@asynccontextmanager
async def a_cluster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, rules: Any = RULES
) -> AsyncIterator[tuple[World, list[str]]]:
    """The Deployment "decode" has one replica, and is to have two."""
    async with a_world(monkeypatch, "sleep", "60", rules=rules) as world, a_worker() as address:
        more = f", target: {{kind: Deployment, name: decode}}, workers: 'static:{address}'"
        (folder / "policy.yaml").write_text(POLICY.format(more=more))
        await world.until(lambda reading: not reading.starting_seconds)
        yield world, ["--policy", str(folder / "policy.yaml"), "--lease", "scaler"]


async def the_lease(world: World) -> dict[str, Any]:
    return (await world.admin.get(f"{LEASES}/scaler"))["spec"]


async def changes_told(world: World) -> list[dict[str, Any]]:
    return [event for event in await world.events() if event["reason"] in ("ScaledUp", "ScaledDown")]


def a_lease(holder: str, *, seconds: int) -> dict[str, Any]:
    spec = {"holderIdentity": holder, "leaseDurationSeconds": seconds, "leaseTransitions": 0}
    metadata = {"name": "scaler"}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


async def keep_renewing(world: World, holder: str) -> None:
    """As an autoscaler that leads."""
    await world.admin.create(LEASES, a_lease(holder, seconds=15))
    number = 0
    while True:
        number += 1
        stamp = f"2026-01-01T00:00:{number:02}.000000Z"
        await world.admin.merge_patch(f"{LEASES}/scaler", {"spec": {"renewTime": stamp}})
        await asyncio.sleep(1.0)


async def test_replicas_are_set_an_event_tells_of_it_and_the_lease_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_cluster(tmp_path, monkeypatch) as (world, options):
        done = await ran(*options)
        assert done.status == 0, done.errors
        assert "both: 1 wanted, 1 ready, 0 starting" in done.output
        assert "both 1 -> 2: the limits of the policy" in done.output
        assert await world.replicas() == 2
        (event,) = await changes_told(world)
        assert event["type"] == "Normal"
        assert event["message"] == "both 1 -> 2: the limits of the policy"
        assert event["involvedObject"]["name"] == "decode"
        lease = await the_lease(world)
        assert (lease["holderIdentity"], lease["leaseTransitions"]) == ("", 0)
        # The next one need not wait, and finds nothing to do.
        began = time.monotonic()
        again = await ran(*options)
        assert again.status == 0, again.errors
        assert time.monotonic() - began < 10
        assert await world.replicas() == 2
        assert len(await changes_told(world)) == 1
        assert (await the_lease(world))["leaseTransitions"] == 1


@pytest.mark.minutes  # it waits
async def test_while_another_one_leads_nothing_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_cluster(tmp_path, monkeypatch) as (world, options):
        leading = asyncio.create_task(keep_renewing(world, "another-one"))
        try:
            done = await ran(*options)
            assert not leading.done()
        finally:
            leading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leading
        assert done.status == 1
        assert done.last_word.endswith(
            "nothing was decided: another-one leads, which decides; --dry-run needs no lead"
        )
        assert done.output == ""
        assert await world.replicas() == 1
        assert await world.events() == []
        lease = await the_lease(world)
        assert (lease["holderIdentity"], lease["leaseDurationSeconds"]) == ("another-one", 15)


@pytest.mark.minutes  # it waits
async def test_the_lease_of_one_that_is_gone_is_waited_for_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_cluster(tmp_path, monkeypatch) as (world, options):
        await world.admin.create(LEASES, a_lease("gone", seconds=2))
        done = await ran(*options)
        assert done.status == 0, done.errors
        assert await world.replicas() == 2
        lease = await the_lease(world)
        assert (lease["holderIdentity"], lease["leaseTransitions"]) == ("", 1)


async def test_a_write_that_fails_is_a_failure_and_the_lease_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_cluster(tmp_path, monkeypatch) as (world, options):
        world.stand_in.faults.conflicts["decode/scale"] = 100
        done = await ran(*options)
        assert done.status == 1
        assert "both 1 -> 2" in done.output
        assert "replicas were not set: both: " in done.last_word
        assert "changed 4 times" in done.last_word
        assert await world.replicas() == 1
        assert (await the_lease(world))["holderIdentity"] == ""


class FastClock:
    """Twenty seconds in one, so that whoever waits by it gives up soon."""

    def monotonic(self) -> float:
        return 20 * time.monotonic()

    def wall(self) -> float:
        return time.time()


@pytest.mark.parametrize(
    ("is_down", "rules", "why"),
    [
        (True, RULES, "GET /apis/coordination.k8s.io/"),
        (False, RULES[:-1], "the right to get leases of coordination.k8s.io in namespace default is missing"),
    ],
)
async def test_what_hinders_it_from_leading_is_not_taken_for_another_one_that_leads(
    is_down: bool, rules: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_cluster(tmp_path, monkeypatch, rules=list(rules)) as (world, _):
        world.stand_in.faults.down = is_down
        options = AutoscalerOptions(policy=tmp_path / "policy.yaml", lease="scaler", once=True)
        with pytest.raises(RorqualError) as told:
            await serve(options, clock=FastClock())
        world.stand_in.faults.down = False
        assert f"nothing was decided: failed to take the lease: {why}" in str(told.value)
        assert "leads" not in str(told.value)
        assert await world.replicas() == 1
