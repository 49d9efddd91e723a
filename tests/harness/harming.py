"""A store that tests do harm to while real processes use it, and prompts whose first token is timed meanwhile.

Called by `tests/integration/test_store_faults.py`. Between the processes and the server stands a proxy, so that replies
can be cut off; it runs on a thread of its own. What is in the store can be put back as it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from fake_proxy import FakeProxy
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from kvstore.store.embedded import EmbeddedServer
from tests.harness.system import SECONDS_MAX, Served, System, wait_until

PASSWORD = "of-the-store"
MEMORY_BYTES = 256 << 20


class HarmedStore:
    """A context manager. `url` is the proxy's, which stays the same whatever happens to the server."""

    def __enter__(self) -> Self:
        self.server = EmbeddedServer(memory_bytes=MEMORY_BYTES, password=PASSWORD)
        self.server.start()
        self.proxy = FakeProxy(self.server.port)
        self._password = PASSWORD  # that the server asks for now
        self._kept: dict[bytes, bytes] = {}
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._is_ready.wait(SECONDS_MAX)
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.proxy.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(SECONDS_MAX)
        self._loop.close()
        self.server.stop()

    def client(self) -> Redis:
        return Redis.from_url(self.server.url)

    def values(self) -> dict[bytes, bytes]:
        """All that are strings: pages and tails."""
        with self.client() as redis:
            names = [name for name in redis.scan_iter(count=1000) if redis.type(name) == b"string"]
            return {name: value for name in names if (value := redis.get(name)) is not None}

    def keep(self) -> None:
        self._kept = self.values()

    def put_back(self) -> None:
        """What was kept, and nothing else."""
        with self.client() as redis:
            redis.flushall()
            for name, value in self._kept.items():
                redis.set(name, value)

    def reset_connections(self) -> None:
        self._loop.call_soon_threadsafe(self.proxy.reset_all)

    # What can happen to it, and the end of that.

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)

    def freeze(self) -> None:
        os.kill(self.server.pid, signal.SIGSTOP)

    def fill_up(self) -> None:
        with self.client() as redis:
            redis.config_set("maxmemory-policy", "noeviction")
            redis.config_set("maxmemory", 1)

    def lock(self) -> None:
        """From now on it has another password."""
        with self.client() as redis:
            redis.config_set("requirepass", "another")
        self._password = "another"
        self.reset_connections()

    def spoil(self) -> None:
        """One half of the values has a wrong byte, the other a lost end."""
        with self.client() as redis:
            for number, (name, value) in enumerate(self.values().items()):
                middle = len(value) // 2
                flipped = value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]
                redis.set(name, value[:middle] if number % 2 else flipped)

    def cut(self) -> None:
        """Every connection, in the middle of the first value that comes over it."""
        self.proxy.cut_after = 5000
        self.reset_connections()

    def mend(self) -> None:
        """As it was, whatever it was."""
        self.proxy.cut_after = None
        if self.server.exit_status is not None:
            port = self.server.port
            self.server.stop()
            self.server = EmbeddedServer(memory_bytes=MEMORY_BYTES, port=port, password=PASSWORD)
            self.server.start()
            self._password = PASSWORD
        os.kill(self.server.pid, signal.SIGCONT)
        with Redis.from_url(self.server.url.replace(PASSWORD, self._password)) as redis:
            redis.config_set("requirepass", PASSWORD)
        self._password = PASSWORD
        with self.client() as redis:
            redis.config_set("maxmemory", MEMORY_BYTES)
            redis.config_set("maxmemory-policy", "allkeys-lru")
        self.put_back()

    async def _run(self) -> None:
        async with self.proxy:
            self._is_ready.set()
            await self._ended.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    tokens: list[int]
    first_seconds: float  # until the first of them
    num_cached: int


def hear(system: Served, prompt: Sequence[int], *, num_tokens: int, key: str) -> Heard:
    body: dict[str, Any] = {
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "seed": 3,
        "temperature": 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens: list[int] = []
    first_seconds, num_cached = 0.0, -1
    with system.client(headers={"authorization": f"Bearer {key}"}) as client:
        began = time.monotonic()
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if not line or data == "[DONE]":
                    continue
                event = json.loads(data)
                assert "error" not in event, event
                for choice in event["choices"]:
                    if choice["token_ids"] and not tokens:
                        first_seconds = time.monotonic() - began
                    tokens += choice["token_ids"]
                if event.get("usage"):
                    num_cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert len(tokens) == num_tokens
    return Heard(tokens=tokens, first_seconds=first_seconds, num_cached=num_cached)


def hear_all(
    system: Served, prompts: Sequence[Sequence[int]], *, num_tokens: int, key: str, at_once: int = 2
) -> list[Heard]:
    """So many at once."""
    with ThreadPoolExecutor(at_once) as threads:
        asked = [threads.submit(hear, system, prompt, num_tokens=num_tokens, key=key) for prompt in prompts]
        return [item.result() for item in asked]


def median_seconds(heard: Sequence[Heard]) -> float:
    return statistics.median(item.first_seconds for item in heard)


def store_metric(system: System, name: str, **labels: str) -> float:
    """Summed over workers, and over all labels but these."""
    total = 0.0
    for url in system.worker_metrics:
        for family in text_string_to_metric_families(httpx.get(url, timeout=SECONDS_MAX).text):
            for sample in family.samples:
                if sample.name == f"rorqual_worker_store_{name}" and labels.items() <= sample.labels.items():
                    total += sample.value
    return total


def wait_until_found(system: System) -> None:
    """All its workers use their store."""
    wait_until(
        lambda: store_metric(system, "servers", state="closed") == len(system.worker_metrics),
        seconds_max=40,
    )


def wait_until_written(system: System) -> None:
    """Nothing waits to be written; what has landed in host memory is given away within a turn."""
    wait_until(
        lambda: (
            not store_metric(system, "values_held")
            and not store_metric(system, "bytes_queued")
            and not store_metric(system, "bytes_in_flight")
        ),
        seconds_max=30,
    )


def num_files(system: System) -> int:
    """Descriptors open in all of its processes: connections, above all."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in system.processes)
