"""The policy's file, read anew when its content changes, and what of it the shell must know.

Used by `autoscaler.process`. Mounted ConfigMaps change by a symlink that is swapped: the path is looked at, not a
descriptor. What was written this moment may be half of what somebody writes, and half a policy may be a policy: it is
left until it has settled. What cannot be used leaves the policy in force as it is, and is told once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoscaler.policy import Policy, PolicyError, load_policy
from autoscaler.setup import PoolSetup, Setup
from rorqual.clock import Clock
from rorqual.discovery import parse_source
from rorqual.errors import ConfigError
from rorqual.model_config import load_model_config
from rorqual.performance import PRESETS, ModelCosts, model_costs

LOCAL, KUBERNETES = "local", "kubernetes"

SETTLE_SECONDS = 0.5
"""From a file's last change to when it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A policy that can be used, and what was read with it."""

    policy: Policy
    setup: Setup
    costs: ModelCosts | None = None  # of the model, where the policy names a directory


class PolicyFile:
    def __init__(self, path: Path, *, target: str, local_folder: Path | None, clock: Clock) -> None:
        self.path = path
        self._clock = clock
        self._target = target
        self._local_folder = local_folder
        self._text: str | None = None
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> Loaded:
        """At the start. Raises PolicyError, ConfigError."""
        text, self._seen = self._read()
        self._text = text
        return self._parse(text)

    def changed(self) -> Loaded | None:
        """None: it says what it said, or is being written. Raises PolicyError, ConfigError, once for each content."""
        seen = _signature(self.path)
        if seen is not None and (seen == self._seen or not self._has_settled(seen[1])):
            return None
        try:
            text, self._seen = self._read()
        except ConfigError:
            if self._text is None:
                return None  # told already
            self._seen = self._text = None
            raise
        if text == self._text:
            return None
        self._text = text
        return self._parse(text)

    def _has_settled(self, changed_ns: int) -> bool:
        # What is from the future (another machine's clock) is taken as it is.
        return not 0 <= self._clock.wall() - changed_ns / 1e9 < SETTLE_SECONDS

    def _read(self) -> tuple[str, tuple[int, int, int] | None]:
        # The signature first: what is replaced in between is read again.
        seen = _signature(self.path)
        try:
            return self.path.read_text(encoding="utf-8"), seen
        except OSError as error:
            raise ConfigError(f"--policy: {self.path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--policy: {self.path} is not UTF-8") from None

    def _parse(self, text: str) -> Loaded:
        policy = load_policy(text, file=str(self.path))
        setup = make_setup(policy, file=str(self.path), target=self._target, local_folder=self._local_folder)
        return Loaded(policy=policy, setup=setup, costs=_costs(policy, file=str(self.path)))


def make_setup(policy: Policy, *, file: str, target: str, local_folder: Path | None) -> Setup:
    """Raises PolicyError for what a target needs and the policy leaves out."""
    pools: list[PoolSetup] = []
    for name, pool in policy.pools.items():
        at = f"{file}: pools.{name}"
        workers = pool.workers
        if target == LOCAL:
            assert local_folder is not None
            if name != pool.role.value:
                raise PolicyError(f"{at}: a local pool is named as its role, {pool.role.value!r}")
            workers = workers or f"file:{local_folder / 'workers.json'}?pool={name}"
        elif pool.target is None:
            raise PolicyError(f"{at}.target is missing: {{kind: Deployment, name: NAME}}")
        if workers is None:
            raise PolicyError(f"{at}.workers is missing: where its workers are found")
        pools.append(
            PoolSetup(
                name=name,
                role=pool.role,
                workers=parse_source(workers, option=f"{at}.workers"),
                kind="" if pool.target is None else pool.target.kind,
                target_name="" if pool.target is None else pool.target.name,
            )
        )
    _check_apart(pools, file)
    routers = policy.routers
    if target == LOCAL and not routers:
        routers = (f"file:{local_folder}/routers.json",)
    return Setup(
        interval_seconds=policy.interval_seconds,
        pools=tuple(pools),
        routers=tuple(parse_source(text, option=f"{file}: routers") for text in routers),
    )


def _costs(policy: Policy, *, file: str) -> ModelCosts | None:
    if policy.model is None or policy.model in PRESETS:
        return None
    try:
        return model_costs(load_model_config(Path(policy.model)))
    except ConfigError as error:
        raise PolicyError(f"{file}: model: {error}") from None


def _check_apart(pools: Sequence[PoolSetup], file: str) -> None:
    targets = [(pool.kind, pool.target_name) for pool in pools if pool.target_name]
    for target in targets:
        if targets.count(target) > 1:
            raise PolicyError(f"{file}: two pools have the target {target[0]} {target[1]!r}")


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Which file, when it was changed in nanoseconds, its size in bytes; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
