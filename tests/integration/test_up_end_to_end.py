"""`rorqual up` with the real worker, rank and router on a tiny random checkpoint: one command to tokens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow

SECONDS_MAX = 90.0


def rorqual(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "rorqual.cli", *arguments], **options)


@pytest.fixture
def up(ids_model, tmp_path):
    """Starts a cluster and gives its process, ready file and output; ends it when the test has not."""
    started = []

    def start(*options: str, path: Path = ids_model):
        ready_file, output = tmp_path / "ready.json", tmp_path / "output.txt"
        command = ("up", "--model", str(path), "--http", "0", "--grpc", "0", "--ready-file", str(ready_file))
        with output.open("w") as file:
            process = rorqual(*command, *options, stdout=file, stderr=subprocess.STDOUT)
        started.append(process)
        deadline = time.monotonic() + SECONDS_MAX
        while not ready_file.exists() and process.poll() is None:
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        return process, json.loads(ready_file.read_text()) if ready_file.exists() else None, output

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(SECONDS_MAX)


def complete(ready: dict, **fields) -> list[int]:
    body = {"model": "whale", "prompt": list(range(2, 302)), "max_tokens": 8, "ignore_eos": True, **fields}
    answer = httpx.post(
        f"{ready['http']}/v1/completions", json=body | {"return_token_ids": True}, timeout=SECONDS_MAX
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while alive := [pid for pid in processes if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()


@pytest.mark.parametrize(
    ("options", "num_processes"),
    [((), 7), (("--both", "2", "--redis", "none"), 5)],
    ids=["a prefill and a decode worker, and a store", "two of both, and none"],
)
def test_two_workers_answer_and_sigterm_leaves_nothing(up, options, num_processes):
    process, ready, output = up(*options)
    assert ready is not None, output.read_text()
    assert len(ready["processes"]) == num_processes  # a router, two hosts, two ranks; a store and its server
    sampled = [complete(ready, seed=seed) for seed in (1, 1, 2)]
    assert len(sampled[0]) == 8
    assert sampled[0] == sampled[1] != sampled[2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS_MAX) == 0
    assert_gone(ready["processes"])
    assert "Traceback" not in output.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_sigkill_of_the_supervisor_leaves_nothing(up):
    process, ready, output = up()
    assert ready is not None, output.read_text()
    process.kill()
    process.wait(SECONDS_MAX)
    assert_gone(ready["processes"])


@pytest.mark.parametrize(
    ("counts", "rank", "name"),
    [((), 2, "prefill-0"), ((), 4, "decode-0"), (("--both", "1"), 2, "both-0")],
    ids=["of a prefill worker", "of a decode worker", "of a worker of both"],
)
def test_a_dead_rank_ends_everything_with_one_clear_line(up, counts, rank, name):
    process, ready, output = up(*counts)
    assert ready is not None, output.read_text()
    os.kill(ready["processes"][rank], signal.SIGKILL)  # the router, then each worker's host and rank
    assert process.wait(SECONDS_MAX) == 1
    assert_gone(ready["processes"])
    told = output.read_text()
    assert f"rorqual up: {name} (process " in told
    assert "killed by SIGKILL" in told
    assert "Traceback" not in told


def test_a_broken_checkpoint_is_told_in_a_line(up, ids_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ids_model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    process, ready, output = up(path=broken)
    assert ready is None
    assert process.wait(SECONDS_MAX) == 1
    told = output.read_text()
    assert ".safetensors" in told
    assert "Traceback" not in told
