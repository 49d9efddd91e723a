"""The Triton kernels of hot buffers, as far as they can be known without a GPU.

Values by Triton's interpreter, under the suite of all implementations; and the code that is made for each device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.kernels.suite import choose_kernels
from kvstore.layout import Component, Numerics, build_layout
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import FLASH

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[4]
SHARED_BYTES_MAX = 16 * 1024  # so that 4 programs and more share a multiprocessor
TARGETS = (("cuda", 90, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64))


@pytest.mark.minutes
def test_interpreted_kernels_keep_the_contract() -> None:
    """In a process of its own: the interpreter must be asked for before anything imports triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_hot_rows.py"))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # 3.9 warns when it is not set
    from engine.kernels import hot_rows_triton

    return hot_rows_triton


def compiled(
    kernel: Any, target: tuple[Any, ...], *, types: dict[str, str], constants: dict[str, Any]
) -> Any:
    """As a launch compiles it whose pointers and sizes are multiples of 16, which those of the served rows are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names
    }
    aligned = [number for number, name in enumerate(kernel.arg_names) if name not in constants]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4})


def bring(kernels: ModuleType, target: tuple[Any, ...], *, prefetch: bool) -> Any:
    types = dict.fromkeys(("entries_BK", "sorted_B", "order_B", "ends_B", "first_new_R"), "*i64")
    types |= dict.fromkeys(("lookup_RE", "order_RH", "next_order_RH"), "*i16")
    types |= dict.fromkeys(("held_RH", "counts_R4", "errors_R"), "*i32") | {"flags_RH": "*u8"}
    constants = {"PREFETCH": prefetch, "BLOCK": kernels.BLOCK}
    return compiled(kernels.bring_kernel, target, types=types, constants=constants)


def copy(kernels: ModuleType, target: tuple[Any, ...]) -> Any:
    c4 = build_layout(FLASH, Numerics.SERVED).find(Component.C4)
    assert c4 is not None
    assert (c4.data_bytes % 16, c4.scale_bytes % 4, c4.unit_bytes % 16) == (0, 0, 0)
    types = {"sorted_B": "*i64", "hot_pages_RG": "*i64", "pages_RP": "*i64", "order_RH": "*i16"}
    types |= dict.fromkeys(("counts_R4", "held_RH", "target", "source"), "*i32")
    types |= {"target_scales": "*i32", "source_scales": "*i32"}
    constants = {
        "PER_PAGE": c4.num_rows,
        "DATA": c4.data_bytes // 4,
        "DATA_BLOCK": 256,
        "SCALES": c4.scale_bytes // 4,
        "SCALES_BLOCK": 2,
        "COPY_ROWS": kernels.COPY_ROWS,
        "COPY_PROGRAMS": kernels.COPY_PROGRAMS,
    }
    return compiled(kernels.copy_kernel, target, types=types, constants=constants)


def locate(kernels: ModuleType, target: tuple[Any, ...]) -> Any:
    types = {"lookup_RE": "*i16", "bias_BK": "*fp32", "empty_B": "*i32"}
    types |= dict.fromkeys(("entries_BK", "slots_B", "buffers_B", "pages_SP"), "*i64")
    types |= dict.fromkeys(("hot_pages_RG", "first_new_R", "ids_BK"), "*i64")
    constants = {"PER_PAGE": PAGE_TOKENS // 4, "BLOCK": kernels.BLOCK}
    return compiled(kernels.locate_kernel, target, types=types, constants=constants)


MAKERS: dict[str, Callable[..., Any]] = {
    "bring": lambda kernels, target: bring(kernels, target, prefetch=False),
    "prefetch": lambda kernels, target: bring(kernels, target, prefetch=True),
    "copy": copy,
    "locate": locate,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
@pytest.mark.parametrize("name", MAKERS)
def test_kernels_build_for_the_devices_without_spilling(
    kernels: ModuleType, name: str, target: tuple[Any, ...], tmp_path: Path
) -> None:
    built = MAKERS[name](kernels, target)
    assert built.metadata.shared <= SHARED_BYTES_MAX
    if target[0] == "hip":
        assert ".private_segment_fixed_size: 0" in built.asm["amdgcn"]
        assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]
    else:
        assert "0 bytes spill stores, 0 bytes spill loads" in assembled(built, tmp_path)


def assembled(built: Any, folder: Path) -> str:
    """What the assembler says of registers and spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = folder / "kernel.ptx"
    ptx.write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_rows_are_copied_16_bytes_a_thread(kernels: ModuleType, target: tuple[Any, ...]) -> None:
    built = copy(kernels, target)
    code, wide = (
        ("amdgcn", ("global_load_dwordx4", "global_store_dwordx4"))
        if target[0] == "hip"
        else ("ptx", ("ld.global.v4.b32", "st.global.v4.b32"))
    )
    for instruction in wide:
        assert instruction in built.asm[code]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_barriers_between_writers_and_readers_order_global_memory(
    kernels: ModuleType, target: tuple[Any, ...]
) -> None:
    built = bring(kernels, target, prefetch=False)
    num_barriers = 6  # in the source: before and after what each of its three passes writes
    if target[0] == "hip":
        # Fences with a note (mmra) are of shared memory only.
        fences = [
            line for line in built.asm["llir"].splitlines() if 'fence syncscope("workgroup") release' in line
        ]
        assert sum("!mmra" not in line for line in fences) == num_barriers
    else:
        assert built.asm["ptx"].count("bar.sync") >= num_barriers


def test_kernels_of_a_gpu_are_the_triton_ones() -> None:
    names = dict(choose_kernels("cuda").names)
    assert (names["hot_rows"], names["prefetch_rows"]) == ("triton", "triton")
    assert dict(choose_kernels("cpu").names)["hot_rows"] == "numba"
