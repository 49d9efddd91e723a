"""Real Helm 4 and Helm 3 install, upgrade, roll back and remove a tiny chart of two pods in a stand-in API server."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME, is_ready
from tests.harness.cluster_tools import tool
from tests.harness.helm import Tool, page, until

pytestmark = pytest.mark.slow
CHART = str(Path(__file__).with_name("tiny_chart"))
POD, SERVICE, SECRET, SLICE = (BY_NAME[name] for name in ("Pod", "Service", "Secret", "EndpointSlice"))
BOTH = pytest.mark.parametrize("version", ["helm4", pytest.param("helm3", marks=pytest.mark.minutes)])
# Whoever asks too early or too late is refused: these servers take a while to begin, and end at once when they are
# asked to, a while after the proxy has heard of it.
SERVE = "sleep 0.5; exec python3 -m http.server --bind $(POD_IP) --directory /pages 8080"
SLOW = ("--set", "drain=1", "--set-json", f"command={json.dumps(['sh', '-c', SERVE])}")


def make_helm(version: str, cluster: StandIn, home: Path) -> Tool:
    return Tool(tool(version), kubeconfig=cluster.kubeconfig, home=home)


def pods(cluster: StandIn) -> list[dict]:
    return cluster.objects.all(POD, "default")


def url(cluster: StandIn, name: str = "pages") -> str:
    return f"http://{cluster.objects.get(SERVICE, 'default', name)['spec']['clusterIP']}:8000/"


@BOTH
async def test_a_release_is_installed_upgraded_rolled_back_and_removed(version, tmp_path):
    async with StandIn() as cluster:
        helm = make_helm(version, cluster, tmp_path)
        await helm("install", "pages", CHART, "--wait", "--timeout", "40s")
        assert [is_ready(pod) for pod in pods(cluster)] == [True, True], "--wait came back too early"
        assert await page(url(cluster)) == "one"
        first = {pod["metadata"]["name"] for pod in pods(cluster)}

        await helm("upgrade", "pages", CHART, "--set", "text=two", "--wait", "--timeout", "40s")
        await until(lambda: len(pods(cluster)) == 2, what="the old pods are gone")
        assert not first & {pod["metadata"]["name"] for pod in pods(cluster)}, "no new pods"
        assert await page(url(cluster)) == "two"

        await helm("rollback", "pages", "1", "--wait", "--timeout", "40s")
        await until(lambda: len(pods(cluster)) == 2, what="the upgrade's pods are gone")
        assert await page(url(cluster)) == "one"
        assert "superseded" in await helm("history", "pages")

        processes = cluster.kubelet.num_pods
        assert processes == 2
        await helm("uninstall", "pages", "--wait", "--timeout", "40s")
        await until(lambda: cluster.kubelet.num_pods == 0, what="the pods' processes have ended")
        assert cluster.objects.all(SERVICE, "default") == []
        assert cluster.objects.all(SLICE, "default") == []
        assert cluster.objects.all(SECRET, "default") == []


@BOTH
async def test_a_roll_never_leaves_a_service_without_an_answer(version, tmp_path):
    async with StandIn() as cluster:
        helm = make_helm(version, cluster, tmp_path)
        await helm("install", "pages", CHART, *SLOW, "--wait", "--timeout", "40s")
        answers: list[str] = []

        async def ask() -> None:
            while True:
                answers.append(await page(url(cluster)))
                await asyncio.sleep(0.01)

        asking = asyncio.create_task(ask())
        await helm("upgrade", "pages", CHART, *SLOW, "--set", "text=two", "--wait", "--timeout", "40s")
        await until(lambda: len(pods(cluster)) == 2, what="the old pods are gone")
        asking.cancel()
        assert {*answers} == {"one", "two"}, f"{answers.count('')} of {len(answers)} without an answer"
        assert answers[-1] == "two"


@BOTH
async def test_an_install_whose_pods_never_get_ready_fails_in_its_time(version, tmp_path):
    async with StandIn() as cluster:
        helm = make_helm(version, cluster, tmp_path)
        cluster.kubelet.missing_images.add("tiny:1")
        done = await helm.may_fail("install", "pages", CHART, "--wait", "--timeout", "3s")
        assert done.status != 0
        assert "failed" in (await helm.may_fail("status", "pages")).output
        states = [pod["status"]["containerStatuses"][0]["state"] for pod in pods(cluster)]
        assert [state["waiting"]["reason"] for state in states] == ["ImagePullBackOff"] * 2


@BOTH
async def test_a_chart_with_a_field_that_kubernetes_does_not_know_is_refused(version, tmp_path):
    chart = tmp_path / "wrong"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("{apiVersion: v2, name: wrong, version: 0.1.0}", encoding="utf-8")
    (chart / "templates" / "service.yaml").write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: wrong}, spec: {prots: [{port: 80}]}}",
        encoding="utf-8",
    )
    async with StandIn() as cluster:
        helm = make_helm(version, cluster, tmp_path)
        done = await helm.may_fail("install", "wrong", str(chart))
        assert done.status != 0
        assert "prots" in done.errors
        assert cluster.objects.all(SERVICE, "default") == []


@BOTH
@pytest.mark.parametrize(("status", "said"), [(0, "Succeeded"), (3, "Failed")])
async def test_a_charts_test_pod_runs_to_its_end_and_is_believed(version, status, said, tmp_path):
    async with StandIn() as cluster:
        helm = make_helm(version, cluster, tmp_path)
        await helm("install", "pages", CHART, "--set", f"replicas=0,testStatus={status}")
        done = await helm.may_fail("test", "pages", "--timeout", "30s")
        assert said in done.output
        assert (done.status == 0) == (status == 0)
