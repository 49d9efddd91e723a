"""Two engines of one-sided reads, one of them over two transports, each between real processes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.harness.transfer import OWNER_SEED, READER_SEED, REGIONS, Peer, RegionSizes, Variant

linux = pytest.mark.skipif(sys.platform != "linux", reason="nixl has no package for this system")
VARIANTS = [
    pytest.param(Variant(kind="shm", sees_death=False), id="shm"),
    pytest.param(
        Variant(kind="nixl", tls="tcp", needs_owner="always"), id="nixl-tcp", marks=[linux, pytest.mark.slow]
    ),
    pytest.param(
        Variant(kind="nixl", tls="tcp,cma", needs_owner="first"),
        id="nixl-cma",
        marks=[linux, pytest.mark.slow],
    ),
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(scope="module")
def make_peer(variant: Variant) -> Iterator[Callable[..., Peer]]:
    """Starts a process of the variant, without waiting until it is there."""
    made: list[Peer] = []
    numbers = itertools.count(1)

    def make(*, regions: RegionSizes = REGIONS) -> Peer:
        peer = Peer(variant.kind, f"peer-{next(numbers)}#1", regions, env=variant.env)
        made.append(peer)
        return peer

    yield make
    for peer in made:
        peer.close()


@pytest.fixture(scope="module")
def make_owner(make_peer: Callable[..., Peer]) -> Callable[..., Peer]:
    """Starts a process that is filled and exposed."""

    def make(*, seed: int = OWNER_SEED, regions: RegionSizes = REGIONS) -> Peer:
        owner = make_peer(regions=regions)
        owner.fill(seed)
        owner.expose(True)
        return owner

    return make


@pytest.fixture(scope="module")
def lasting_reader(make_peer: Callable[..., Peer]) -> Peer:
    return make_peer()


@pytest.fixture
def reader(lasting_reader: Peer) -> Peer:
    lasting_reader.fill(READER_SEED)
    return lasting_reader


@pytest.fixture(scope="module")
def owner(lasting_reader: Peer, make_owner: Callable[..., Peer]) -> Peer:
    """Lives to the end. The reader is started first, so that both load at once."""
    return make_owner()
