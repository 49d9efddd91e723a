"""Exported memory: zeroed, aligned, mapped read-only by others, gone with its owner."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvstore.transfer.contract import TransferError
from kvstore.transfer.memory import FileSegments, NamedSegments, make_segments, map_segments, zeroed

ROOT = Path(__file__).resolve().parents[4]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs anonymous files with seals")
KINDS = [pytest.param(False, id="file", marks=linux), pytest.param(True, id="named")]


@pytest.mark.parametrize("num_bytes", [1, 4095, 1_000_001])
def test_plain_memory_is_zeroed_and_aligned(num_bytes: int):
    memory_B = zeroed(num_bytes)
    assert memory_B.shape == (num_bytes,)
    assert memory_B.ctypes.data % 4096 == 0
    assert not memory_B.any()
    memory_B[:] = 1


@pytest.mark.parametrize("named", KINDS)
def test_another_sees_what_the_owner_writes_but_cannot_write_itself(named: bool):
    segments = make_segments("owner#1", named=named)
    ours = [segments.allocate(5000), segments.allocate(100)]
    assert all(item.ctypes.data % 4096 == 0 and not item.any() for item in ours)
    theirs = map_segments(segments.metadata, agent="owner#1", sizes=[5000, 100])
    assert [len(item) for item in theirs] == [5000, 100]
    ours[0][:] = 3
    ours[1][7] = 5
    assert (theirs[0] == 3).all()
    assert theirs[1].tolist() == ours[1].tolist()
    with pytest.raises(ValueError, match="read-only"):
        theirs[0][0] = 1
    segments.close()
    ours[0][0] = 9
    assert theirs[0][0] == 9, "a mapping does not outlive its owner's close"


@pytest.mark.parametrize("named", KINDS)
def test_nothing_is_mapped_once_the_owner_has_closed(named: bool):
    segments = make_segments("owner#1", named=named)
    segments.allocate(5000)
    metadata = segments.metadata
    segments.close()
    with pytest.raises(TransferError, match="cannot be mapped"):
        map_segments(metadata, agent="owner#1", sizes=[5000])


@pytest.mark.parametrize("named", KINDS)
def test_a_segment_shorter_than_its_region_is_refused(named: bool):
    segments = make_segments("owner#1", named=named)
    segments.allocate(5000)
    with pytest.raises(TransferError, match="bytes, not 10000"):
        map_segments(segments.metadata, agent="owner#1", sizes=[10_000])
    with pytest.raises(TransferError, match="1 segments for 2 regions"):
        map_segments(segments.metadata, agent="owner#1", sizes=[5000, 5000])
    segments.close()


@linux
def test_what_lies_where_an_owner_was_is_not_taken_for_it(tmp_path: Path):
    """The owner's process number and descriptors are another's by now."""
    segments = make_segments("owner#1")
    segments.allocate(5000)
    with pytest.raises(TransferError, match="the owner is gone"):
        map_segments(segments.metadata, agent="owner#2", sizes=[5000])
    segments.close()
    with open(tmp_path / "other", "w+b") as other:
        other.write(bytes(5000))
        metadata = msgspec.msgpack.encode(FileSegments(pid=os.getpid(), fds=(other.fileno(),)))
        with pytest.raises(TransferError, match="the owner is gone"):
            map_segments(metadata, agent="owner#1", sizes=[5000])


@linux
def test_exported_memory_cannot_shrink_under_a_reader():
    segments = make_segments("owner#1")
    segments.allocate(8192)
    (fd,) = msgspec.msgpack.decode(segments.metadata, type=FileSegments).fds
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    segments.close()


@pytest.mark.parametrize("metadata", [b"", b"\xff\x00", msgspec.msgpack.encode(["FileSegments", "x", []])])
def test_metadata_that_are_none_are_refused(metadata: bytes):
    with pytest.raises(TransferError, match="cannot be read"):
        map_segments(metadata, agent="owner#1", sizes=[])


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "nothing-of-this-name", ""])
def test_a_name_that_is_no_segment_is_refused(name: str):
    metadata = msgspec.msgpack.encode(NamedSegments(names=(name,)))
    with pytest.raises(TransferError, match="cannot be mapped"):
        map_segments(metadata, agent="owner#1", sizes=[1])


NAMED_OWNER = """
import sys
from kvstore.transfer.memory import make_segments
segments = make_segments("owner#1", named=True)
segments.allocate(5000)[:] = 7
print(segments.metadata.hex(), flush=True)
sys.stdin.read()
segments.close()
"""

NAMED_READER = """
import sys
from kvstore.transfer.memory import map_segments
found = map_segments(bytes.fromhex(sys.argv[1]), agent="owner#1", sizes=[5000])
assert (found[0] == 7).all()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ends", "is killed"])
def test_named_memory_survives_its_readers_and_goes_with_its_owner(ending: str):
    command = [sys.executable, "-c", NAMED_OWNER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=ROOT) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        metadata = bytes.fromhex(owner.stdout.readline().decode())
        for _ in range(2):
            reader = [sys.executable, "-c", NAMED_READER, metadata.hex()]
            done = subprocess.run(reader, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, "")
        if ending == "is killed":
            owner.kill()
        owner.stdin.close()
        owner.wait(timeout=60)
    _wait_until_gone(metadata)


def _wait_until_gone(metadata: bytes) -> None:
    """A killed owner's resource tracker takes a moment."""
    end = time.monotonic() + 10
    while True:
        try:
            map_segments(metadata, agent="owner#1", sizes=[5000])
        except TransferError:
            return
        assert time.monotonic() < end, "memory was left behind"
        time.sleep(0.05)


def test_arrays_keep_their_memory():
    segments = make_segments("owner#1")
    memory_B = segments.allocate(5000)
    segments.close()
    del segments
    memory_B[:] = np.arange(5000) % 251
    assert memory_B[4999] == 4999 % 251
