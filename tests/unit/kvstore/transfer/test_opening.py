"""Which engine is opened, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.transfer import nixl
from kvstore.transfer.contract import PeerId, Run
from kvstore.transfer.opening import open_transfer
from rorqual.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
linux = pytest.mark.skipif(sys.platform != "linux", reason="nixl has no package for this system")

OPEN = """
import sys
from kvstore.transfer.opening import open_transfer
from rorqual.errors import ConfigError
try:
    builder = open_transfer(sys.argv[1], agent="owner#1")
except ConfigError as error:
    print("ConfigError:", error)
else:
    print(builder.kind)
    print(builder.reason)
"""


def opened(kind: str, *, tls: str) -> list[str]:
    """What a process prints, in lines."""
    environment = {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "fatal", "UCX_TLS": tls, "PATH": ""}
    command = [sys.executable, "-c", OPEN, kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
@pytest.mark.slow
def test_auto_is_nixl_where_it_works():
    assert opened("auto", tls="tcp") == ["nixl", "nixl, since it loads and has opened its UCX backend"]


@linux
@pytest.mark.slow
def test_auto_is_shm_where_ucx_cannot_be_opened():
    kind, reason = opened("auto", tls="posix")
    assert kind == "shm"
    assert reason.startswith("shm, since nixl cannot open its UCX backend: ")


@linux
@pytest.mark.slow
def test_nixl_asked_for_by_name_is_an_error_where_it_does_not_work():
    (line,) = opened("nixl", tls="posix")
    assert line.startswith("ConfigError: nixl cannot open its UCX backend: ")


def test_auto_is_shm_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    builder = open_transfer("auto", agent="owner#1")
    assert builder.kind == "shm"
    assert builder.reason.startswith("shm, since nixl does not load: ")
    with pytest.raises(ConfigError, match="nixl does not load"):
        open_transfer("nixl", agent="owner#1")


def test_shm_is_what_it_is_told_to_be():
    builder = open_transfer("shm", agent="owner#1")
    assert (builder.kind, builder.reason) == ("shm", "shm, as configured")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="auto, nixl, shm, not 'rdma'"):
        open_transfer("rdma", agent="owner#1")


def test_an_engine_describes_what_it_exports():
    builder = open_transfer("shm", agent="owner#1")
    c4_B = builder.allocate("c4", 100, 7)
    records_B = builder.allocate("records", 5, 3)
    engine = builder.start()
    assert (len(c4_B), len(records_B)) == (700, 15)
    assert engine.endpoint.agent == "owner#1"
    described = [(item.name, item.unit_bytes, item.num_units) for item in engine.endpoint.regions]
    assert described == [("c4", 100, 7), ("records", 5, 3)]
    engine.close()
    c4_B[:] = 1  # memory outlives the engine


def test_a_target_outside_our_own_memory_is_a_broken_invariant():
    """Where a read goes is never a peer's word."""
    engines = []
    for agent in ("owner#1", "reader#1"):
        builder = open_transfer("shm", agent=agent)
        builder.allocate("c4", 100, 7)
        engines.append(builder.start())
    owner, reader = engines
    reader.connect(PeerId(1), owner.endpoint)
    with pytest.raises(AssertionError, match="beyond region 'c4' here"):
        reader.post(PeerId(1), [Run(region="c4", source=0, target=601, num_bytes=100)])
    with pytest.raises(AssertionError, match="peer 1 is connected"):
        reader.connect(PeerId(1), owner.endpoint)
    for engine in engines:
        engine.close()


def test_metadata_say_whose_they_are():
    start = nixl._metadata_start("peer#1")
    assert b"peer#1" in start
    assert not start.startswith(nixl._metadata_start("peer#"))
