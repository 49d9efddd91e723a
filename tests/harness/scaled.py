"""A Deployment in the stand-in API server, and an autoscaler's service account with exactly the rights that it says it
needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from autoscaler.setup import PoolSetup
from autoscaler.targets.contract import PoolReading
from autoscaler.targets.kubernetes import KubernetesTarget
from rorqual.clock import ManualClock
from rorqual.cluster_api import ClusterApi
from rorqual.session import Role
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.kinds import LEADER_WORKER_SET

DEPLOYMENT = "/apis/apps/v1/namespaces/default/deployments/decode"
RULES: list[dict[str, Any]] = [
    {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "patch"]},
    {
        "apiGroups": ["leaderworkerset.x-k8s.io"],
        "resources": ["leaderworkersets/scale"],
        "verbs": ["get", "patch"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
]


def a_deployment(name: str, *command: str, replicas: int) -> dict[str, Any]:
    labels = {"app": name}
    container = {"name": "main", "image": "none", "command": list(command)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


class World:
    def __init__(self, stand_in: StandIn, admin: ClusterApi, target: KubernetesTarget) -> None:
        self.stand_in = stand_in
        self.admin = admin
        self.target = target
        self.clock = ManualClock(1000.0)

    async def replicas(self) -> int:
        return (await self.admin.get(f"{DEPLOYMENT}/scale"))["spec"]["replicas"]

    async def events(self) -> list[dict[str, Any]]:
        return (await self.admin.get("/api/v1/namespaces/default/events"))["items"]

    async def until(self, condition: Any) -> PoolReading:
        async with asyncio.timeout(20):
            while not condition(reading := (await self.target.read())["decode"]):
                await asyncio.sleep(0.05)
        return reading


@asynccontextmanager
async def a_world(
    monkeypatch: pytest.MonkeyPatch, *command: str, replicas: int = 1, rules: Any = RULES
) -> AsyncIterator[World]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with StandIn(kinds=(LEADER_WORKER_SET,)) as stand_in:
        monkeypatch.setenv("KUBECONFIG", str(stand_in.kubeconfig))
        admin = await ClusterApi.connect()
        rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
        names = {"metadata": {"name": "scaler", "namespace": "default"}}
        api_version = "rbac.authorization.k8s.io/v1"
        await admin.create(
            f"{rbac}/roles", {"apiVersion": api_version, "kind": "Role", **names, "rules": rules}
        )
        await admin.create(
            "/api/v1/namespaces/default/serviceaccounts",
            {"apiVersion": "v1", "kind": "ServiceAccount", **names},
        )
        await admin.create(
            f"{rbac}/rolebindings",
            {
                "apiVersion": api_version,
                "kind": "RoleBinding",
                **names,
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "scaler"},
                "subjects": [{"kind": "ServiceAccount", "name": "scaler", "namespace": "default"}],
            },
        )
        await admin.create(DEPLOYMENT.rpartition("/")[0], a_deployment("decode", *command, replicas=replicas))
        token = stand_in.server.rights.token_of("default", "scaler")
        stand_in.kubeconfig.write_text(stand_in.server.kubeconfig(token=token))
        api = await ClusterApi.connect(call_seconds_max=3.0)
        pool = PoolSetup(
            name="decode", role=Role.DECODE, workers=None, kind="Deployment", target_name="decode"
        )
        clock = ManualClock(1000.0)
        world = World(stand_in, admin, KubernetesTarget(api, [pool], clock=clock, instance="me"))
        world.clock = clock
        try:
            yield world
            assert stand_in.server.rights.refusals == [] or rules is not RULES
        finally:
            await api.close()
            await admin.close()
