"""Settings of a client's socket. Called by `router.gateway.http1` for each connection; it never waits."""

from __future__ import annotations

import contextlib
import socket


def keep_probing(sock: socket.socket | None) -> None:
    """Let the kernel notice within about a minute a client whose machine vanished without a word."""
    if sock is None:
        return
    with contextlib.suppress(OSError):  # a refinement: not every platform lets us
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
