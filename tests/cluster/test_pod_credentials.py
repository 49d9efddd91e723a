"""A pod's service account: used where there is one, and its token followed as it is rotated and the old one refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from autoscaler.election import Election, Elector
from rorqual.clock import SystemClock
from rorqual.cluster_api import ApiError, ApiUnreachable, ClusterApi, WatchPace
from rorqual.errors import ConfigError
from tests.cluster.stand_in.cluster import StandIn
from tests.harness.mounted import Mounted

pytestmark = pytest.mark.slow

PODS = "/api/v1/namespaces/default/pods"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/default/leases/lease"
PACE = WatchPace(backoff_seconds_min=0.05, backoff_seconds_max=0.2)
RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
]
MAPS = "/api/v1/namespaces/default/configmaps"


class Pod:
    """What a container finds: the service account's folder and, by the fixture, the environment."""

    def __init__(self, stand_in: StandIn, folder: Path) -> None:
        self.stand_in = stand_in
        self.token = self._draw()
        self.account = Mounted(folder, self._content())

    def expire(self) -> None:
        """The token in the pod is refused from now on."""
        self.stand_in.server.rights.revoke(self.token)

    def rotate(self) -> None:
        """The kubelet brings a fresh one."""
        self.token = self._draw()
        self.account.hold(self._content())

    def _draw(self) -> str:
        return self.stand_in.server.rights.token_of("default", "scaler")

    def _content(self) -> dict[str, bytes]:
        return {
            "token": self.token.encode(),
            "ca.crt": self.stand_in.server.certificate,
            "namespace": b"default",
        }


@asynccontextmanager
async def a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Pod, ClusterApi]]:
    """And the administrator's own way to the API server."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with StandIn() as stand_in:
        monkeypatch.setenv("KUBECONFIG", str(stand_in.kubeconfig))
        admin = await ClusterApi.connect()
        rbac, version = (
            "/apis/rbac.authorization.k8s.io/v1/namespaces/default",
            "rbac.authorization.k8s.io/v1",
        )
        names = {"metadata": {"name": "scaler", "namespace": "default"}}
        account = {"apiVersion": "v1", "kind": "ServiceAccount", **names}
        role = {"apiVersion": version, "kind": "Role", **names, "rules": RULES}
        binding = {
            "apiVersion": version,
            "kind": "RoleBinding",
            **names,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "scaler"},
            "subjects": [{"kind": "ServiceAccount", "name": "scaler", "namespace": "default"}],
        }
        await admin.create("/api/v1/namespaces/default/serviceaccounts", account)
        await admin.create(f"{rbac}/roles", role)
        await admin.create(f"{rbac}/rolebindings", binding)
        address = urlsplit(stand_in.server.url)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address.hostname))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "of-nobody"))
        try:
            yield Pod(stand_in, tmp_path / "serviceaccount"), admin
        finally:
            await admin.close()


@asynccontextmanager
async def connected(pod: Pod) -> AsyncIterator[ClusterApi]:
    api = await ClusterApi.connect(call_seconds_max=5.0, pace=PACE, service_account=pod.account.folder)
    try:
        yield api
    finally:
        await api.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def a_map(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}}


async def test_a_pod_goes_by_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _), connected(pod) as api:
        assert api.namespace == "default"
        assert (await api.get(MAPS))["items"] == []
        with pytest.raises(ApiError, match="the right to get pods"):
            await api.get(PODS)  # which the administrator may


async def test_a_proxy_of_the_environment_is_not_between_a_pod_and_its_api_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _):
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        async with connected(pod) as api:
            assert (await api.get(MAPS))["items"] == []


async def test_a_certificate_that_is_none_is_no_way_to_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _):
        (pod.account.folder / "ca.crt").write_text("half a certif")
        with pytest.raises(ConfigError, match="no way to a Kubernetes API server"):
            await ClusterApi.connect(service_account=pod.account.folder)


async def test_without_a_pods_environment_or_token_a_kubeconfig_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _):
        monkeypatch.setenv("KUBECONFIG", str(pod.stand_in.kubeconfig))
        api = await ClusterApi.connect(service_account=tmp_path / "none")
        assert (await api.get(PODS))["items"] == []
        await api.close()
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
        async with connected(pod) as api:
            assert (await api.get(PODS))["items"] == []


async def test_the_first_call_after_a_rotation_shows_the_new_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _), connected(pod) as api:
        for _ in range(3):
            await api.get(MAPS)
            pod.expire()
            with pytest.raises(ApiError, match="401"):
                await api.get(MAPS)
            pod.rotate()
            await api.get(MAPS)


async def test_a_token_that_cannot_be_read_is_told_of_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, _), connected(pod) as api:
        pod.account.hold({})
        with pytest.raises(ApiUnreachable, match="No such file"):
            await api.get(MAPS)
        pod.account.hold({"token": b""})
        with pytest.raises(ApiUnreachable, match="token is empty"):
            await api.get(MAPS)
        pod.rotate()
        await api.get(MAPS)


async def test_a_watch_goes_on_with_the_new_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, admin), connected(pod) as api:
        seen: list[set[str]] = []
        failures: list[str] = []
        watching = asyncio.create_task(
            api.watch(MAPS, on_change=lambda items: seen.append(set(items)), on_failure=failures.append)
        )
        try:
            await admin.create(MAPS, a_map("one"))
            await until(lambda: seen and seen[-1] == {"default/one"} and pod.stand_in.server.watchers)
            pod.expire()
            await pod.stand_in.server.cut_watches()
            await until(lambda: any("401" in why for why in failures))
            await admin.create(MAPS, a_map("two"))
            pod.rotate()
            await until(lambda: seen[-1] == {"default/one", "default/two"})
            await until(lambda: failures[-1] == "")
            assert set() not in seen[1:]  # what was known stayed known
            await admin.create(MAPS, a_map("three"))
            await until(lambda: "default/three" in seen[-1])
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching


async def test_a_leader_whose_token_is_rotated_goes_on_leading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_pod(tmp_path, monkeypatch) as (pod, admin), connected(pod) as api:
        clock, failures = SystemClock(), list[str]()
        election = Election(name="lease", identity="me", duration_seconds=3.0)
        elector = Elector(election, api, clock=clock, on_failure=failures.append)
        electing = asyncio.create_task(elector.run())
        try:
            await until(lambda: election.leads(clock.monotonic()))
            for _ in range(2):
                before = (await admin.get(LEASE))["spec"]["renewTime"]
                pod.expire()
                pod.rotate()
                async with asyncio.timeout(20):
                    while (await admin.get(LEASE))["spec"]["renewTime"] == before:
                        assert election.leads(clock.monotonic())
                        await asyncio.sleep(0.05)
            assert failures == []
        finally:
            electing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await electing
