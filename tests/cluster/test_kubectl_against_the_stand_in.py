"""Real kubectl scales, rolls, watches and deletes in a stand-in API server what somebody would."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME, is_ready
from tests.harness.cluster_tools import tool
from tests.harness.helm import Tool, page, until, until_async

pytestmark = pytest.mark.slow
POD, SERVICE, DEPLOYMENT = BY_NAME["Pod"], BY_NAME["Service"], BY_NAME["Deployment"]
LABELS = {"app": "pages"}


def manifest(*, replicas: int = 1, text: str = "one", maximum: int = 1) -> dict:
    script = "echo $TEXT > index.html; echo serving $TEXT; exec python3 -m http.server --bind $POD_IP 8080"
    container = {
        "name": "pages",
        "image": "pages:1",
        "workingDir": "/",
        "command": ["sh", "-c", f"cd $(PLACE); {script}"],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "TEXT", "value": text},
            {"name": "PLACE", "value": "/place"},
        ],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
        "volumeMounts": [{"name": "place", "mountPath": "/place"}],
    }
    spec = {
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        "volumes": [{"name": "place", "emptyDir": {}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "pages"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": LABELS},
            "strategy": {"rollingUpdate": {"maxSurge": maximum}},
            "template": {"metadata": {"labels": LABELS}, "spec": spec},
        },
    }


SERVICE_MANIFEST = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "pages"},
    "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 8000, "targetPort": "http"}]},
}


def write(folder: Path, *manifests: dict) -> str:
    path = folder / "manifests.yaml"
    path.write_text("\n---\n".join(json.dumps(manifest) for manifest in manifests), encoding="utf-8")
    return str(path)


def reader_account(name: str) -> list[dict]:
    """Of somebody who may look at pods."""
    rbac, metadata = "rbac.authorization.k8s.io", {"name": name}
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
        },
    ]


def make_kubectl(cluster: StandIn, home: Path) -> Tool:
    return Tool(tool("kubectl"), kubeconfig=cluster.kubeconfig, home=home)


def pods(cluster: StandIn) -> list[dict]:
    return cluster.objects.all(POD, "default")


@pytest.mark.parametrize("how", ["--server-side=false", "--server-side=true"])
async def test_what_is_applied_twice_is_changed_once(how, tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        await kubectl("apply", how, "-f", write(tmp_path, SERVICE_MANIFEST, manifest()))
        await kubectl("wait", "--for=condition=Available", "deployment/pages", "--timeout=30s")
        address = cluster.objects.get(SERVICE, "default", "pages")["spec"]["clusterIP"]
        assert await page(f"http://{address}:8000/") == "one\n"
        generation = cluster.objects.get(DEPLOYMENT, "default", "pages")["metadata"]["generation"]
        await kubectl("apply", how, "-f", write(tmp_path, SERVICE_MANIFEST, manifest()))
        present = cluster.objects.get(DEPLOYMENT, "default", "pages")
        assert present["metadata"]["generation"] == generation
        assert cluster.objects.get(SERVICE, "default", "pages")["spec"]["clusterIP"] == address
        await kubectl("apply", how, "-f", write(tmp_path, manifest(text="two")))
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        await until_async(
            lambda: _shows(f"http://{address}:8000/", "two\n"), what="the proxy has heard of the new pod"
        )


async def _shows(url: str, text: str) -> bool:
    return await page(url) == text


async def test_a_scale_and_a_roll_are_seen_to_their_end(tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        await kubectl("apply", "-f", write(tmp_path, manifest(replicas=1)))
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        await kubectl("scale", "deployment/pages", "--current-replicas=1", "--replicas=3")
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        assert [is_ready(pod) for pod in pods(cluster)] == [True] * 3
        wrong = await kubectl.may_fail("scale", "deployment/pages", "--current-replicas=1", "--replicas=9")
        assert wrong.status != 0
        before = {pod["metadata"]["name"] for pod in pods(cluster)}
        await kubectl("rollout", "restart", "deployment/pages")
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        await until(lambda: len(pods(cluster)) == 3, what="the old pods are gone")
        assert not before & {pod["metadata"]["name"] for pod in pods(cluster)}
        await kubectl("rollout", "undo", "deployment/pages")
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        assert cluster.objects.get(DEPLOYMENT, "default", "pages")["spec"]["replicas"] == 3


async def test_what_pods_print_and_how_they_are_can_be_read(tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        await kubectl("apply", "-f", write(tmp_path, manifest()))
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        (pod,) = pods(cluster)
        assert "serving one" in await kubectl("logs", pod["metadata"]["name"])
        path = "jsonpath={.items[*].status.podIP}"
        assert await kubectl("get", "pods", "-l", "app=pages", "-o", path) == pod["status"]["podIP"]
        assert await kubectl("get", "pods", "-l", "app=other", "-o", path) == ""
        assert "pages" in await kubectl("get", "all")
        described = await kubectl("describe", "deployment/pages")
        assert "1 desired | 1 updated | 1 total | 1 available" in described


async def test_a_pod_that_is_deleted_is_replaced_and_a_watch_shows_both(tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        await kubectl("apply", "-f", write(tmp_path, manifest()))
        await kubectl("rollout", "status", "deployment/pages", "--timeout=30s")
        (old,) = pods(cluster)
        words = ("get", "pods", "--watch", "--output-watch-events", "-o", "json")
        async with kubectl.running(*words) as watching:
            assert watching.stdout is not None
            await until(lambda: any(w.kind == POD for w in cluster.server.watchers), what="the watch")
            await kubectl("delete", "pod", old["metadata"]["name"])
            assert cluster.objects.find(POD, "default", old["metadata"]["name"]) is None
            await until(lambda: [is_ready(pod) for pod in pods(cluster)] == [True], what="another pod")
            seen: list[tuple[str, str]] = []
            decoder, text = json.JSONDecoder(), ""
            (new,) = pods(cluster)
            wanted = {("DELETED", old["metadata"]["name"]), ("ADDED", new["metadata"]["name"])}
            while not wanted <= set(seen):
                data = await asyncio.wait_for(watching.stdout.read(1 << 16), 20)
                assert data, f"the watch ended: {seen}"
                text = (text + data.decode()).lstrip()
                while text:
                    try:
                        event, end = decoder.raw_decode(text)
                    except ValueError:
                        break
                    text = text[end:].lstrip()
                    seen.append((event["type"], event["object"]["metadata"]["name"]))


async def test_a_namespace_is_made_and_goes_with_all_that_is_in_it(tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        refused = await kubectl.may_fail("apply", "-n", "mine", "-f", write(tmp_path, manifest()))
        assert "not found" in refused.errors
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mine"}}
        await kubectl("apply", "-f", write(tmp_path, namespace))
        await kubectl("apply", "-n", "mine", "-f", write(tmp_path, manifest()))
        await kubectl("rollout", "status", "-n", "mine", "deployment/pages", "--timeout=30s")
        await kubectl("delete", "namespace", "mine", "--timeout=30s")
        await until(lambda: cluster.kubelet.num_pods == 0, what="its processes have ended")
        assert [kind.kind for kind, item in cluster.objects.everything() if _is_in(item, "mine")] == []


def _is_in(item: dict, namespace: str) -> bool:
    return item["metadata"].get("namespace") == namespace


async def test_a_service_account_hears_what_it_may_do(tmp_path):
    async with StandIn() as cluster:
        kubectl = make_kubectl(cluster, tmp_path)
        await kubectl("apply", "-f", write(tmp_path, *reader_account("reader"), manifest(replicas=0)))
        path = tmp_path / "reader"
        token = cluster.server.rights.token_of("default", "reader")
        path.write_text(cluster.server.kubeconfig(token=token), encoding="utf-8")
        reader = Tool(tool("kubectl"), kubeconfig=path, home=tmp_path)
        await reader("get", "pods")
        assert "yes" in await reader("auth", "can-i", "list", "pods")
        assert (await reader.may_fail("auth", "can-i", "delete", "pods")).output.strip() == "no"
        refused = await reader.may_fail("scale", "deployment/pages", "--replicas=2")
        assert "Forbidden" in refused.errors
