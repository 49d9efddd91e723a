"""How many workers each pool has: a policy and observations in, numbers of replicas out.

Deciding is pure (`policy`, `observation`, `planner` and what they use: an injected clock, no I/O); the rest is the
shell of `rorqual autoscaler`, which looks at workers, asks a target for replicas and is elected. `bench.scale` runs the
same deciding half on virtual time. Never imports torch, the engine or the router.
"""
