"""Reads within one host: the owner's memory is mapped, for reading only, and copied from. Needs no package at all.

An owner never has to do anything for its readers, and a mapping outlives it: what is read from an owner that has died
in the meantime is what it last wrote. Whoever must know that it lives asks it (`kvstore.leases`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from kvstore.transfer.memory import Segments, make_segments, map_segments
from kvstore.transfer.runs import check_runs, match_endpoints, region_table

BACKEND = "shm"


class ShmBuilder:
    """Allocates what a ShmTransfer will export. Used once."""

    kind = BACKEND

    def __init__(self, agent: str, *, reason: str, segments: Segments | None = None) -> None:
        self.reason = reason
        self._agent = agent
        self._segments = segments or make_segments(agent)
        self._regions: list[Region] = []
        self._arrays: list[ByteArray] = []

    def allocate(self, name: str, unit_bytes: int, num_units: int) -> ByteArray:
        self._regions.append(Region(name=name, address=0, unit_bytes=unit_bytes, num_units=num_units))
        region_table(self._regions)
        self._arrays.append(self._segments.allocate(unit_bytes * num_units))
        return self._arrays[-1]

    def start(self) -> Transfer:
        endpoint = Endpoint(
            backend=BACKEND,
            agent=self._agent,
            metadata=self._segments.metadata,
            regions=tuple(self._regions),
        )
        return ShmTransfer(endpoint, self._segments, self._arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    regions: dict[str, Region]
    memory: dict[str, ByteArray]  # by region, read-only


class ShmTransfer:
    """Every post copies at once, so that no read is ever under way between two calls."""

    def __init__(self, endpoint: Endpoint, segments: Segments, arrays: Sequence[ByteArray]) -> None:
        self._endpoint = endpoint
        self._segments = segments
        self._regions = region_table(endpoint.regions)
        self._memory = dict(zip(self._regions, arrays, strict=True))
        self._peers: dict[PeerId, _Peer] = {}
        self._num_posted = 0
        self._done: set[ReadId] = set()

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def connect(self, peer: PeerId, endpoint: Endpoint) -> None:
        assert peer not in self._peers, f"peer {peer} is connected"
        theirs = match_endpoints(self._endpoint, endpoint)
        sizes = [item.address + item.unit_bytes * item.num_units for item in theirs.values()]
        segments = map_segments(endpoint.metadata, agent=endpoint.agent, sizes=sizes)
        memory = {
            item.name: segment_B[item.address :]
            for item, segment_B in zip(theirs.values(), segments, strict=True)
        }
        self._peers[peer] = _Peer(regions=theirs, memory=memory)

    def forget(self, peer: PeerId) -> None:
        self._peers.pop(peer, None)

    def post(self, peer: PeerId, runs: Sequence[Run]) -> ReadId:
        if (known := self._peers.get(peer)) is None:
            raise TransferError(f"peer {peer} is not connected")
        check_runs(runs, ours=self._regions, theirs=known.regions)
        for run in runs:
            source_B = known.memory[run.region][run.source : run.source + run.num_bytes]
            # numpy lets other threads run while it copies.
            self._memory[run.region][run.target : run.target + run.num_bytes] = source_B
        self._num_posted += 1
        read = ReadId(self._num_posted)
        self._done.add(read)
        return read

    def poll(self, read: ReadId) -> ReadState:
        self._done.remove(read)
        return ReadState.DONE

    def progress(self) -> None:
        pass

    def close(self) -> None:
        self._peers.clear()
        self._segments.close()
