"""For every test: one compute thread per process, and no time limits inside hypothesis on shared machines."""

import os

from hypothesis import settings

# Before torch or numba is imported anywhere: several test processes share the cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

settings.register_profile("rorqual", deadline=None, print_blob=True)
settings.load_profile("rorqual")
