"""The autoscaler process: `rorqual autoscaler`.

Owns its life: options, the policy and its changes, the connection to a target, the election, the loop, metrics, and the
orderly end. What is decided is `autoscaler.planner`'s. It never imports torch, the engine or the router.

Exit status: 0 after SIGTERM or SIGINT, or with --once a decision that was carried out; 1 with one clear line for a
policy that cannot be used, a port in use, no way to a target, or with --once whatever hindered it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
from collections.abc import Callable, Mapping

import aiohttp
from prometheus_client import CollectorRegistry

from autoscaler.election import Election, Elector
from autoscaler.looking.looker import Looker
from autoscaler.looking.routers import Pinned
from autoscaler.looking.worker_session import WorkerChannels
from autoscaler.loop import Loop, PlannerLike
from autoscaler.metrics import AutoscalerMetrics
from autoscaler.observation import Decision, Hold, Observation
from autoscaler.options import AutoscalerOptions, parse_options
from autoscaler.planner import Planner
from autoscaler.policy import PolicyError
from autoscaler.policy_file import KUBERNETES, Loaded, PolicyFile
from autoscaler.setup import Setup
from autoscaler.targets.contract import Target
from autoscaler.targets.kubernetes import KubernetesTarget
from autoscaler.targets.local import LocalTarget
from rorqual.clock import Clock, SystemClock
from rorqual.cluster_api import ApiError, ApiUnreachable, ClusterApi
from rorqual.errors import ConfigError, RorqualError
from rorqual.metrics_endpoint import MetricsEndpoint
from rorqual.service import (
    StopSignals,
    end_task,
    remove_ready_file,
    run_service,
    until_first,
    write_ready_file,
)
from rorqual.telemetry import configure_logging, fields

log = logging.getLogger(__name__)

CALL_SECONDS_MAX = 4.0
"""Of a call to the API server: less than a third of the lease's duration."""

POLICY_SECONDS = 5.0
"""From one look at the policy's file to the next, at most."""

RELEASE_SECONDS_MAX = 2.0
CONNECT_SECONDS_MAX = 10.0
"""With --once: until all workers that are known of are connected."""

FIRST_SECONDS_MAX = 3.0
"""The same before the first look: workers that are about to be connected are not missing."""

ELECT_SECONDS_MAX = 40.0

MakePlanner = Callable[[Loaded], PlannerLike[Loaded]]


def main(argv: list[str]) -> int:
    """Entry of `rorqual autoscaler`; the exit status. Raises RorqualError for what a person can put right."""
    options, log_level = parse_options(argv, hostname=socket.gethostname())
    configure_logging(level=log_level)
    run_service(serve(options))
    return 0


def _most_replicas(loaded: Loaded) -> dict[str, int]:
    return {name: pool.replicas.max for name, pool in loaded.policy.pools.items()}


class LoadedPlanner:
    """`autoscaler.planner.Planner` as the loop wants it."""

    def __init__(self, loaded: Loaded) -> None:
        self._planner = Planner(loaded.policy, costs=loaded.costs)

    def decide(self, observation: Observation) -> Decision:
        return self._planner.decide(observation)

    def replace_policy(self, policy: Loaded) -> None:
        self._planner.replace_policy(policy.policy, costs=policy.costs)

    def holds(self) -> Mapping[str, Hold]:
        return self._planner.holds()

    def resume(self, holds: Mapping[str, Hold]) -> None:
        self._planner.resume(holds)


async def serve(
    options: AutoscalerOptions,
    *,
    clock: Clock | None = None,
    make_planner: MakePlanner | None = None,
) -> None:
    """Run until a signal, or for one decision with --once. Raises RorqualError when it cannot start."""
    clock = clock or SystemClock()
    signals = StopSignals()
    metrics = AutoscalerMetrics(CollectorRegistry())
    endpoint = MetricsEndpoint(metrics.registry, missing=lambda: "has not looked yet")
    try:
        async with contextlib.AsyncExitStack() as stack:
            shell = await _make_shell(options, clock, metrics, make_planner or LoadedPlanner, stack)
            url = await endpoint.start(host=options.listen_host, port=options.metrics_port)
            stack.push_async_callback(endpoint.stop)
            endpoint.missing = shell.missing
            write_ready_file(options.ready_file, {"metrics": url, "pid": os.getpid()})
            log.info(
                "started %s",
                fields(policy=options.policy, target=options.target, metrics=url, dry_run=options.dry_run),
            )
            await until_first(shell.once() if options.once else shell.run(), signals.stop.wait())
    finally:
        remove_ready_file(options.ready_file)
        signals.close()
        log.info("stopped")


