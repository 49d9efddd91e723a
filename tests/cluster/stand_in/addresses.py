"""Addresses of pods and Services: a range of the loopback that no other stand-in of this machine has.

A range is 127.N.0.0/16. Whoever listens at its guard's port has it, so it is free again when that process has ended,
however it ended. Linux answers on all of 127.0.0.0/8 without being told to.
"""

from __future__ import annotations

import contextlib
import os
import socket

FIRST, LAST = 10, 250
GUARD_PORT = 47999
PER_NETWORK = 250


class Addresses:
    """Raises OSError when made where every range is taken. `close` gives it back."""

    def __init__(self) -> None:
        self._num_pods = 0
        self._num_services = 0
        num_ranges = LAST - FIRST + 1
        for turn in range(num_ranges):
            number = FIRST + (os.getpid() + turn) % num_ranges  # two that begin at once mostly begin apart
            guard = socket.socket()
            with contextlib.suppress(OSError):
                guard.bind((f"127.{number}.255.254", GUARD_PORT))
                guard.listen(1)
                self._guard, self._prefix = guard, f"127.{number}"
                return
            guard.close()
        raise OSError("every range of addresses for a stand-in is taken")

    def close(self) -> None:
        self._guard.close()

    def next_pod(self) -> str:
        """Never one that was given before: an address that came back would hide who was meant."""
        self._num_pods += 1
        return self._address(1, self._num_pods)

    def next_service(self) -> str:
        self._num_services += 1
        return self._address(128, self._num_services)

    def _address(self, first_network: int, number: int) -> str:
        network, host = divmod(number - 1, PER_NETWORK)
        assert network < 100, "a stand-in has no more addresses"
        return f"{self._prefix}.{first_network + network}.{host + 1}"
