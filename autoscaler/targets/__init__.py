"""Targets: where a pool's replicas are read and set. Each tells what is, and does what it is told; none decides."""
