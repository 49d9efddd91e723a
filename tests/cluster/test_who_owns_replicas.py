"""An autoscaler scales, then somebody upgrades the release: whose number of replicas it is."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rorqual.cluster_api import ClusterApi
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import DEPLOYMENT
from tests.harness.cluster_tools import tool
from tests.harness.helm import Tool

pytestmark = pytest.mark.slow
CHART = str(Path(__file__).with_name("tiny_chart"))
SCALE = "/apis/apps/v1/namespaces/default/deployments/pages/scale"
MISSING_IMAGE = "none"


@contextlib.asynccontextmanager
async def installed(
    version: str, replicas: int, monkeypatch: pytest.MonkeyPatch, home: Path
) -> AsyncIterator[tuple[StandIn, Tool, ClusterApi]]:
    """No pods are started, since nobody has their image."""
    async with StandIn() as cluster:
        cluster.kubelet.missing_images.add(MISSING_IMAGE)
        helm = Tool(tool(version), kubeconfig=cluster.kubeconfig, home=home)
        await helm("install", "pages", CHART, *settings(replicas))
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        api = await ClusterApi.connect(call_seconds_max=5.0)
        try:
            yield cluster, helm, api
        finally:
            await api.close()


def settings(replicas: int, **more: str) -> list[str]:
    values = {"replicas": str(replicas), "image": MISSING_IMAGE, **more}
    return ["--set", ",".join(f"{name}={value}" for name, value in values.items())]


def replicas_of(cluster: StandIn) -> int:
    return cluster.objects.get(DEPLOYMENT, "default", "pages")["spec"]["replicas"]


@pytest.mark.parametrize("version", ["helm4", "helm3"])
async def test_a_chart_that_leaves_replicas_out_leaves_them_alone(version, monkeypatch, tmp_path):
    async with installed(version, -1, monkeypatch, tmp_path) as (cluster, helm, api):
        assert replicas_of(cluster) == 1, "the default"
        await api.merge_patch(SCALE, {"spec": {"replicas": 5}})
        await helm("upgrade", "pages", CHART, *settings(-1, text="two"))
        assert replicas_of(cluster) == 5
        await helm("rollback", "pages", "1")
        assert replicas_of(cluster) == 5


async def test_helm_4_is_refused_replicas_that_somebody_else_has_set(monkeypatch, tmp_path):
    async with installed("helm4", 2, monkeypatch, tmp_path) as (cluster, helm, api):
        await api.merge_patch(SCALE, {"spec": {"replicas": 5}})
        done = await helm.may_fail("upgrade", "pages", CHART, *settings(2, text="two"))
        assert done.status != 0
        assert 'conflict with "rorqual": .spec.replicas' in done.errors
        assert replicas_of(cluster) == 5
        await helm("upgrade", "pages", CHART, *settings(5, text="two"))
        assert replicas_of(cluster) == 5
        await helm("upgrade", "pages", CHART, "--force-conflicts", *settings(3, text="two"))
        assert replicas_of(cluster) == 3


async def test_helm_3_takes_replicas_back_only_where_the_chart_changes_them(monkeypatch, tmp_path):
    async with installed("helm3", 2, monkeypatch, tmp_path) as (cluster, helm, api):
        await api.merge_patch(SCALE, {"spec": {"replicas": 5}})
        await helm("upgrade", "pages", CHART, *settings(2, text="two"))
        assert replicas_of(cluster) == 2


@pytest.mark.parametrize("is_scaled", [False, True])
async def test_replicas_that_are_left_out_later_stay_with_whoever_else_has_set_them(
    is_scaled, monkeypatch, tmp_path
):
    async with installed("helm4", 3, monkeypatch, tmp_path) as (cluster, helm, api):
        if is_scaled:
            await api.merge_patch(SCALE, {"spec": {"replicas": 5}})
        await helm("upgrade", "pages", CHART, *settings(-1, text="two"))
        assert replicas_of(cluster) == (5 if is_scaled else 1)
