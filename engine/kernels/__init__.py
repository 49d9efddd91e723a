"""Kernel operations and their implementations; see `engine.kernels.registry`."""
