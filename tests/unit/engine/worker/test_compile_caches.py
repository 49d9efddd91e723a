"""Directories of compiled kernels that a worker cannot use are told of, and no others."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.worker.compile_caches import unusable_caches


def test_directories_that_are_there_or_can_be_made_are_fine(tmp_path: Path):
    (tmp_path / "there").mkdir()
    environment = {
        "NUMBA_CACHE_DIR": str(tmp_path / "there"),
        "TRITON_CACHE_DIR": str(tmp_path / "made" / "here"),
        "OTHER": "/proc/no",
    }
    assert unusable_caches(environment) == []
    assert unusable_caches({"NUMBA_CACHE_DIR": ""}) == []


def test_what_cannot_be_made_is_named_with_its_variable(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (line,) = unusable_caches({"NUMBA_CACHE_DIR": str(tmp_path / "file" / "numba"), "HOME": "/tmp"})
    assert "/tmp/.cache" in line
    (other,) = unusable_caches({"TRITON_CACHE_DIR": str(tmp_path / "file" / "triton")})
    assert other.endswith("; its first kernel will fail")
    assert line.startswith(f"NUMBA_CACHE_DIR={tmp_path}/file/numba: ")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_a_directory_of_roots_is_of_no_use_to_another_user(tmp_path: Path):
    """As a kubelet makes one of a node's path."""
    folder = Path(tempfile.mkdtemp())  # whose way is open to all, as that of tmp_path is not
    folder.chmod(0o755)
    environment = {"TRITON_CACHE_DIR": str(folder), "NUMBA_CACHE_DIR": str(folder / "numba")}
    script = (
        "import os; from engine.worker.compile_caches import unusable_caches; os.setuid(10001);"
        f"print(unusable_caches({environment!r}))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    finally:
        folder.rmdir()
    assert "user 10001 may not write there" in done.stdout, done.stderr
    assert "Permission denied" in done.stdout
