"""`rorqual kv serve`: an embedded server as a process of its own, at a URL that somebody else has chosen.

`kvstore.store.cli` calls it; `rorqual up` starts it, which cannot start the server itself: it stands below this
package. The URL, with the password that the server will ask for, comes by the environment: arguments are for everyone
to read. Everything that the server keeps is in memory, and gone when it ends.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from kvstore.store.address import parse_address
from kvstore.store.embedded import EmbeddedServer
from rorqual.errors import ConfigError, RorqualError
from rorqual.processes import describe_exit
from rorqual.service import write_ready_file

LOOPBACK = ("127.0.0.1", "localhost")

_POLL_SECONDS = 0.1


def serve(url: str, *, memory_bytes: int, ready_file: Path | None, network: bool = False) -> None:
    """Until SIGTERM or SIGINT. Raises RorqualError when the server cannot start, or ends by itself. `ready_file` gets
    the ids of both processes once it answers. `network`: the URL may name any address of this machine."""
    server = _server(url, memory_bytes=memory_bytes, network=network)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        server.start()
        write_ready_file(ready_file, {"processes": [os.getpid(), server.pid]})
        while (status := server.exit_status) is None:
            time.sleep(_POLL_SECONDS)
        raise RorqualError(f"the embedded store ended: {describe_exit(status)}")
    except _Stopped:
        return
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is stopping, within a bound
        server.stop()


def _server(url: str, *, memory_bytes: int, network: bool) -> EmbeddedServer:
    """Raises ConfigError, which never shows the password, and EmbeddedFailed."""
    address = parse_address(url)
    options, password = address.options, address.options.get("password")
    if not password:
        raise ConfigError(f"{address.shown}: a store without a password would serve everyone on this machine")
    if options.get("username") or options.get("db"):
        raise ConfigError(f"{address.shown}: an embedded store has one user and one database, without names")
    if "path" in options:
        return EmbeddedServer(memory_bytes=memory_bytes, socket_file=Path(options["path"]), password=password)
    if not address.shown.startswith("redis://") or (options["host"] not in LOOPBACK and not network):
        raise ConfigError(
            f"{address.shown}: an embedded store is at redis://:password@127.0.0.1:port or unix://:password@/path;"
            " with --network at any address of this machine"
        )
    host = "127.0.0.1" if options["host"] == "localhost" else options["host"]
    return EmbeddedServer(memory_bytes=memory_bytes, host=host, port=options["port"], password=password)


class _Stopped(BaseException):
    """Asked to end. Nothing on the way may take it for a failure."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped
