"""What NixlTransfer asks of NIXL, over a NIXL that only keeps count."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.transfer import nixl
from kvstore.transfer.contract import Endpoint, PeerId, Region, Run, TransferError
from kvstore.transfer.nixl import IDLE_AGENTS_MAX, NixlTransfer

REGION = Region(name="c4", address=4096, unit_bytes=10, num_units=4)
RUN = Run(region="c4", source=0, target=0, num_bytes=10)


class Refused(Exception):
    """Stands for the errors of NIXL, which have no base in common."""


class CountingAgent:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.released: list[str] = []
        self.num_registered = 1
        self.state = "PROC"

    def add_remote_agent(self, metadata: bytes) -> bytes:
        name = metadata.split(b"|")[1][len("Agent") + 8 :]
        assert name.decode() not in self.loaded, "loaded twice"
        self.loaded.append(name.decode())
        return name

    def remove_remote_agent(self, name: str) -> None:
        self.loaded.remove(name)

    def get_xfer_descs(self, rows_R3: Any, memory: str) -> list[list[int]]:
        return rows_R3.tolist()

    def initialize_xfer(self, operation: str, targets: Any, sources: Any, name: str) -> Handle:
        assert operation == "READ"
        assert name in self.loaded
        return Handle(self, name)

    def transfer(self, handle: Handle) -> str:
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: Handle) -> str:
        if self.state == "ERR":
            raise Refused("NIXL_ERR_REMOTE_DISCONNECT")
        return self.state

    def deregister_memory(self, registered: object) -> None:
        self.num_registered -= 1


class Handle:
    def __init__(self, agent: CountingAgent, name: str) -> None:
        self._agent = agent
        self._name = name

    def release(self) -> None:
        self._agent.released.append(self._name)


def make_transfer() -> tuple[NixlTransfer, CountingAgent]:
    agent = CountingAgent()
    package = nixl._Nixl(package=None, errors=(Refused,))
    return NixlTransfer(package, agent, object(), endpoint("reader#1"), []), agent


def endpoint(name: str) -> Endpoint:
    return Endpoint(backend="nixl", agent=name, metadata=nixl._metadata_start(name), regions=(REGION,))


def test_only_so_many_owners_stay_loaded_when_they_are_left():
    transfer, agent = make_transfer()
    for number in range(IDLE_AGENTS_MAX + 5):
        transfer.connect(PeerId(number), endpoint(f"owner#{number}"))
    for number in range(IDLE_AGENTS_MAX + 5):
        transfer.forget(PeerId(number))
    assert agent.loaded == [f"owner#{number}" for number in range(5, IDLE_AGENTS_MAX + 5)]
    transfer.forget(PeerId(99))  # unknown
    transfer.close()
    assert agent.loaded == []
    assert agent.num_registered == 0


def test_an_owner_whose_connection_has_failed_is_removed_when_it_is_left():
    transfer, agent = make_transfer()
    transfer.connect(PeerId(1), endpoint("owner#1"))
    transfer.connect(PeerId(2), endpoint("owner#1"))
    read = transfer.post(PeerId(1), [RUN])
    agent.state = "ERR"
    with pytest.raises(TransferError, match="from owner#1 failed"):
        transfer.poll(read)
    transfer.forget(PeerId(1))
    assert agent.loaded == ["owner#1"]
    transfer.forget(PeerId(2))
    assert agent.loaded == []


def test_every_handle_is_released_once_and_none_while_its_read_is_active():
    transfer, agent = make_transfer()
    transfer.connect(PeerId(1), endpoint("owner#1"))
    reads = [transfer.post(PeerId(1), [RUN]) for _ in range(3)]
    assert [transfer.poll(read).name for read in reads] == ["PENDING"] * 3
    assert agent.released == []
    agent.state = "DONE"
    assert [transfer.poll(read).name for read in reads] == ["DONE"] * 3
    assert agent.released == ["owner#1"] * 3
    reads = [transfer.post(PeerId(1), [RUN])]
    assert agent.released == ["owner#1"] * 3
    assert transfer.poll(reads[0]).name == "DONE"
    assert agent.released == ["owner#1"] * 4


def test_memory_stays_registered_when_a_read_is_active_at_the_end():
    transfer, agent = make_transfer()
    transfer.connect(PeerId(1), endpoint("owner#1"))
    transfer.post(PeerId(1), [RUN])
    transfer.close()
    assert agent.num_registered == 1
    assert agent.released == []
    assert agent.loaded == ["owner#1"]
    nixl._never_closed.remove(transfer)
