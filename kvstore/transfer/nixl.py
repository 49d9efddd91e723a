"""Reads through NIXL over UCX: within a host by the kernel's cross-memory copies, between hosts by RDMA or tcp.

The progress thread of NIXL is off, since it spins a core: owner and reader both poll, through `progress` and `poll`.
The path is UCX's choice (UCX_TLS, UCX_NET_DEVICES); over tcp a read is emulated and waits until the owner polls.

Two rules come from how NIXL 1.5.1 behaves. A handle is never released while its read is active: the release reports
success and the data keep coming. Metadata are loaded only if they begin with the agent's name, and an agent's name
never gets other metadata than its first: bytes cut short poison a name for good. So names are fresh for each
incarnation, and whoever carries an endpoint checks its digest before it comes here.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.transfer.contract import (
    ByteArray,
    Endpoint,
    PeerId,
    ReadId,
    ReadState,
    Region,
    Run,
    Transfer,
    TransferError,
)
from kvstore.transfer.memory import zeroed
from kvstore.transfer.runs import check_runs, match_endpoints, region_table
from rorqual.errors import ConfigError

BACKEND = "nixl"

IDLE_AGENTS_MAX = 32
"""Owners that stay loaded when they are left. Over tcp, UCX keeps the socket of an owner that was removed until one of
the two processes ends, and opens another for each time it is loaded: so whoever is left and comes back finds the old
connection. One that has failed is removed, and so is the oldest beyond this bound."""

_log = logging.getLogger(__name__)

_never_closed: list[NixlTransfer] = []
"""Engines whose reads were still active when they were closed: their memory stays registered until the process ends."""


class NixlBuilder:
    """An agent with its UCX backend, and what it will export. Used once. Takes about half a second."""

    kind = BACKEND

    def __init__(self, agent: str, *, reason: str) -> None:
        """Raises ConfigError: NIXL does not load, or cannot open its UCX backend."""
        self.reason = reason
        self._name = agent
        self._nixl = _load_nixl()
        try:
            self._agent = self._nixl.open_agent(agent)
        except self._nixl.errors as error:
            raise ConfigError(f"nixl cannot open its UCX backend: {error}") from None
        self._regions: list[Region] = []
        self._arrays: list[ByteArray] = []

    def allocate(self, name: str, unit_bytes: int, num_units: int) -> ByteArray:
        memory_B = zeroed(unit_bytes * num_units)
        address = memory_B.ctypes.data
        self._regions.append(Region(name=name, address=address, unit_bytes=unit_bytes, num_units=num_units))
        self._arrays.append(memory_B)
        region_table(self._regions)
        return memory_B

    def start(self) -> Transfer:
        """Raises ConfigError."""
        rows = [(item.ctypes.data, item.nbytes, 0, "") for item in self._arrays]
        try:
            registered = self._agent.register_memory(rows, "DRAM") if rows else None
            metadata = self._agent.get_agent_metadata()
        except self._nixl.errors as error:
            raise ConfigError(f"nixl cannot register memory: {error}") from None
        assert metadata.startswith(_metadata_start(self._name)), "metadata of this NIXL begin otherwise"
        endpoint = Endpoint(
            backend=BACKEND, agent=self._name, metadata=metadata, regions=tuple(self._regions)
        )
        return NixlTransfer(self._nixl, self._agent, registered, endpoint, self._arrays)


class NixlTransfer:
    """The engine over one NIXL agent. One thread at a time uses it."""

    def __init__(
        self, nixl: _Nixl, agent: Any, registered: Any, endpoint: Endpoint, arrays: Sequence[ByteArray]
    ) -> None:
        self._errors = nixl.errors
        self._agent = agent
        self._registered = registered
        self._endpoint = endpoint
        self._arrays = arrays  # registered memory must stay
        self._regions = region_table(endpoint.regions)
        self._peers: dict[PeerId, _Peer] = {}
        self._agents: dict[str, _Agent] = {}  # by name; whose metadata are loaded
        self._reads: dict[ReadId, _Read] = {}
        self._num_posted = 0

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def connect(self, peer: PeerId, endpoint: Endpoint) -> None:
        assert peer not in self._peers, f"peer {peer} is connected"
        theirs = match_endpoints(self._endpoint, endpoint)
        agent = self._load(endpoint.agent, endpoint.metadata)
        agent.num_peers += 1
        self._peers[peer] = _Peer(agent=agent, regions=theirs)

    def _load(self, name: str, metadata: bytes) -> _Agent:
        known = self._agents.get(name)
        if known is not None:
            if known.metadata != metadata:
                raise TransferError(f"{name} is known with other metadata")
            return known
        if not metadata.startswith(_metadata_start(name)):
            raise TransferError(f"metadata of {name} are not its own")
        try:
            loaded = self._agent.add_remote_agent(metadata)
        except self._errors as error:
            raise TransferError(f"nixl refuses the metadata of {name}: {error}") from None
        assert loaded == name.encode(), f"metadata of {name} were loaded as {loaded}"
        self._agents[name] = _Agent(name=name, metadata=metadata)
        return self._agents[name]

    def forget(self, peer: PeerId) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        assert not any(item.peer == peer for item in self._reads.values()), "a read from the peer is open"
        known.agent.num_peers -= 1
        idle = [item for item in self._agents.values() if item.num_peers == 0]
        surplus = idle[: max(len(idle) - IDLE_AGENTS_MAX, 0)]
        for agent in idle:
            if agent.has_failed or agent in surplus:
                self._remove(agent)

    def _remove(self, agent: _Agent) -> None:
        del self._agents[agent.name]
        try:
            self._agent.remove_remote_agent(agent.name)
        except self._errors as error:
            _log.warning("agent %s was not removed: %s", agent.name, error)

    def post(self, peer: PeerId, runs: Sequence[Run]) -> ReadId:
        if (known := self._peers.get(peer)) is None:
            raise TransferError(f"peer {peer} is not connected")
        check_runs(runs, ours=self._regions, theirs=known.regions)
        targets_R3, sources_R3 = _rows(runs, self._regions, known.regions)
        try:
            targets = self._agent.get_xfer_descs(targets_R3, "DRAM")
            sources = self._agent.get_xfer_descs(sources_R3, "DRAM")
            handle = self._agent.initialize_xfer("READ", targets, sources, known.agent.name)
        except self._errors as error:
            known.agent.has_failed = True
            raise TransferError(f"a read from {known.agent.name} cannot be made: {error}") from None
        try:
            state = self._agent.transfer(handle)
        except self._errors as error:
            # Posting fails when the connection has failed; UCX has then ended every request on it.
            known.agent.has_failed = True
            self._release(handle)
            raise TransferError(f"a read from {known.agent.name} cannot be posted: {error}") from None
        self._num_posted += 1
        read = ReadId(self._num_posted)
        self._reads[read] = _Read(peer=peer, agent=known.agent, handle=handle, is_done=state == "DONE")
        return read

    def poll(self, read: ReadId) -> ReadState:
        item = self._reads[read]
        try:
            if not item.is_done and self._agent.check_xfer_state(item.handle) != "DONE":
                return ReadState.PENDING
        except self._errors as error:
            # An error of a request is the end of its connection (error mode "peer"): nothing comes any more.
            item.agent.has_failed = True
            self._end(read)
            raise TransferError(f"a read from {item.agent.name} failed: {error}") from None
        self._end(read)
        return ReadState.DONE

    def _end(self, read: ReadId) -> None:
        self._release(self._reads.pop(read).handle)

    def _release(self, handle: Any) -> None:
        try:
            handle.release()
        except self._errors as error:
            _log.warning("a handle was not released: %s", error)

    def progress(self) -> None:
        """Asking for notifications is what drives UCX; it takes 1 us when there is nothing to do. Nobody sends any,
        and what came is dropped."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        if self._reads:
            _never_closed.append(self)
            return
        self._peers.clear()
        for agent in list(self._agents.values()):
            self._remove(agent)
        if self._registered is not None:
            try:
                self._agent.deregister_memory(self._registered)
            except self._errors as error:
                _log.warning("memory was not deregistered: %s", error)
        self._registered = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Agent:
    """An owner that NIXL knows."""

    name: str
    metadata: bytes
    num_peers: int = 0  # that stand for it
    has_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    agent: _Agent
    regions: dict[str, Region]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    peer: PeerId
    agent: _Agent
    handle: Any
    is_done: bool  # when it was posted


