"""Routers as processes that find their workers: in a file, and in a stand-in for a Kubernetes API server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_cluster_api import FakeClusterApi, a_slice
from fake_state import answer

from rorqual.cluster_api import ClusterApi, WatchPace
from rorqual.discovery import parse_source
from rorqual.discovery.endpoint_slices import EndpointSliceSource
from rorqual.sampling import SamplingParams
from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME

pytestmark = pytest.mark.slow


@pytest.fixture
def start_router(start_process: Any, model_dir: Path, tmp_path: Path) -> Any:
    number = 0

    async def start(source: str, *options: str) -> tuple[Any, str]:
        """The process and its URL, which it serves before it is ready."""
        nonlocal number
        number += 1
        ready_file = tmp_path / f"router-{number}.json"
        port = free_port()
        command = ["-m", "rorqual.cli", "--parent", str(os.getpid()), "router", "--model", str(model_dir)]
        command += ["--discover", source, "--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0"]
        router = await start_process(
            *command, "--ready-file", str(ready_file), *options, ready_file=ready_file
        )
        return router, f"http://127.0.0.1:{port}"

    return start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def ask(client: httpx.AsyncClient, url: str, number: int, *, max_tokens: int = 20) -> None:
    body = {
        "model": "a-model",
        "prompt": [number, number + 1],
        "max_tokens": max_tokens,
        "seed": number,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post(f"{url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    expected = answer([number, number + 1], max_tokens, SamplingParams(seed=number), ignore_eos=True)
    assert response.json()["choices"][0]["token_ids"] == expected


async def get(client: httpx.AsyncClient, url: str) -> tuple[int, str]:
    """Status 0: nobody listens."""
    try:
        response = await client.get(url)
    except httpx.TransportError:
        return 0, ""
    return response.status_code, response.text


async def until_got(client: httpx.AsyncClient, url: str, wanted: Callable[[int, str], bool]) -> str:
    while not wanted(*(got := await get(client, url))):
        await asyncio.sleep(0.02)
    return got[1]


def shows(name: str, value: float) -> Callable[[int, str], bool]:
    return lambda status, text: f"rorqual_router_{name} {value}" in text.splitlines()


def write(path: Path, *addresses: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"workers": [{"address": item} for item in addresses]}))
    os.replace(partial, path)


async def test_a_router_without_workers_stays_up_and_serves_whoever_comes(
    start_worker: Any, start_router: Any, tmp_path: Path
) -> None:
    file = tmp_path / "workers.json"
    router, url = await start_router(f"file:{file}", "--start-seconds", "0.2")
    async with httpx.AsyncClient() as client:
        text = await until_got(client, f"{url}/ready", lambda status, _: status == 503)
        assert "no worker is connected: 0 known" in text
        assert "1 of 1 sources of addresses cannot be asked" in text
        assert (await get(client, f"{url}/health"))[0] == 200
        first = (await (worker := await start_worker()).ready())["address"]
        write(file, first)
        assert (await router.ready())["http"] == url
        assert (await get(client, f"{url}/ready"))[0] == 200
        await ask(client, url, 1)
        second = (await (await start_worker()).ready())["address"]
        write(file, second)
        await until_got(client, f"{url}/metrics", shows("workers_connected", 2.0))
        worker.signal(signal.SIGKILL)
        text = await until_got(client, f"{url}/metrics", lambda _, text: f'worker="{first}"' not in text)
        assert f'worker="{second}"' in text
        await ask(client, url, 2)
    router.signal(signal.SIGTERM)
    status, output = await router.ended()
    assert (status, "Traceback" in output) == (0, False), output
    assert "waited for workers" in output


async def test_routers_side_by_side_find_the_same_workers_in_kubernetes_and_outlive_its_api(
    start_worker: Any, start_router: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [await start_worker(fake=("--step-ms", "5")) for _ in range(2)]
    addresses = [(await worker.ready())["address"] for worker in workers]
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with FakeClusterApi() as api, httpx.AsyncClient() as client:
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "config")))
        for address in addresses:  # of two ports, which one slice has not
            host, port = address.rsplit(":", 1)
            api.put(a_slice(f"s-{port}", host, port=int(port)))
        started = [await start_router("kubernetes:?selector=rorqual.io/role=both") for _ in range(3)]
        routers, urls = [router for router, _ in started], [url for _, url in started]
        for router, url in started:
            await router.ready()
            await until_got(client, f"{url}/metrics", shows("workers_connected", 2.0))
        await asyncio.gather(*(ask(client, urls[n % 3], n) for n in range(1, 40)))
        # The API server goes away, and a stream runs on while its worker is taken from the list.
        await api.stop()
        await asyncio.gather(*(ask(client, url, 7) for url in urls))
        await api.start()
        asking = [asyncio.create_task(ask(client, url, 3, max_tokens=200)) for url in urls]
        await asyncio.sleep(0.1)
        api.delete("s-" + addresses[0].rsplit(":", 1)[1])
        await asyncio.gather(*asking)
        # Routers that leave, orderly or not, disturb nobody else.
        routers[0].signal(signal.SIGKILL)
        routers[1].signal(signal.SIGTERM)
        assert (await routers[1].ended())[0] == 0
        await asyncio.gather(*(ask(client, urls[2], n) for n in range(1, 10)))
        workers[0].signal(signal.SIGTERM)
        gone, stays = addresses
        await until_got(client, f"{urls[2]}/metrics", lambda _, text: f'worker="{gone}"' not in text)
        assert f'worker="{stays}"' in (await get(client, f"{urls[2]}/metrics"))[1]
        await ask(client, urls[2], 5)


async def test_a_workers_probes_say_whether_it_takes_sequences(
    start_worker: Any, start_router: Any, tmp_path: Path
) -> None:
    worker = await start_worker("--drain-seconds", "20", fake=("--step-ms", "10"))
    ready = await worker.ready()
    base = ready["metrics"].removesuffix("/metrics")
    write(tmp_path / "workers.json", ready["address"])
    router, url = await start_router(f"file:{tmp_path / 'workers.json'}")
    await router.ready()
    async with httpx.AsyncClient() as client:
        assert await get(client, f"{base}/health") == (200, "ok\n")
        assert await get(client, f"{base}/ready") == (200, "ready\n")
        asking = asyncio.create_task(ask(client, url, 3, max_tokens=200))
        await until_got(client, f"{base}/metrics", lambda _, text: "sequences_running 1.0" in text)
        worker.signal(signal.SIGTERM)
        text = await until_got(client, f"{base}/ready", lambda status, _: status == 503)
        assert text == "the worker is draining\n"
        assert (await get(client, f"{base}/health"))[0] == 200
        await asking
    assert (await worker.ended())[0] == 0


async def test_a_service_account_needs_three_rights_and_is_told_which_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    source = EndpointSliceSource(
        parse_source("kubernetes:?selector=rorqual.io/role=decode", option="x"),
        connect=lambda: ClusterApi.connect(
            pace=WatchPace(backoff_seconds_min=0.01, backoff_seconds_max=0.02)
        ),
    )
    told: list[set[str]] = []
    async with StandIn() as stand_in, asyncio.timeout(30):
        kinds, objects = BY_NAME, stand_in.objects
        token = stand_in.server.rights.token_of("default", "router")
        config = tmp_path / "config"
        config.write_text(stand_in.server.kubeconfig(token=token))
        monkeypatch.setenv("KUBECONFIG", str(config))

        def a_rule(*verbs: str) -> dict[str, Any]:
            return {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": list(verbs)}

        role = objects.create(kinds["Role"], "default", {"metadata": {"name": "r"}, "rules": []})
        binding = {
            "metadata": {"name": "r"},
            "roleRef": {"kind": "Role", "name": "r"},
            "subjects": [{"kind": "ServiceAccount", "name": "router", "namespace": "default"}],
        }
        objects.create(kinds["RoleBinding"], "default", binding)
        for name, value in (("d", "decode"), ("p", "prefill")):
            item = a_slice(name, f"10.0.0.{len(name + value)}")
            item["metadata"] = {"name": name, "labels": {"rorqual.io/role": value}}
            objects.create(kinds["EndpointSlice"], "default", item)
        running = asyncio.create_task(source.run(lambda addresses: told.append(set(addresses))))
        try:
            for verbs, missing in (((), "list"), (("list",), "watch")):
                role = objects.update(kinds["Role"], {**role, "rules": [a_rule(*verbs)]})
                wanted = f"the right to {missing} endpointslices of discovery.k8s.io in namespace default"
                while wanted not in source.last_error:
                    await asyncio.sleep(0.01)
            objects.update(kinds["Role"], {**role, "rules": [a_rule("list", "watch")]})
            while source.last_error:
                await asyncio.sleep(0.01)
            assert told == [{"10.0.0.7:9000"}]
            stand_in.check()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
