"""Whose write is taken and whose is not: versions, schemas, rights, faults on purpose."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rorqual.cluster_api import ApiError, ApiUnreachable, ClusterApi
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME

MAPS = "/api/v1/namespaces/default/configmaps"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"


@contextlib.asynccontextmanager
async def client(
    cluster: StandIn, monkeypatch: pytest.MonkeyPatch, folder: Path, *, account: str = ""
) -> AsyncIterator[ClusterApi]:
    """The administrator's, or that of an account as a pod would have it."""
    text = cluster.server.kubeconfig()
    if account:
        text = cluster.server.kubeconfig(token=cluster.server.rights.token_of("default", account))
    path = folder / f"kubeconfig-{account}"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(path))
    api = await ClusterApi.connect(call_seconds_max=5.0)
    try:
        yield api
    finally:
        await api.close()


def config_map(name: str, value: str = "") -> dict:
    return {"metadata": {"name": name}, "data": {"value": value}}


def deployment(name: str, replicas: int) -> dict:
    container = {"name": "idle", "image": "idle:1", "command": ["sleep", "1000"]}
    labels = {"app": name}
    return {
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


async def test_a_stale_version_is_a_conflict_and_changes_nothing(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        first = await api.create(MAPS, config_map("one", "1"))
        second = await api.replace(f"{MAPS}/one", {**first, "data": {"value": "2"}})
        with pytest.raises(ApiError) as caught:
            await api.replace(f"{MAPS}/one", {**first, "data": {"value": "3"}})
        assert (caught.value.status, caught.value.reason) == (409, "Conflict")
        assert (await api.get(f"{MAPS}/one"))["data"] == {"value": "2"}
        await api.replace(f"{MAPS}/one", {**second, "data": {"value": "4"}})
        assert (await api.get(f"{MAPS}/one"))["data"] == {"value": "4"}


async def test_conflicts_on_purpose_come_as_often_as_they_were_asked_for(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        await api.create(MAPS, config_map("one", "1"))
        cluster.faults.conflicts["/one"] = 2
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await api.merge_patch(f"{MAPS}/one", {"data": {"value": "2"}})
            assert caught.value.status == 409
        await api.merge_patch(f"{MAPS}/one", {"data": {"value": "2"}})


async def test_what_is_there_is_not_created_again_and_what_is_not_is_not_found(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        await api.create(MAPS, config_map("one"))
        for call, status, reason in (
            (api.create(MAPS, config_map("one")), 409, "AlreadyExists"),
            (api.get(f"{MAPS}/two"), 404, "NotFound"),
            (api.merge_patch(f"{MAPS}/two", {}), 404, "NotFound"),
            (api.get("/apis/nobody.io/v1/things"), 404, "NotFound"),
            (api.get(f"{MAPS}/one/log"), 404, "NotFound"),
            (api.create("/api/v1/namespaces/nowhere/configmaps", config_map("one")), 404, "NotFound"),
        ):
            with pytest.raises(ApiError) as caught:
                await call
            assert (caught.value.status, caught.value.reason) == (status, reason)


async def test_an_unknown_field_is_refused_by_its_name(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        wrong = deployment("idle", 1)
        wrong["spec"]["template"]["spec"]["containers"][0]["comand"] = ["true"]
        with pytest.raises(ApiError, match="comand") as caught:
            await api.create(DEPLOYMENTS, wrong)
        assert caught.value.status == 422
        await api.create(DEPLOYMENTS, deployment("idle", 0))
        with pytest.raises(ApiError, match="replicas") as caught:
            await api.merge_patch(f"{DEPLOYMENTS}/idle", {"spec": {"replicas": "two"}})
        assert caught.value.status == 422


async def test_a_scale_changes_replicas_and_nothing_else(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        before = await api.create(DEPLOYMENTS, deployment("idle", 0))
        scale = await api.get(f"{DEPLOYMENTS}/idle/scale")
        assert (scale["kind"], scale["spec"]) == ("Scale", {"replicas": 0})
        await api.merge_patch(f"{DEPLOYMENTS}/idle/scale", {"spec": {"replicas": 2}})
        after = await api.get(f"{DEPLOYMENTS}/idle")
        assert after["spec"] == {**before["spec"], "replicas": 2}
        with pytest.raises(ApiError) as caught:
            await api.replace(f"{DEPLOYMENTS}/idle/scale", {**scale, "spec": {"replicas": 3}})
        assert caught.value.status == 409, "a scale's version is its Deployment's"


async def test_an_account_may_do_what_its_role_says_and_no_more(tmp_path, monkeypatch):
    async with StandIn() as cluster:
        async with client(cluster, monkeypatch, tmp_path) as admin:
            await admin.create(DEPLOYMENTS, deployment("mine", 0))
            await admin.create(DEPLOYMENTS, deployment("other", 0))
            rules = [
                {
                    "apiGroups": ["apps"],
                    "resources": ["deployments/scale"],
                    "resourceNames": ["mine"],
                    "verbs": ["get", "patch"],
                },
                {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]},
            ]
            await admin.create(f"{RBAC}/roles", {"metadata": {"name": "scaler"}, "rules": rules})
            binding = {
                "metadata": {"name": "scaler"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "scaler"},
                "subjects": [{"kind": "ServiceAccount", "name": "scaler", "namespace": "default"}],
            }
            await admin.create(f"{RBAC}/rolebindings", binding)
        async with client(cluster, monkeypatch, tmp_path, account="scaler") as api:
            await api.merge_patch(f"{DEPLOYMENTS}/mine/scale", {"spec": {"replicas": 0}})
            await api.get(MAPS)
            for call in (
                api.merge_patch(f"{DEPLOYMENTS}/other/scale", {"spec": {"replicas": 3}}),
                api.merge_patch(f"{DEPLOYMENTS}/mine", {"spec": {"replicas": 3}}),
                api.get(f"{DEPLOYMENTS}/mine"),
                api.create(MAPS, config_map("one")),
                api.get("/api/v1/namespaces/kube-system/configmaps"),
                api.get("/api/v1/configmaps"),
            ):
                with pytest.raises(ApiError) as caught:
                    await call
                assert (caught.value.status, caught.value.reason) == (403, "Forbidden")
        async with client(cluster, monkeypatch, tmp_path, account="stranger") as api:
            with pytest.raises(ApiError) as caught:
                await api.get(MAPS)
            assert caught.value.status == 403
        assert len(cluster.server.rights.refusals) == 7
        assert cluster.objects.get(BY_NAME["Deployment"], "default", "other")["spec"]["replicas"] == 0


async def test_a_cluster_role_counts_where_it_is_bound_and_nowhere_else(tmp_path, monkeypatch):
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "looker"}
    subject = {"kind": "ServiceAccount", "name": "looker", "namespace": "default"}
    binding = {"metadata": {"name": "looker"}, "roleRef": reference, "subjects": [subject]}
    everywhere = RBAC.removesuffix("/namespaces/default")
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as admin:
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}]
        await admin.create(f"{everywhere}/clusterroles", {"metadata": {"name": "looker"}, "rules": rules})
        await admin.create(f"{RBAC}/rolebindings", binding)
        async with client(cluster, monkeypatch, tmp_path, account="looker") as api:
            await api.get(MAPS)
            for path in ("/api/v1/namespaces/kube-system/configmaps", "/api/v1/configmaps"):
                with pytest.raises(ApiError) as caught:
                    await api.get(path)
                assert caught.value.status == 403
            await admin.create(f"{everywhere}/clusterrolebindings", binding)
            await api.get("/api/v1/namespaces/kube-system/configmaps")
            await api.get("/api/v1/configmaps")


async def test_a_token_that_nobody_was_given_is_unauthorized(tmp_path, monkeypatch):
    async with StandIn() as cluster:
        cluster.kubeconfig.write_text(cluster.server.kubeconfig(token="guessed"), encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        api = await ClusterApi.connect()
        with pytest.raises(ApiError) as caught:
            await api.get(MAPS)
        await api.close()
        assert caught.value.status == 401


@pytest.mark.slow
async def test_a_server_that_asks_to_come_back_later_is_asked_again_but_not_for_ever(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        cluster.faults.too_many = 1
        await api.get(MAPS)
        assert cluster.faults.too_many == 0
        cluster.faults.too_many = 100
        with pytest.raises(ApiUnreachable, match="too busy"):
            await api.get(MAPS)
        assert cluster.faults.too_many > 90


async def test_what_a_namespace_holds_goes_with_it(tmp_path, monkeypatch):
    async with StandIn() as cluster, client(cluster, monkeypatch, tmp_path) as api:
        await api.create("/api/v1/namespaces", {"metadata": {"name": "mine"}})
        await api.create("/api/v1/namespaces/mine/configmaps", config_map("one"))
        await api.create(MAPS, config_map("one"))
        cluster.objects.delete(BY_NAME["Namespace"], "", "mine")
        left = (await api.get("/api/v1/configmaps"))["items"]
        assert [item["metadata"]["namespace"] for item in left] == ["default"]