def _rows(
    runs: Sequence[Run], ours: dict[str, Region], theirs: dict[str, Region]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Descriptors of targets and sources, [R, 3]: address, bytes, device. R: runs."""
    targets_R3 = np.zeros((len(runs), 3), dtype=np.uint64)
    targets_R3[:, 0] = [ours[run.region].address + run.target for run in runs]
    targets_R3[:, 1] = [run.num_bytes for run in runs]
    sources_R3 = targets_R3.copy()
    sources_R3[:, 0] = [theirs[run.region].address + run.source for run in runs]
    return targets_R3, sources_R3


def _metadata_start(agent: str) -> bytes:
    """How NIXL 1.5.1 begins an agent's metadata: whose they are can be told before they are loaded."""
    name = agent.encode()
    return b"nixlSerDes|Agent" + len(name).to_bytes(8, "little") + name + b"|"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Nixl:
    """The package, which tells its types to nobody."""

    package: Any
    errors: tuple[type[Exception], ...]  # that have no common base of their own

    def open_agent(self, name: str) -> Any:
        config = self.package.nixl_agent_config(enable_prog_thread=False, backends=[])
        agent = self.package.nixl_agent(name, config)
        agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        return agent


def _load_nixl() -> _Nixl:
    """Raises ConfigError. Imported here and not above: it is 240 MB of libraries that only exist for Linux."""
    raises = logging.raiseExceptions
    try:
        package = importlib.import_module("nixl_cu13")
        bindings = importlib.import_module("nixl_cu13._bindings")
    except ImportError as error:
        raise ConfigError(f"nixl does not load: {error}") from None
    finally:
        logging.raiseExceptions = raises  # which it sets
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it tells stdout of every agent
    found = [item for name, item in vars(bindings).items() if name.endswith("Error")]
    return _Nixl(package=package, errors=(*found, RuntimeError))
