"""The chart, installed by real Helm into a stand-in API server, whose toy kubelet runs its pods as real processes: they
serve, scale by the autoscaler, roll to another version, and live without the API server. One cluster for all, in order.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.cluster.installed import CHART, MODEL, NAMESPACE, RELEASE, Clients, Installed
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import POD

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.timeout(320),
    pytest.mark.asyncio(loop_scope="module"),
]

KEY = secrets.token_hex(16)
AUTOSCALING = """
autoscaler:
  enabled: true
  replicas: 2  # one leads, the other waits
  intervalSeconds: 1
  manualHoldSeconds: 8
  surviveLosses: 0
  objectives: {ttft: {percentile: 90, seconds: 20}, itl: {percentile: 90, seconds: 0.5}}
pools:
  decode:
    options: {slots: 2}  # so that eight clients are more than three workers take at once
    autoscaling:
      enabled: true
      min: 1
      max: 3
      startSeconds: 5
      step: {up: 2, down: 2}
      stabilisation: {upSeconds: 0, downSeconds: 5}
"""


def jit_cache() -> Path:
    """Kept between runs: compiling for the CPU takes half a minute of two cores."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rorqual-tools" / "jit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installed]:
    environment = {"OMP_NUM_THREADS": "1", "UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}
    values = tmp_path_factory.mktemp("values") / "values.yaml"
    values.write_text(AUTOSCALING, encoding="utf-8")
    async with StandIn(environment=environment) as stand_in:
        installed = Installed(stand_in, values=values)
        await installed.kubectl("create", "secret", "generic", "clients", f"--from-literal=keys={KEY}")
        await installed.helm("install", *arguments(values), "--wait", "--timeout", "140s")
        yield installed


@pytest.fixture
def clients(installed: Installed) -> Clients:
    return Clients(installed.url(), key=KEY)


def arguments(values: Path, *more: str) -> tuple[str, ...]:
    """Of install and upgrade."""
    settings = {
        "model.path": "",  # the volume: a path of this machine may lie below a mount of the pods, such as /tmp
        "model.hostPath": str(MODEL),
        "apiKeys.existingSecret": "clients",
        "workers.jitCache.hostPath": str(jit_cache()),
        "router.listen": "pod",  # the stand-in's pods share a host
        "workers.preStopSeconds": "1",
        "router.preStopSeconds": "1",
    }
    given = [item for name, value in settings.items() for item in ("--set", f"{name}={value}")]
    files = ["-f", str(CHART / "values-local.yaml"), "-f", str(values)]
    return (RELEASE, str(CHART), *files, *given, *more)


async def test_its_pods_serve_a_chat(installed: Installed, clients: Clients):
    streamed = await clients.chat("Hello!", temperature=0)
    assert streamed
    assert await clients.chat("Hello!", temperature=0, stream=False) == streamed
    with pytest.raises(AssertionError, match="401"):
        await Clients(installed.url()).chat("Hello!")
    assert installed.stand_in.server.rights.refusals == []


async def test_decode_workers_come_under_load_and_go_without(installed: Installed, clients: Clients):
    async with clients.asking(num_clients=8, max_tokens=200):
        up = await installed.until(
            lambda: installed.num_ready("decode") == 3, seconds=90, what="three decode workers"
        )
        num_done = clients.num_done
        await installed.until(
            lambda: clients.num_done > num_done + 16, seconds=60, what="answers from three workers"
        )
    down = await installed.until(
        lambda: len(installed.pods("decode")) == 1, seconds=120, what="one decode worker again"
    )
    print(f"three after {up:.0f} s, one after {down:.0f} s, {clients.num_done} answers")
    assert clients.failures == []
    assert await clients.chat("Are you there?")


async def test_a_person_who_sets_replicas_is_left_alone_for_a_while(installed: Installed, clients: Clients):
    await installed.kubectl("scale", f"deployment/{RELEASE}-rorqual-decode", "--replicas=2")
    began = time.monotonic()
    await installed.until(lambda: installed.num_ready("decode") == 2, seconds=40, what="two decode workers")
    while time.monotonic() - began < 6:  # of a hold of 8 s
        assert installed.replicas("decode") == 2
        await asyncio.sleep(0.2)
    await installed.until(lambda: installed.replicas("decode") == 1, seconds=60, what="the end of the hold")
    assert await clients.chat("Are you there?")


async def test_without_the_api_server_nothing_changes(installed: Installed, clients: Clients):
    await installed.until(lambda: len(installed.pods("decode")) == 1, seconds=40, what="one decode worker")
    try:
        installed.stand_in.faults.down = True
        async with clients.asking(num_clients=2, max_tokens=24):
            await installed.until(lambda: clients.num_done >= 6, seconds=40, what="six answers")
    finally:
        installed.stand_in.faults.down = False
    assert clients.failures == []
    assert len(installed.pods("decode")) == 1


async def test_it_rolls_to_another_version_and_back_and_no_request_fails(
    installed: Installed, clients: Clients
):
    before = {pod["metadata"]["name"] for pod in installed.stand_in.objects.all(POD)}
    async with clients.asking(num_clients=2, max_tokens=24, pause=0.2):
        await installed.helm(
            "upgrade", *arguments(installed.values, "--set", "image.tag=2.0.0"), "--wait", "--timeout", "120s"
        )
        rolled = {pod["metadata"]["name"] for pod in installed.stand_in.objects.all(POD)}
        num_done = clients.num_done
        await installed.until(lambda: clients.num_done > num_done + 2, seconds=40, what="more answers")
    assert clients.failures == [], installed.told()
    assert num_done > 0
    images = {
        container["image"]
        for name in ("router", "prefill", "decode")
        for pod in installed.pods(name)
        if "deletionTimestamp" not in pod["metadata"]
        for container in pod["spec"]["containers"]
    }
    assert images == {"ghcr.io/rorqual/rorqual:2.0.0-cpu"}
    assert not (before & rolled) or all(
        "deletionTimestamp" in pod["metadata"] for pod in _named(installed, before & rolled)
    )
    assert installed.stand_in.server.rights.refusals == []


async def test_uninstalling_leaves_nothing(installed: Installed):
    await installed.helm("uninstall", RELEASE, "--wait", "--timeout", "60s")
    await installed.until(
        lambda: not installed.stand_in.objects.all(POD), seconds=60, what="the end of all pods"
    )
    await installed.until(
        lambda: installed.stand_in.kubelet.num_pods == 0, seconds=10, what="the end of all processes"
    )
    left = [
        f"{kind.kind}/{item['metadata']['name']}"
        for kind, item in installed.stand_in.objects.everything()
        if item["metadata"].get("namespace") == NAMESPACE
    ]
    allowed = {"ServiceAccount/default", "Secret/clients", f"Lease/{RELEASE}-rorqual-autoscaler"}
    assert {name for name in left if not name.startswith("Event/")} <= allowed


async def test_helm_3_installs_it_too(installed: Installed):
    await installed.helm(
        "install",
        *arguments(installed.values, "--set", "autoscaler.enabled=false"),
        "--wait",
        "--timeout",
        "120s",
        program="helm3",
    )
    clients = Clients(installed.url(), key=KEY)
    assert await clients.chat("Hello!")
    async with aiohttp.ClientSession() as session, session.get(f"{installed.url()}/ready") as response:
        assert response.status == 200
    await installed.helm("uninstall", RELEASE, program="helm3")


def _named(installed: Installed, names: set[str]) -> list[dict[str, object]]:
    return [pod for pod in installed.stand_in.objects.all(POD) if pod["metadata"]["name"] in names]
