"""The real system for tests: `rorqual up` with real processes on small random checkpoints.

Called by the fixtures of `tests/integration`. It starts the command as a person would, reads its ready file, its
log and both kinds of /metrics, and ends it. It never reaches into a process: what a test learns, a person could.
`tests.harness.pools` starts the same processes one by one, and takes from here what is alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from rorqual.demo import CONFIG, find_tokenizer

SECONDS_MAX = 90.0
IDLE_SECONDS_MAX = 20.0

# Window, top-k and experts are small enough that a prompt of 100 tokens has choices to make in every layer.
IDS_CONFIG: dict[str, Any] = CONFIG | {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "sliding_window": 32,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 2048,
    "rope_scaling": CONFIG["rope_scaling"] | {"original_max_position_embeddings": 128},
}
"""Made without a tokenizer: prompts are token ids."""

TEXT_CONFIG: dict[str, Any] = IDS_CONFIG | {"vocab_size": CONFIG["vocab_size"]}
"""Made with the real tokenizer, whose vocabulary is nearly all of its weights."""


def make_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str,
    seed: int = 7,
    weights: str = "float32",
    tokenizer: bool = False,
) -> Path:
    config_file, out = folder / f"{name}.json", folder / name
    config_file.write_text(json.dumps(config), encoding="utf-8")
    command = [
        "init",
        "--config",
        str(config_file),
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--weights",
        weights,
    ]
    if tokenizer:
        command += ["--tokenizer", str(find_tokenizer())]
    done = run_command("checkpoint", *command)
    assert done.returncode == 0, done.stdout
    return out


def run_command(*arguments: str, seconds_max: float = SECONDS_MAX) -> subprocess.CompletedProcess[str]:
    """A `rorqual` command from start to end; standard output and error together in `stdout`."""
    return subprocess.run(
        rorqual_command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds_max,
        check=False,
    )


def rorqual_command(*arguments: str) -> list[str]:
    """Told to die with this very process."""
    return [sys.executable, "-m", "rorqual.cli", "--parent", str(os.getpid()), *arguments]


class Served:
    """A model that is served somewhere: how a test asks it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.http = ""  # URL
        self.grpc = ""  # address

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.http, timeout=SECONDS_MAX, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A greedy completion with its token ids, as the answer's JSON."""
        with self.client() as client:
            answer = client.post("/v1/completions", json=greedy_body(prompt, **fields))
        assert answer.status_code == 200, answer.text
        return answer.json()


class System(Served):
    """A running `rorqual up`, of any mix of workers. `close` ends it as a person would and looks that nothing is
    left."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        super().__init__(model.name)
        self.options = options
        self._output = folder / "output.txt"
        ready_file = folder / "ready.json"
        arguments = ("--model", str(model), "--http", "0", "--grpc", "0", "--ready-file", str(ready_file))
        arguments += ("--redis", "none")  # unless options say otherwise
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                rorqual_command("up", *arguments, *options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(
                lambda: ready_file.exists() or self.process.poll() is not None, seconds_max=SECONDS_MAX
            )
            assert ready_file.exists(), self.output()
            ready = json.loads(ready_file.read_text(encoding="utf-8"))
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.http = ready["http"]
        self.grpc = ready["grpc"]
        self.processes: list[int] = ready["processes"]
        self.worker_metrics: list[str] = re.findall(r"became ready .*metrics=(\S+)", self.output())

    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def is_whole(self) -> bool:
        """All the processes that it became ready with are alive."""
        return self.process.poll() is None and all(is_alive(pid) for pid in self.processes)

    def metrics(self) -> dict[str, float]:
        """Everything its processes export, a worker's and the router's, summed over workers and labels."""
        totals: Counter[str] = Counter()
        for url in (f"{self.http}/metrics", *self.worker_metrics):
            totals.update(scrape(url))
        return dict(totals)

    def held(self) -> dict[str, float]:
        """Everything that is zero when no request is open, by name; only what is not zero."""
        metrics = self.metrics()
        return held_by_workers(metrics) | held_by_router(metrics)

    def wait_until_idle(self, *, seconds_max: float = IDLE_SECONDS_MAX) -> None:
        wait_until_nothing(self.held, seconds_max=seconds_max)

    def close(self) -> None:
        was_whole = self.is_whole()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(SECONDS_MAX)
        finally:
            self.process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in self.processes), seconds_max=IDLE_SECONDS_MAX)
        output = self.output()
        assert was_whole, output
        assert status == 0, output
        assert "Traceback" not in output, output


def held_by_workers(metrics: Mapping[str, float]) -> dict[str, float]:
    """What one or more workers export and is not zero, though it is when no request is open. Only some workers lend
    or read: what one does not export, it does not have."""
    counts = {
        what: metrics[f"rorqual_worker_{what}_total"] - metrics[f"rorqual_worker_{what}_free"]
        for what in ("pages", "slots")
    }
    counts["records"] = metrics.get("rorqual_worker_records_total", 0.0) - metrics.get(
        "rorqual_worker_records_free", 0.0
    )
    counts["sequences opened, not ended"] = metrics["rorqual_worker_sequences_opened_total"] - metrics.get(
        "rorqual_worker_sequences_ended_total", 0.0
    )
    for what in ("sequences_running", "sequences_waiting", "tokens_waiting"):
        counts[what] = metrics[f"rorqual_worker_{what}"]
    for what in ("pages_leased", "leases", "lease_pages", "fetches_open", "store_values_held"):
        counts[what] = metrics.get(f"rorqual_worker_{what}", 0.0)
    return {f"worker: {what}": count for what, count in counts.items() if count}


def held_by_router(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same of a router."""
    counts = {
        what: metrics[f"rorqual_router_{what}"] for what in ("sequences_outstanding", "tokens_outstanding")
    }
    for what in ("credit_sequences", "credit_pages", "credit_waiting"):
        counts[what] = metrics.get(f"rorqual_router_{what}", 0.0)
    # Asking for the metrics is a request itself.
    counts["requests in flight"] = metrics["rorqual_router_in_flight_requests"] - 1
    return {f"router: {what}": count for what, count in counts.items() if count}


def scrape(url: str) -> dict[str, float]:
    """What one process exports, summed over labels."""
    totals: dict[str, float] = {}
    for line in httpx.get(url, timeout=SECONDS_MAX).text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def greedy_body(prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return body | fields


def wait_until(condition: Callable[[], bool], *, seconds_max: float) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds_max:g} s"
        time.sleep(0.02)


def wait_until_nothing(held: Callable[[], Mapping[str, float]], *, seconds_max: float) -> None:
    deadline = time.monotonic() + seconds_max
    while counts := held():
        assert time.monotonic() < deadline, f"still held after {seconds_max:g} s: {counts}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for yet does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()
