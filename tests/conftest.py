"""For every test: one compute thread per process, no time limits inside hypothesis on shared machines, and a summary
of what tests measured."""

import os
from typing import Any

from hypothesis import settings

# Before torch or numba is imported anywhere: several test processes share the cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# The same examples each time, so that a change is judged by what it changes; `make explore` draws new ones.
settings.register_profile("rorqual", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("rorqual")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests noted by `record_property("figure", text)`, whichever process ran them."""
    figures = [
        f"{text} {report.nodeid.partition('[')[1]}{report.nodeid.partition('[')[2]}".rstrip()
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, text in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(figure)
