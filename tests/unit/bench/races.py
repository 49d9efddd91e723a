"""Small races: made traces brought to a load, and one policy run over them."""

from __future__ import annotations

from bench.route import trace
from bench.route.fleet import Simulation
from bench.route.policies import ENTRANTS
from bench.route.worker import WorkerConfig
from rorqual.performance import FLASH, HARDWARE, PerformanceModel, model_costs

MODEL = PerformanceModel(hardware=HARDWARE["h200"], costs=model_costs(FLASH), num_devices=8)
CONFIG = WorkerConfig(model=MODEL, tail_bytes=3_726_240, budget_bytes=400 * MODEL.costs.page_bytes)


def requests_of(
    count: int = 150, *, seed: int = 1, load: float = 0.7, workers: int = 3
) -> list[trace.Request]:
    found = trace.load_trace(f"synthetic:{count}", seed=seed)
    seconds = trace.ideal_seconds(found, lambda tokens, context: float(MODEL.work_seconds(tokens, context)))
    return trace.to_load(found, work_seconds=seconds, num_workers=workers, load=load)


def run(
    name: str, requests: list[trace.Request], config: WorkerConfig = CONFIG, workers: int = 3
) -> Simulation:
    """To the end, with budgets checked now and then."""
    simulation = Simulation(
        config=config, num_workers=workers, policy=ENTRANTS[name].make(config, 0), timer=lambda: 0.0
    )
    for _ in simulation.run(requests):
        for worker in simulation.workers:
            assert worker.radix.num_bytes <= config.budget_bytes
        if simulation.store is not None and config.store is not None:
            assert simulation.store.num_bytes <= config.store.budget_bytes
    return simulation
