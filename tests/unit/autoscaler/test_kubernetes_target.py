"""The Kubernetes target against the stand-in API server, with exactly the rights that it says it needs."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.setup import PoolSetup
from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, TargetUnreachable
from autoscaler.targets.kubernetes import KubernetesTarget
from rorqual.session import Role
from tests.harness.scaled import DEPLOYMENT, RULES, a_world

pytestmark = pytest.mark.slow


async def test_replicas_are_read_and_set_and_pods_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        reading = await world.until(lambda reading: not reading.starting_seconds)
        assert reading == PoolReading(replicas=1)
        await world.target.set_replicas("decode", before=1, after=3)
        assert await world.replicas() == 3
        assert (await world.target.read())["decode"].replicas == 3
        await world.until(lambda reading: not reading.starting_seconds)
        await world.target.set_replicas("decode", before=3, after=0)
        assert await world.until(lambda reading: reading.replicas == 0) == PoolReading(replicas=0)


async def test_what_a_person_has_set_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        await world.admin.merge_patch(DEPLOYMENT, {"spec": {"replicas": 5}})
        with pytest.raises(SetBySomebodyElse, match="has 5 replicas"):
            await world.target.set_replicas("decode", before=1, after=3)
        assert await world.replicas() == 5


async def test_an_edit_between_reading_and_writing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        api = world.target._api  # type: ignore[attr-defined]
        real = api.get

        async def get(path: str, **more: Any) -> Any:
            found = await real(path, **more)
            if path.endswith("/scale") and found["spec"]["replicas"] == 1:
                await world.admin.merge_patch(DEPLOYMENT, {"spec": {"replicas": 4}})
            return found

        api.get = get
        with pytest.raises(SetBySomebodyElse):
            await world.target.set_replicas("decode", before=1, after=3)
        assert await world.replicas() == 4


async def test_a_conflict_over_something_else_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        world.stand_in.faults.conflicts["decode/scale"] = 2
        await world.target.set_replicas("decode", before=1, after=2)
        assert await world.replicas() == 2
        world.stand_in.faults.conflicts["decode/scale"] = 100
        with pytest.raises(TargetUnreachable, match="changed 4 times"):
            await world.target.set_replicas("decode", before=2, after=3)


async def test_a_server_that_is_down_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        world.stand_in.faults.down = True
        with pytest.raises(TargetUnreachable):
            await world.target.read()
        with pytest.raises(TargetUnreachable):
            await world.target.set_replicas("decode", before=1, after=2)
        await world.target.tell("decode", reason="ScaledUp", text="never raises")
        world.stand_in.faults.down = False
        assert (await world.target.read())["decode"].replicas == 1


async def test_a_missing_right_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60", rules=RULES[2:]) as world:
        with pytest.raises(TargetUnreachable, match="get, patch deployments/scale"):
            await world.target.read()


async def test_a_pool_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "false") as world:
        reading = await world.until(lambda reading: reading.problem)
        assert "CrashLoopBackOff" in reading.problem
        assert len(reading.starting_seconds) == 1


async def test_events_are_on_the_target_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        await world.target.read()
        await world.target.tell("decode", reason="ScaledUp", text="1 -> 2")
        world.clock.advance(61)
        await world.target.tell("decode", reason="ScaledUp", text="1 -> 2")
        (event,) = await world.events()
        assert (event["reason"], event["message"], event["count"]) == ("ScaledUp", "1 -> 2", 2)
        involved = event["involvedObject"]
        assert (involved["kind"], involved["name"]) == ("Deployment", "decode")
        deployment = await world.admin.get(DEPLOYMENT)
        assert involved["uid"] == deployment["metadata"]["uid"]
        for number in range(50):
            await world.target.tell("decode", reason="ScaledUp", text=f"{number} -> {number + 1}")
            world.clock.advance(0.1)
        assert len(await world.events()) <= 11


async def test_a_leader_worker_set_is_scaled_by_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_world(monkeypatch, "sleep", "60") as world:
        sets = "/apis/leaderworkerset.x-k8s.io/v1/namespaces/default/leaderworkersets"
        template = {"metadata": {"labels": {"app": "wide"}}, "spec": {"containers": []}}
        await world.admin.create(
            sets,
            {
                "apiVersion": "leaderworkerset.x-k8s.io/v1",
                "kind": "LeaderWorkerSet",
                "metadata": {"name": "wide", "namespace": "default"},
                "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 2, "workerTemplate": template}},
            },
        )
        pool = PoolSetup(
            name="wide", role=Role.DECODE, workers=None, kind="LeaderWorkerSet", target_name="wide"
        )
        api = world.target._api  # type: ignore[attr-defined]
        target = KubernetesTarget(api, [pool], clock=world.clock, instance="me")
        assert (await target.read())["wide"].replicas == 1
        await target.set_replicas("wide", before=1, after=3)
        assert (await world.admin.get(f"{sets}/wide"))["spec"]["replicas"] == 3
        await target.tell("wide", reason="ScaledUp", text="1 -> 3")
        (event,) = await world.events()
        assert event["involvedObject"]["kind"] == "LeaderWorkerSet"
