"""Loading needs little more memory than what stays: measured in a process of its own, on about 300 MB."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/status"),
]

# Prints the bytes that stay, and by how much the process had grown at its peak. The float32 memory is
# allocated before and filled by the load, as the engine does.
PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from engine.checkpoint.manifest import Storage, expected_weights
from engine.checkpoint.reader import open_checkpoint

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])

# Everything that is imported or cached on first use is not the load's.
for _ in open_checkpoint(Path(sys.argv[2])).tensors():
    pass
checkpoint = open_checkpoint(Path(sys.argv[1]))
target = {}
for weight in expected_weights(checkpoint.config):
    dtype = torch.int64 if weight.storage is Storage.I64 else torch.float32
    target[weight.name] = torch.empty(weight.shape, dtype=dtype)
before = status("VmRSS")
if sys.argv[3] == "tensors":
    for name, values in checkpoint.tensors():
        target[name].copy_(values)
else:
    checkpoint.load_into(target.__getitem__)
print(sum(values.nbytes for values in target.values()), status("VmHWM") - before)
"""

# Experts rule, as in the real models; and a small model under the real vocabulary, where one table does.
EXPERTS = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 24, "vocab_size": 1000}
VOCABULARY = {"hidden_size": 256, "vocab_size": 129_280}


@pytest.mark.parametrize(
    ("shape", "weights", "how"),
    [
        (EXPERTS, "float32", "tensors"),
        (EXPERTS, "quantised", "tensors"),
        (VOCABULARY, "float32", "pieces"),
        (VOCABULARY, "quantised", "pieces"),
    ],
)
def test_peak_memory_of_a_load_is_under_1_3_times_what_stays(
    make_checkpoint: Callable[..., Path],
    quantised_raw: dict[str, Any],
    shape: dict[str, int],
    weights: str,
    how: str,
) -> None:
    small = make_checkpoint(quantised_raw, name="small", weights=weights)
    large = make_checkpoint(quantised_raw | shape, name="large", weights=weights)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(large), str(small), how],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    stays, peak = map(int, result.stdout.split())
    assert stays > 250_000_000
    assert peak < 1.3 * stays, f"{peak / stays:.3f} times what stays"