async def _make_shell(
    options: AutoscalerOptions,
    clock: Clock,
    metrics: AutoscalerMetrics,
    make_planner: MakePlanner,
    stack: contextlib.AsyncExitStack,
) -> Shell:
    file = PolicyFile(options.policy, target=options.target, local_folder=options.local_folder, clock=clock)
    loaded = file.load()
    channels = WorkerChannels(options.tls)
    api: ClusterApi | None = None
    elector: Elector | None = None
    identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
    if options.target == KUBERNETES:
        api = await ClusterApi.connect(call_seconds_max=CALL_SECONDS_MAX)
        stack.push_async_callback(api.close)
        if not options.dry_run:
            elector = Elector(
                Election(name=options.lease, identity=identity),
                api,
                clock=clock,
                on_failure=lambda _: metrics.api_failures.labels("lease").inc(),
            )
    # Routers' metrics: no cookies, no proxy of the environment.
    http = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
    trust = None if options.routers_cert is None else Pinned(options.routers_cert)

    def make_target(setup: Setup) -> Target:
        if api is not None:
            return KubernetesTarget(api, setup.pools, clock=clock, instance=identity)
        assert options.local_folder is not None
        return LocalTarget(options.local_folder, pools=[pool.name for pool in setup.pools])

    def make_looker(setup: Setup) -> Looker:
        return Looker(
            setup,
            observer_id=f"autoscaler-{identity}",
            channels=channels,
            http=http,
            randomness=random.Random(),
            trust=trust,
        )

    shell = Shell(
        file,
        loaded,
        make_target=make_target,
        make_looker=make_looker,
        make_planner=make_planner,
        elector=elector,
        clock=clock,
        metrics=metrics,
        dry_run=options.dry_run,
    )
    stack.push_async_callback(shell.close)
    return shell


