"""Where compiled kernels are kept between starts, and whether they can be.

Called by `engine.worker.process` as a worker starts. Where Numba may not write it compiles elsewhere without a word,
and every start takes as long as the first; Triton raises PermissionError at its first kernel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

OUTCOMES = {
    "NUMBA_CACHE_DIR": "kernels are kept beside their sources or below {home}, where they can be",
    "TRITON_CACHE_DIR": "its first kernel will fail",
}
"""By variable: what its compiler does without that directory."""


def unusable_caches(environment: Mapping[str, str]) -> list[str]:
    """A line for each directory that these variables name and that can be neither made nor written to."""
    found: list[str] = []
    home = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '~')}/.cache"
    for name, outcome in OUTCOMES.items():
        given = environment.get(name)
        if not given:
            continue
        why = _why_unusable(Path(given))
        if why:
            found.append(f"{name}={given}: {why}; {outcome.format(home=home)}")
    return found


def _why_unusable(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"user {os.getuid()} may not write there"
