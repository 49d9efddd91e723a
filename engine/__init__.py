"""The engine: checkpoint, model, kernels, scheduler and sampler; a worker's host (no torch) and its rank (torch)."""
