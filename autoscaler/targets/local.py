"""Pools of one machine, started by `rorqual up --autoscale`: a folder with two files.

The supervisor writes `workers.json`: who is there, and of each pool what is wanted, starting and wrong. The autoscaler
writes `wanted.json`, `{"replicas": {"decode": 2}}`, which the supervisor follows; a person may edit it, too. Both are
replaced as a whole. A pool's name is its role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, TargetUnreachable

WORKERS, WANTED = "workers.json", "wanted.json"


class LocalTarget:
    def __init__(self, folder: Path, *, pools: Sequence[str]) -> None:
        self._folder = folder
        self._pools = tuple(pools)

    async def read(self) -> Mapping[str, PoolReading]:
        pools = _object(_load(self._folder / WORKERS).get("pools"))
        wanted = self._wanted()
        readings: dict[str, PoolReading] = {}
        for name in self._pools:
            told = _object(pools.get(name))
            try:
                readings[name] = PoolReading(
                    replicas=wanted.get(name, int(told["wanted"])),
                    starting_seconds=tuple(map(float, told.get("starting_seconds") or ())),
                    problem=str(told.get("problem") or ""),
                )
            except (KeyError, TypeError, ValueError):
                raise TargetUnreachable(
                    f"{self._folder / WORKERS} tells nothing of pool {name!r}: does `rorqual up` run it?"
                ) from None
        return readings

    async def set_replicas(self, pool: str, *, before: int, after: int) -> None:
        now = (await self.read())[pool].replicas
        if now != before:
            raise SetBySomebodyElse(
                f"{pool} has {now} replicas, set by somebody else; {before} were expected"
            )
        file = self._folder / WANTED
        partial = file.with_name(f"{WANTED}.partial")
        try:
            partial.write_text(
                json.dumps({"replicas": {**self._wanted(), pool: after}}) + "\n", encoding="utf-8"
            )
            partial.replace(file)
        except OSError as error:
            raise TargetUnreachable(f"{file} cannot be written: {error.strerror}") from None

    async def tell(self, pool: str, *, reason: str, text: str, is_warning: bool = False) -> None:
        pass  # log lines are all there is on one machine

    async def close(self) -> None:
        pass

    def _wanted(self) -> dict[str, int]:
        file = self._folder / WANTED
        if not file.exists():
            return {}
        replicas = _object(_load(file).get("replicas"))
        found = {name: count for name, count in replicas.items() if isinstance(count, int) and count >= 0}
        if len(found) != len(replicas):
            raise TargetUnreachable(f"{file}: every number of replicas must be 0 or more")
        return found


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetUnreachable(f"{file}: {error.strerror}") from None
    except ValueError:
        raise TargetUnreachable(f"{file} is not JSON") from None
    return _object(content)


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
