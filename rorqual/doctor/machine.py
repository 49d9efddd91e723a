"""Checks of this machine: versions, model directory, GPU, shared memory, limits, network devices.

Each judgement is a pure function of facts; the functions that gather facts are below them. Called by
`rorqual.doctor.process`. Imports nothing that a check is about: torch is looked up, not loaded.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rorqual import __version__
from rorqual.doctor.finding import Finding, fail, ok, warn
from rorqual.errors import RorqualError
from rorqual.model_config import load_model_config

GB = 1e9
_SHOWN = ("torch", "grpcio", "nixl-cu13")


def judge_versions(
    python: str, installed: Mapping[str, str | None], pins: Mapping[str, str]
) -> list[Finding]:
    """`installed`: versions by package, None for what is missing. `pins`: the exact version wanted, "" for any."""
    found = [ok("versions", _version_line(python, installed))]
    for name, pin in pins.items():
        version = installed.get(name)
        if version is None:
            cure = f"pip install {name}{'==' + pin if pin else ''}"
            found.append(
                warn("versions", "NIXL is not installed: reads go through shared memory, on one host", cure)
                if name.startswith("nixl")
                else fail("versions", f"{name} is not installed", cure)
            )
        elif pin and version.partition("+")[0] != pin:
            found.append(
                warn("versions", f"{name} is {version}; tested is {pin}", f"pip install {name}=={pin}")
            )
    return found


def _version_line(python: str, installed: Mapping[str, str | None]) -> str:
    shown = [f"{name} {installed.get(name) or 'missing'}" for name in _SHOWN]
    return f"rorqual {__version__}, Python {python}, {', '.join(shown)}"


def look_at_versions() -> list[Finding]:
    pins: dict[str, str] = {}
    for requirement in metadata.requires("rorqual") or ():
        text, _, marker = requirement.partition(";")
        parsed = re.match(r"([A-Za-z0-9._-]+)(?:==([^,;\s]+))?", text.strip())
        if parsed and "extra" not in marker and ("win32" not in marker):
            pins[parsed[1]] = parsed[2] or ""
    installed: dict[str, str | None] = {}
    for name in (*pins, *_SHOWN):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return judge_versions(platform.python_version(), installed, pins)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    has_config: bool
    config_error: str = ""
    has_tokenizer: bool = False
    shards_wanted: tuple[str, ...] = ()
    shards: Mapping[str, int]  # bytes of those there
    bytes_free: int | None = None  # memory that this machine could give


def judge_model(facts: ModelFacts) -> list[Finding]:
    if not facts.has_config:
        return [fail("model", "no config.json", "--model names the directory of a checkpoint")]
    if facts.config_error:
        return [fail("model", facts.config_error, "compare config.json with the released one")]
    found: list[Finding] = []
    if not facts.has_tokenizer:
        found.append(
            warn("model", "no tokenizer.json: prompts must be token ids", "copy it from the release")
        )
    missing = [name for name in facts.shards_wanted if name not in facts.shards]
    if missing:
        text = f"{len(missing)} of {len(facts.shards_wanted)} shards are missing, first {missing[0]}"
        found.append(fail("model", text, "finish the download; `rorqual checkpoint verify` reads it all"))
    elif not facts.shards:
        found.append(fail("model", "no weights (*.safetensors)", "finish the download"))
    size = sum(facts.shards.values())
    if facts.bytes_free is not None and size > facts.bytes_free:
        text = f"weights have {size / GB:.1f} GB, and {facts.bytes_free / GB:.1f} GB of memory are free"
        found.append(warn("model", text, "enough where a GPU takes them; a CPU worker needs more memory"))
    if not found:
        found.append(ok("model", f"config, tokenizer and {len(facts.shards)} shards, {size / GB:.2f} GB"))
    return found


def look_at_model(folder: Path) -> list[Finding]:
    error = ""
    if (folder / "config.json").is_file():
        try:
            load_model_config(folder)
        except RorqualError as flaw:
            error = str(flaw)
    index = folder / "model.safetensors.index.json"
    wanted: tuple[str, ...] = ()
    if index.is_file():
        wanted = tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    shards = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    return judge_model(
        ModelFacts(
            has_config=(folder / "config.json").is_file(),
            config_error=error,
            has_tokenizer=(folder / "tokenizer.json").is_file(),
            shards_wanted=wanted,
            shards=shards,
            bytes_free=_bytes_available(),
        )
    )


def _bytes_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


async def look_at_gpus() -> list[Finding]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return [ok("gpu", "none (no nvidia-smi): workers compute on the CPU")]
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    process = await asyncio.create_subprocess_exec(
        command,
        query,
        "--format=csv,noheader",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return judge_gpus(process.returncode or 0, output.decode(errors="replace"))


def judge_gpus(status: int, output: str) -> list[Finding]:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if status != 0:
        said = lines[0] if lines else f"nvidia-smi ended with status {status}"
        return [fail("gpu", said, "reinstall the driver, or reboot after its update")]
    return [ok("gpu", line) for line in lines] or [ok("gpu", "none: workers compute on the CPU")]


def has_ipc_lock(status: str) -> bool:
    """Whether a process with this /proc/PID/status may lock memory beyond its limit (capability 14 of Linux)."""
    effective = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(effective) and bool(int(effective[0], 16) >> 14 & 1)


def judge_system(
    *,
    shm_bytes: int | None,
    memlock_bytes: int,
    ipc_lock: bool,
    files_max: int,
    rdma: Sequence[tuple[str, str]],
) -> list[Finding]:
    """`memlock_bytes` -1: without limit, which `ipc_lock` lifts too. `rdma`: devices with the state of their port."""
    found: list[Finding] = []
    if shm_bytes is not None and shm_bytes < 1 * GB:
        cure = "in a container: a larger /dev/shm (an emptyDir with medium Memory, or --shm-size)"
        found.append(warn("shared memory", f"/dev/shm has {shm_bytes / GB:.2f} GB free", cure))
    elif shm_bytes is not None:
        found.append(ok("shared memory", f"/dev/shm has {shm_bytes / GB:.1f} GB free"))
    if files_max < 4096:
        found.append(warn("open files", f"at most {files_max}", "ulimit -n 65536: a client is a file"))
    else:
        found.append(ok("open files", f"at most {files_max}"))
    down = [name for name, state in rdma if "ACTIVE" not in state]
    if rdma and memlock_bytes != -1 and not ipc_lock:
        text = f"{memlock_bytes} bytes may be locked, and RDMA locks what it registers"
        cure = "ulimit -l unlimited (in a pod: LimitMEMLOCK=infinity for containerd, or root with IPC_LOCK)"
        found.append(warn("locked memory", text, cure))
    if down:
        found.append(
            warn("rdma", f"ports that are not active: {', '.join(down)}", "look at cable and switch")
        )
    elif rdma:
        found.append(ok("rdma", ", ".join(name for name, _ in rdma)))
    else:
        found.append(ok("rdma", "no devices: state is read over TCP or shared memory"))
    return found


def look_at_system() -> list[Finding]:
    shm = Path("/dev/shm")
    status = Path("/proc/self/status")
    states = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    rdma = [(state.parts[4], state.read_text(encoding="ascii").strip()) for state in states]
    return judge_system(
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        ipc_lock=status.is_file() and has_ipc_lock(status.read_text(encoding="ascii", errors="replace")),
        files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        rdma=rdma,
    )
