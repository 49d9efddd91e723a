"""Real little clusters for the supervisor's tests, and the proof that nothing of them is left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.demo import CONFIG

SCRIPT = Path(__file__).with_name("fake_cluster.py")
SECONDS_MAX = 20.0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        # A zombie has ended: it only waits for its new parent to look at it.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return Path("/proc/self").exists() is False


def wait_for(condition, *, what: str) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.01)


class Cluster:
    """A supervisor process with fake children."""

    def __init__(
        self, folder: Path, *, behaviour: dict, options: tuple[str, ...], stdout, environment: dict[str, str]
    ) -> None:
        model = folder / "tiny"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        self.ready_file = folder / "ready.json"
        self.errors = folder / "errors.txt"
        command = [sys.executable, str(SCRIPT), json.dumps(behaviour), "up", "--model", str(model)]
        command += [
            "--http",
            "0",
            "--grpc",
            "0",
            "--ready-file",
            str(self.ready_file),
            "--redis",
            "none",
            *options,
        ]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=errors, env=environment)

    def ready(self) -> dict:
        wait_for(lambda: self.ready_file.exists() or self.process.poll() is not None, what="the ready file")
        assert self.process.poll() is None, self.errors.read_text()
        return json.loads(self.ready_file.read_text())

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(SECONDS_MAX)

    def assert_gone(self, processes: list[int]) -> None:
        assert len(processes) >= 3
        wait_for(lambda: not any(map(is_alive, processes)), what=f"the end of {processes}")


@pytest.fixture(name="is_alive")
def is_alive_fixture():
    return is_alive


@pytest.fixture
def start_cluster(tmp_path):
    clusters = []

    def start(
        behaviour: dict | None = None, *options: str, stdout=None, environment: dict[str, str] | None = None
    ) -> Cluster:
        output = (tmp_path / "output.txt").open("w") if stdout is None else None
        # What the machine that runs the tests says to UCX, and of stores, is none of their business.
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("UCX_") and name != "RORQUAL_STORE"
        }
        cluster = Cluster(
            tmp_path,
            behaviour=behaviour or {},
            options=options,
            stdout=output or stdout,
            environment=own | (environment or {}),
        )
        if output is not None:
            output.close()
            cluster.output = tmp_path / "output.txt"
        clusters.append(cluster)
        return cluster

    yield start
    for cluster in clusters:
        if cluster.process.poll() is None:
            cluster.process.kill()
        cluster.process.wait(SECONDS_MAX)
        if cluster.process.stdout is not None:
            cluster.process.stdout.close()
