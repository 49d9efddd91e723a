"""The chart in a stand-in: real Helm, real processes, and clients that count what fails. For tests/cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import DEPLOYMENT, POD, SERVICE, is_ready
from tests.cluster.stand_in.objects import Object
from tests.harness.cluster_tools import tool

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "rorqual"
MODEL = ROOT / "models" / "demo"
RELEASE = "demo"
NAMESPACE = "default"
HELM_SECONDS_MAX = 150


class Installed:
    """A release in a stand-in. `helm` runs the real program; waits raise with the pods' last words."""

    def __init__(self, stand_in: StandIn, *, values: Path) -> None:
        self.stand_in, self.values = stand_in, values

    async def helm(self, *arguments: str, program: str = "helm4") -> str:
        return await self.run(str(tool(program)), *arguments)

    async def kubectl(self, *arguments: str) -> str:
        return await self.run(str(tool("kubectl")), *arguments)

    async def run(self, *command: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "KUBECONFIG": str(self.stand_in.kubeconfig)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), HELM_SECONDS_MAX)
        finally:
            if process.returncode is None:
                process.kill()
        self.stand_in.check()
        text = output.decode(errors="replace")
        assert process.returncode == 0, f"{' '.join(command[1:])}: {text}\n{self.told()}"
        return text

    async def until(self, holds: Callable[[], bool], *, seconds: float, what: str) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        while not holds():
            self.stand_in.check()
            assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s\n{self.told()}"
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    def deployment(self, name: str) -> Object:
        return self.stand_in.objects.get(DEPLOYMENT, NAMESPACE, f"{RELEASE}-rorqual-{name}")

    def replicas(self, name: str) -> int:
        return self.deployment(name)["spec"]["replicas"]

    def pods(self, name: str) -> list[Object]:
        prefix = f"{RELEASE}-rorqual-{name}-"
        return [pod for pod in self.stand_in.objects.all(POD) if pod["metadata"]["name"].startswith(prefix)]

    def num_ready(self, name: str) -> int:
        return sum(is_ready(pod) and "deletionTimestamp" not in pod["metadata"] for pod in self.pods(name))

    def url(self) -> str:
        service = self.stand_in.objects.get(SERVICE, NAMESPACE, f"{RELEASE}-rorqual-router")
        return f"http://{service['spec']['clusterIP']}"

    def told(self) -> str:
        """What pods said last, and how they are."""
        states = [
            f"{pod['metadata']['name']}: ready={is_ready(pod)} {pod['status'].get('containerStatuses')}"
            for pod in self.stand_in.objects.all(POD)
        ]
        logs = [f"== {name}\n{text[-2500:]}" for name, text in self.stand_in.kubelet.logs().items()]
        return "\n".join([*states, *logs, *self.stand_in.server.rights.refusals[-5:]])


class Clients:
    """Requests through the router's Service, each on a connection of its own, as strangers' are."""

    def __init__(self, url: str, *, key: str = "") -> None:
        self.url = url
        self.failures: list[str] = []
        self.num_done = 0
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def chat(self, text: str, *, max_tokens: int = 16, stream: bool = True, **more: Any) -> str:
        """The answer's text. Raises AssertionError for anything but a whole answer."""
        body = {
            "model": "rorqual-demo",
            "stream": stream,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": text}],
            **more,
        }
        timeout = aiohttp.ClientTimeout(total=90)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session,
            session.post(f"{self.url}/v1/chat/completions", json=body) as response,
        ):
            assert response.status == 200, f"{response.status} {await response.text()}"
            if not stream:
                return (await response.json())["choices"][0]["message"]["content"]
            return await _streamed(response)

    async def keep_asking(self, *, num_clients: int, max_tokens: int, pause: float = 0.0) -> None:
        """Until cancelled; what fails is kept in `failures`."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._ask_on(number, max_tokens=max_tokens, pause=pause))

    async def _ask_on(self, number: int, *, max_tokens: int, pause: float) -> None:
        turn = 0
        while True:
            turn += 1
            try:
                await self.chat(
                    f"Client {number} asks for the {turn}th time: how are you?",
                    max_tokens=max_tokens,
                    ignore_eos=True,
                )
                self.num_done += 1
            except (AssertionError, TimeoutError, OSError, aiohttp.ClientError) as error:
                self.failures.append(f"client {number}, request {turn}: {type(error).__name__} {error}")
                await asyncio.sleep(0.5)
            await asyncio.sleep(pause)

    @contextlib.asynccontextmanager
    async def asking(self, *, num_clients: int, max_tokens: int, pause: float = 0.0) -> AsyncIterator[None]:
        """Clients that ask all through the block."""
        task = asyncio.create_task(
            self.keep_asking(num_clients=num_clients, max_tokens=max_tokens, pause=pause)
        )
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _streamed(response: aiohttp.ClientResponse) -> str:
    """A stream counts when it ends as it should: with a finish reason and [DONE]."""
    parts: list[str] = []
    finish = ""
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            assert finish in ("stop", "length"), f"the stream ended with {finish!r}"
            return "".join(parts)
        event = json.loads(data)
        assert "error" not in event, f"the stream told of an error: {event['error']}"
        for choice in event.get("choices", []):
            parts.append(choice["delta"].get("content") or "")
            finish = choice.get("finish_reason") or finish
    raise AssertionError("the stream was cut off")
