"""`rorqual up` as a child process, for programs that measure it from outside: benchmarks and the demo model's card.

Owns the child from start to end. It asks nothing that a user could not: the ready file, HTTP, /metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rorqual.errors import RorqualError

START_SECONDS_MAX = 300.0
STOP_SECONDS_MAX = 60.0
ASK_SECONDS_MAX = 600.0


class LocalCluster:
    """Running within its `with` block. `options` are those of `rorqual up` after --model. Raises RorqualError with what
    the child last said when it does not come up."""

    def __init__(self, model: Path, *options: str) -> None:
        self._model = model
        self._options = options
        self.http = ""  # URL
        self.metrics_urls: list[str] = []  # of the workers

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="rorqual-cluster-")
        folder = Path(self._folder.name)
        self._output = folder / "output.txt"
        ready_file = folder / "ready.json"
        command = [sys.executable, "-m", "rorqual.cli", "--parent", str(os.getpid()), "up"]
        command += [
            "--model",
            str(self._model),
            "--http",
            "0",
            "--grpc",
            "0",
            "--redis",
            "none",  # what is measured is measured without, unless options say otherwise
            "--ready-file",
            str(ready_file),
        ]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not ready_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._said()
                self._end()
                raise RorqualError(f"`rorqual up` did not come up; the last it said:\n{said[-2000:]}")
            time.sleep(0.05)
        self.http = json.loads(ready_file.read_text(encoding="utf-8"))["http"]
        self.metrics_urls = re.findall(r"became ready .*metrics=(\S+)", self._said())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON, e.g. to "/v1/completions". Raises RorqualError with the server's own words."""
        request = urllib.request.Request(
            f"{self.http}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ASK_SECONDS_MAX) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RorqualError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
        except OSError as error:
            raise RorqualError(f"{path}: {error}") from None

    def metrics(self) -> dict[str, float]:
        """Everything the workers export, summed over workers and labels, by name."""
        totals: dict[str, float] = {}
        for url in self.metrics_urls:
            with urllib.request.urlopen(url, timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    found = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", line)
                    if found:
                        totals[found[1]] = totals.get(found[1], 0.0) + float(found[2])
        return totals

    def _said(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX)
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
