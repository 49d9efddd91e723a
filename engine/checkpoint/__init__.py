"""Checkpoints: what tensors a model has, how files name and store them, reading, writing, looking inside."""