class Shell:
    """The loop over time, and what changes under it."""

    def __init__(
        self,
        file: PolicyFile,
        loaded: Loaded,
        *,
        make_target: Callable[[Setup], Target],
        make_looker: Callable[[Setup], Looker],
        make_planner: MakePlanner,
        elector: Elector | None,
        clock: Clock,
        metrics: AutoscalerMetrics,
        dry_run: bool,
    ) -> None:
        self._file = file
        self._setup = setup = loaded.setup
        self._make_target = make_target
        self._make_looker = make_looker
        self._elector = elector
        self._clock = clock
        self._metrics = metrics
        self._looker = make_looker(setup)
        self._loop = Loop(
            loaded,
            make_planner=make_planner,
            looker=self._looker,
            target=make_target(setup),
            clock=clock,
            metrics=metrics,
            seconds_left=self._seconds_left,
            dry_run=dry_run,
        )
        self._loaded_at = clock.monotonic()
        metrics.show_limits(_most_replicas(loaded))
        self._looking = asyncio.create_task(self._looker.run())
        self._electing = None if elector is None else asyncio.create_task(elector.run())
        metrics.leader.set_function(lambda: float(self._seconds_left() > 0))
        metrics.policy_age.set_function(lambda: clock.monotonic() - self._loaded_at)
        metrics.look_age.set_function(self._look_age)
        metrics.missing.set_function(lambda: float(self._looker.num_missing))

    async def run(self) -> None:
        """Until cancelled."""
        await self._until(self._sees_all, seconds_max=FIRST_SECONDS_MAX)
        while True:
            began = self._clock.monotonic()
            await self._turn()
            await self._sleep_until(began + self._setup.interval_seconds)

    async def once(self) -> None:
        """One decision, printed and carried out. Raises RorqualError when it was not."""
        await self._until(self._knows_who_leads, seconds_max=ELECT_SECONDS_MAX)
        if self._elector is not None and self._seconds_left() <= 0:
            why = self._elector.hindrance or "the API server has not answered yet"
            raise RorqualError(f"nothing was decided: {why}; --dry-run needs no lead")
        await self._until(self._sees_all, seconds_max=CONNECT_SECONDS_MAX)
        self._check_tasks()
        outcome = None
        if await self._loop.begin():
            await asyncio.sleep(self._setup.interval_seconds)
            self._check_tasks()
            outcome = await self._loop.turn()
        if outcome is None:
            raise RorqualError(f"nothing was decided: {self._loop.unread or 'the lead was lost'}")
        for line in describe(*outcome, failures=self._looker.failures()):
            print(line)
        if self._loop.unwritten:
            failures = "; ".join(f"{pool}: {why}" for pool, why in self._loop.unwritten.items())
            raise RorqualError(f"replicas were not set: {failures}")

    def missing(self) -> str:
        """Why it does not decide, though it should; empty where all is well, also while another one leads."""
        if self._seconds_left() <= 0 and self._elector is not None:
            return ""
        return self._loop.unread or ("" if self._loop.looked_at is not None else "has not looked yet")

    async def close(self) -> None:
        for task in (self._looking, self._electing):
            if task is not None:
                await end_task(task)
        if self._elector is not None:
            try:
                async with asyncio.timeout(RELEASE_SECONDS_MAX):
                    await self._elector.release()
            except (ApiError, ApiUnreachable, TimeoutError) as error:
                log.warning("failed to release the lease %s", fields(error=str(error)))

    async def _turn(self) -> None:
        self._check_tasks()
        await self._loop.turn()

    def _check_tasks(self) -> None:
        for task in (self._looking, self._electing):
            if task is not None and task.done():
                task.result()  # they run until cancelled: a bug, which is not hidden

    async def _sleep_until(self, moment: float) -> None:
        """Looking at the policy in between."""
        while True:
            await self._look_at_policy()
            left = moment - self._clock.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, POLICY_SECONDS))

    async def _look_at_policy(self) -> None:
        try:
            changed = self._file.changed()
        except (PolicyError, ConfigError) as error:
            self._metrics.reload_failures.inc()
            log.warning("kept the policy in force %s", fields(error=str(error)))
            await self._loop.tell_all(reason="PolicyRejected", text=str(error), is_warning=True)
            return
        if changed is None:
            return
        setup = changed.setup
        if setup.is_of_the_same(self._setup):
            self._looker.look_every(setup.interval_seconds)
        else:
            # Other workers, routers or targets: looked at anew. What was being written is decided again.
            await end_task(self._looking)
            self._looker = self._make_looker(setup)
            self._looking = asyncio.create_task(self._looker.run())
            self._loop.replace_all(self._looker, self._make_target(setup))
        self._setup, self._loaded_at = setup, self._clock.monotonic()
        self._loop.replace_policy(changed)
        self._metrics.show_limits(_most_replicas(changed))
        self._metrics.reloads.inc()
        log.info("took a changed policy %s", fields(file=self._file.path))

    def _knows_who_leads(self) -> bool:
        return self._elector is None or self._seconds_left() > 0 or self._elector.is_hopeless

    def _sees_all(self) -> bool:
        return self._looker.num_known > 0 and not self._looker.failures()

    async def _until(self, condition: Callable[[], bool], *, seconds_max: float) -> None:
        """Or for so long."""
        deadline = self._clock.monotonic() + seconds_max
        while not condition() and self._clock.monotonic() < deadline:  # noqa: ASYNC110 (sets no event)
            await asyncio.sleep(0.05)

    def _seconds_left(self) -> float:
        if self._elector is None:
            return float("inf")
        return self._elector.election.seconds_left(self._clock.monotonic())

    def _look_age(self) -> float:
        looked_at = self._loop.looked_at
        return self._clock.monotonic() - (self._loaded_at if looked_at is None else looked_at)


def describe(observation: Observation, decision: Decision, *, failures: list[str]) -> list[str]:
    """A decision for a person, line by line."""
    lines: list[str] = []
    changes = {change.pool: change for change in decision.changes}
    for name, pool in observation.pools.items():
        ready = sum(not worker.is_draining for worker in pool.workers)
        lines.append(
            f"{name}: {pool.replicas_wanted} wanted, {ready} ready, {len(pool.starting_seconds)} starting"
        )
        change = changes.get(name)
        lines.append(f"  {change.reason}" if change else f"  stays at {decision.replicas[name]}")
        if pool.problem:
            lines.append(f"  cannot start: {pool.problem}")
    traffic = observation.traffic
    lines.append(
        f"seen in {observation.interval_seconds:.1f} s: {traffic.num_prompts} prompts, {traffic.num_streams} streams"
        f" ended, {traffic.num_waiting} waiting at routers, {traffic.num_unserved} turned away"
    )
    lines += [f"note: {note}" for note in decision.notes]
    lines += [f"figure: {name} = {value:.6g}" for name, value in sorted(decision.figures.items())]
    lines += [f"not seen: {failure}" for failure in failures]
    return lines
