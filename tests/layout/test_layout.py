"""The shape of the house: what may import what, how long things may be, and a docstring on every module."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "rorqual",
    "kvstore",
    "engine",
    "router",
    "prefill_worker",
    "decode_worker",
    "autoscaler",
    "bench",
)
LINES_MAX = 600
FUNCTION_LINES_MAX = 80
BROAD = {"Exception", "BaseException"}

MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "_pb2" not in path.name
)
"""Every module we wrote: the generated stubs are protoc's."""

WITHOUT_TORCH = sorted(
    module.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    for module in MODULES
    if module.startswith(("rorqual/", "router/", "autoscaler/")) and not module.startswith("rorqual/v1/")
)


TREES = {
    module: ast.parse((ROOT / module).read_text(encoding="utf-8"), filename=module) for module in MODULES
}


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of these kinds with its place, `module:line`."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield f"{module}:{node.lineno}", node


def test_there_is_something_to_look_at():
    assert {module.split("/")[0] for module in MODULES} == set(PACKAGES)


def test_imports_run_downhill():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_every_module_introduces_itself():
    assert [module for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_no_file_has_grown_into_two():
    lengths = {module: len((ROOT / module).read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > LINES_MAX} == {}


def test_no_function_has_grown_into_two():
    lengths = {
        f"{place} {node.name}": node.end_lineno - node.lineno + 1
        for place, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    }
    assert {place: length for place, length in lengths.items() if length > FUNCTION_LINES_MAX} == {}


def test_imports_are_absolute():
    assert [place for place, node in nodes(ast.ImportFrom) if node.level] == []


def test_only_wire_modules_know_the_generated_stubs():
    places = [place for place, node in nodes(ast.ImportFrom) if str(node.module).startswith("rorqual.v1")]
    places += [place for place, node in nodes(ast.Import) if "rorqual.v1" in ast.unparse(node)]
    assert places, "nobody imports the stubs: this test looks at the wrong thing"
    assert [place for place in places if not place.split(":")[0].endswith("wire.py")] == []


def test_a_broad_except_logs_or_raises_on():
    """`except Exception` belongs in an outermost loop, with a log line; a bare `except:` nowhere."""
    silent = []
    for place, node in nodes(ast.ExceptHandler):
        names = (
            {inner.id for inner in ast.walk(node.type) if isinstance(inner, ast.Name)} if node.type else BROAD
        )
        if names & BROAD:
            calls = [ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
            is_raised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if node.type is None or not (is_raised or any("log" in call for call in calls)):
                silent.append(place)
    assert silent == []


@pytest.mark.slow
def test_the_ground_and_the_router_load_without_torch():
    """Indirect imports too: a router pod has no torch installed."""
    script = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}: importlib.import_module(name)\n"
        "heavy = {'torch', 'numba', 'triton', 'transformers', 'engine'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "engine.plan",
        "engine.frames",
        "engine.worker.scheduler",
        "engine.worker.process",
        "kvstore.pages",
        "kvstore.shadow_radix",
        "kvstore.store.redis_store",
    ],
)
def test_a_workers_host_loads_without_torch(module):
    """The host is a worker's mind; the muscle, torch, lives in the rank's process."""
    assert importlib.util.find_spec(module) is not None
    script = f"import {module}, sys; sys.exit('loaded torch' if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_generated_stubs_are_current(tmp_path):
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True, timeout=100)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert len(made) == 3 * len(protos)
    for path in made:
        assert (ROOT / path).read_bytes() == (tmp_path / path).read_bytes(), (
            f"{path} is stale: run make stubs"
        )
