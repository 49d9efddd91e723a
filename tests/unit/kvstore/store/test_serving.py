"""`rorqual kv serve` as a real process: it listens where it was told, and ends whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

pytestmark = pytest.mark.slow

SECONDS_MAX = 30.0
Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rorqual.cli", "--parent", str(os.getpid()), "kv", "serve", *options]
        environment = os.environ | {"RORQUAL_STORE": url, "TMPDIR": str(tmp_path)}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str], file: Path) -> list[int]:
    deadline = time.monotonic() + SECONDS_MAX
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return json.loads(file.read_text())["processes"]


def test_it_serves_at_its_socket_with_its_password_and_leaves_nothing(serve: Serve, tmp_path: Path) -> None:
    url, file = f"unix://:secret@{tmp_path}/s", tmp_path / "ready.json"
    process = serve(url, "--memory", "32MiB", "--ready-file", str(file))
    pids = ready(process, file)
    with redis.Redis.from_url(url) as client:
        assert client.ping()
        assert client.config_get("maxmemory")["maxmemory"] == str(32 << 20)
    with (
        redis.Redis.from_url(f"unix://{tmp_path}/s") as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    for pid in pids:
        assert "secret" not in Path(f"/proc/{pid}/cmdline").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS_MAX) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ready.json"]


def test_the_end_of_its_server_is_its_own_and_is_said(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    process = serve(f"unix://:secret@{tmp_path}/s", "--ready-file", str(file))
    os.kill(ready(process, file)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 1
    assert errors == "rorqual kv: the embedded store ended: killed by SIGKILL (out of memory?)\n"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("unix:///tmp/s", "without a password would serve everyone"),
        ("redis://:secret@cache:6379", "is at redis://:password@127.0.0.1:port or unix://"),
        ("rediss://:secret@127.0.0.1:1", "is at redis://:password@127.0.0.1:port or unix://"),
        ("redis://one:secret@127.0.0.1:1", "one user and one database"),
        ("unix://:secret@/" + "x" * 200, "too long for a socket"),
    ],
)
def test_where_it_cannot_serve_is_said_without_the_password(serve: Serve, url: str, complaint: str) -> None:
    process = serve(url)
    _, errors = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 1
    assert complaint in errors
    assert "secret" not in errors
    assert "Traceback" not in errors
