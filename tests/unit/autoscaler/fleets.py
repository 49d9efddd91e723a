"""A fleet of computable behaviour for the planner's tests: pools that follow decisions after a delay, looks at them."""

from dataclasses import dataclass, field, replace

from autoscaler.observation import (
    Decision,
    Observation,
    PoolState,
    PromptSample,
    StreamSample,
    Traffic,
    WorkerState,
)
from autoscaler.planner import Planner
from autoscaler.policy import Policy, load_policy
from rorqual.session import Load, Role

POLICY = """
version: 1
objectives: {ttft: {percentile: 90, seconds: 2.0}, itl: {percentile: 90, seconds: 0.05}}
model: flash
pools:
  prefill: {role: prefill, replicas: {min: 1, max: 32}, hardware: h200, devices: 8}
  decode: {role: decode, replicas: {min: 1, max: 32}, hardware: h200, devices: 8}
"""

LOAD = Load(
    sequences_running=0,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=1000,
    pages_total=400_000,
    slots_free=256,
    slots_total=256,
    step_ms=0.0,
)


def policy(text: str = POLICY) -> Policy:
    return load_policy(text, file="test")


@dataclass
class FakePool:
    role: Role = Role.PREFILL
    wanted: int = 1
    starting: list[float] = field(default_factory=list)  # ages
    num_lost: int = 0  # workers that cannot be reached
    num_draining: int = 0
    problem: str = ""
    load: Load = LOAD

    @property
    def ready(self) -> int:
        return max(self.wanted - len(self.starting) - self.num_lost, 0)

    def state(self) -> PoolState:
        workers = tuple(WorkerState(address=f"w{i}:1", load=self.load) for i in range(self.ready))
        draining = tuple(
            WorkerState(address=f"d{i}:1", load=self.load, is_draining=True) for i in range(self.num_draining)
        )
        return PoolState(
            role=self.role,
            replicas_wanted=self.wanted,
            workers=workers + draining,
            starting_seconds=tuple(self.starting),
            problem=self.problem,
        )


@dataclass
class Requests:
    """What arrives: so many a second, all alike."""

    rate: float = 100.0
    prompt: int = 12_000
    computed: int = 6_000
    generated: int = 500
    waiting: int = 0


class Fleet:
    """Looks every `interval` seconds; decisions are carried out, replicas come after `start_seconds`."""

    def __init__(self, text: str = POLICY, *, interval: float = 10.0, start_seconds: float = 180.0) -> None:
        self.planner = Planner(policy(text))
        self.pools = {name: FakePool(role=item.role) for name, item in policy(text).pools.items()}
        self.interval, self.start_seconds = interval, start_seconds
        self.now = 1000.0
        self.num_looks = 0
        self.obeys = True
        self.traffic: Traffic | None = None  # instead of what the requests make
        self.history: list[tuple[float, dict[str, int]]] = []

    def look(self, requests: Requests) -> Decision:
        first = self.num_looks == 0
        self.num_looks += 1
        count = 0 if first else round(requests.rate * self.interval)
        samples = min(count, 64)
        prompt = PromptSample(
            prompt_tokens=requests.prompt, computed_tokens=requests.computed, ttft_seconds=0.3
        )
        stream = StreamSample(
            context_tokens=requests.prompt + requests.generated,
            generated_tokens=requests.generated,
            itl_seconds=0.012,
        )
        traffic = self.traffic or Traffic(
            num_prompts=count,
            prompts=(prompt,) * samples,
            num_streams=count,
            streams=(stream,) * samples,
            num_waiting=requests.waiting,
        )
        decision = self.planner.decide(
            Observation(
                seconds=self.now,
                interval_seconds=0.0 if first else self.interval,
                pools={name: pool.state() for name, pool in self.pools.items()},
                traffic=traffic,
            )
        )
        self.history.append((self.now, dict(decision.replicas)))
        self._obey(decision)
        self.now += self.interval
        return decision

    def run(self, requests: Requests, seconds: float) -> Decision:
        decision = self.look(requests)
        for _ in range(round(seconds / self.interval) - 1):
            decision = self.look(requests)
        return decision

    def sizes(self) -> dict[str, int]:
        return {name: pool.wanted for name, pool in self.pools.items()}

    def _obey(self, decision: Decision) -> None:
        for name, pool in self.pools.items():
            pool.starting = [age + self.interval for age in pool.starting]
            if not pool.problem:
                pool.starting = [age for age in pool.starting if age < self.start_seconds]
            if self.obeys:
                more = decision.replicas[name] - pool.wanted
                pool.starting += [0.0] * max(more, 0)
                pool.starting = pool.starting[: max(decision.replicas[name], 0)]
                pool.wanted = decision.replicas[name]


def busy(load: Load = LOAD, **changes: object) -> Load:
    return replace(load, **changes)  # type: ignore[arg-type]
