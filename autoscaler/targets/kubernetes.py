"""Pools that are Deployments or LeaderWorkerSets: replicas by the `scale` subresource, what hinders them by their pods.

Every write carries the resourceVersion that was read, so nobody's change is written over: after a conflict it is read
again, and written again only if the replicas are still what they were. It needs the right to get and patch
deployments/scale and leaderworkersets/scale, to get and list pods, to create and patch events, in its namespace.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autoscaler.setup import PoolSetup
from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, TargetUnreachable
from autoscaler.targets.events import EventBook, Told, cut, make_event, timestamp
from autoscaler.targets.pods import count_pods, read_pods
from rorqual.clock import Clock
from rorqual.cluster_api import ApiError, ApiUnreachable, Object
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

CONFLICTS_MAX = 4
PODS_PER_PAGE = "500"

_KINDS: Mapping[str, tuple[str, str]] = {
    "Deployment": ("apps/v1", "deployments"),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
}


class Api(Protocol):
    """What is needed of `rorqual.cluster_api.ClusterApi`."""

    @property
    def namespace(self) -> str: ...

    async def get(self, path: str, *, query: Mapping[str, str] | None = None) -> Object: ...

    async def create(self, path: str, body: Object) -> Object: ...

    async def merge_patch(self, path: str, body: Object) -> Object: ...

    async def close(self) -> None: ...


class KubernetesTarget:
    def __init__(self, api: Api, pools: Sequence[PoolSetup], *, clock: Clock, instance: str) -> None:
        """`instance` tells this autoscaler from others in Events."""
        self._api = api
        self._pools = {pool.name: pool for pool in pools}
        self._clock = clock
        self._instance = instance
        self._events = EventBook()
        self._uids: dict[str, str] = {}
        self._short_since: dict[str, float] = {}
        self._told_event_failure = ""

    async def read(self) -> Mapping[str, PoolReading]:
        try:
            readings = await asyncio.gather(*(self._read_pool(pool) for pool in self._pools.values()))
        except (ApiError, ApiUnreachable) as error:
            raise TargetUnreachable(_explain(error)) from None
        return dict(zip(self._pools, readings, strict=True))

    async def set_replicas(self, pool: str, *, before: int, after: int) -> None:
        path = self._path(self._pools[pool])
        for _ in range(CONFLICTS_MAX):
            try:
                scale = await self._api.get(path)
                now = replicas_of(scale)
                if now == after:
                    return
                if now != before:
                    raise SetBySomebodyElse(
                        f"{pool} has {now} replicas, set by somebody else; {before} were expected"
                    )
                version = scale["metadata"]["resourceVersion"]
                body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": after}}
                await self._api.merge_patch(path, body)
                return
            except ApiError as error:
                if error.status != 409:
                    raise TargetUnreachable(_explain(error)) from None
                # Its status may have changed, or somebody has set replicas: the next look tells.
            except ApiUnreachable as error:
                raise TargetUnreachable(_explain(error)) from None
            except (KeyError, TypeError):
                raise TargetUnreachable(f"{path} answered with no Scale") from None
        raise TargetUnreachable(f"{path}: changed {CONFLICTS_MAX} times while it was being written")

    async def tell(self, pool: str, *, reason: str, text: str, is_warning: bool = False) -> None:
        for name in [pool] if pool else list(self._pools):
            try:
                await self._tell(self._pools[name], reason, text, is_warning)
                self._told_event_failure = ""
            except (ApiError, ApiUnreachable) as error:
                self._events.forget(name)
                why = _explain(error)
                if why != self._told_event_failure:
                    log.warning("failed to write an event %s", fields(pool=name, error=why))
                self._told_event_failure = why

    async def close(self) -> None:
        await self._api.close()

    async def _read_pool(self, pool: PoolSetup) -> PoolReading:
        path = self._path(pool)
        scale = await self._api.get(path)
        try:
            replicas = replicas_of(scale)
            self._uids[pool.name] = str(scale["metadata"].get("uid") or "")
        except (KeyError, TypeError):
            raise TargetUnreachable(f"{path} answered with no Scale") from None
        selector = str((scale.get("status") or {}).get("selector") or "")
        # Without a selector every pod of the namespace would be listed.
        pods = await self._list_pods(selector) if selector else []
        now = self._clock.monotonic()
        if count_pods(pods) >= replicas:
            self._short_since.pop(pool.name, None)
        short_since = self._short_since.get(pool.name, now)
        if count_pods(pods) < replicas:
            self._short_since[pool.name] = short_since
        return read_pods(pods, replicas=replicas, wall=self._clock.wall(), shortage_seconds=now - short_since)

    async def _list_pods(self, selector: str) -> list[Mapping[str, Any]]:
        path = f"/api/v1/namespaces/{self._api.namespace}/pods"
        query = {"labelSelector": selector, "limit": PODS_PER_PAGE}
        pods: list[Mapping[str, Any]] = []
        while True:
            page = await self._api.get(path, query=query)
            pods += page.get("items") or []
            more = str((page.get("metadata") or {}).get("continue") or "")
            if not more:
                return pods
            query = {**query, "continue": more}

    async def _tell(self, pool: PoolSetup, reason: str, text: str, is_warning: bool) -> None:
        now, wall = self._clock.monotonic(), self._clock.wall()
        path = f"/api/v1/namespaces/{self._api.namespace}/events"
        text = cut(text)
        last = self._events.again(pool.name, reason=reason, text=text)
        if last is not None:
            if self._events.is_due(last, now=now):
                last.count += 1
                last.at = now
                await self._api.merge_patch(
                    f"{path}/{last.name}", {"count": last.count, "lastTimestamp": timestamp(wall)}
                )
            return
        if not self._events.may_tell(now=now):
            return
        told = Told(name=self._event_name(pool, wall), reason=reason, text=text, count=1, at=now)
        body = make_event(
            told.name,
            namespace=self._api.namespace,
            involved=self._involved(pool),
            reason=reason,
            text=text,
            is_warning=is_warning,
            wall=wall,
            instance=self._instance,
        )
        await self._api.create(path, body)
        self._events.note(pool.name, told)

    def _event_name(self, pool: PoolSetup, wall: float) -> str:
        unique = hashlib.sha256(f"{self._instance} {wall:.9f}".encode()).hexdigest()[:16]
        return f"{pool.target_name[:200]}.{unique}"

    def _involved(self, pool: PoolSetup) -> dict[str, Any]:
        return {
            "apiVersion": _KINDS[pool.kind][0],
            "kind": pool.kind,
            "name": pool.target_name,
            "namespace": self._api.namespace,
            "uid": self._uids.get(pool.name, ""),
        }

    def _path(self, pool: PoolSetup) -> str:
        version, plural = _KINDS[pool.kind]
        return f"/apis/{version}/namespaces/{self._api.namespace}/{plural}/{pool.target_name}/scale"


def replicas_of(scale: Mapping[str, Any]) -> int:
    """Left out means 0: Go leaves out zeros."""
    return int((scale["spec"] or {}).get("replicas", 0))


def _explain(error: ApiError | ApiUnreachable) -> str:
    """With what a person can do about it."""
    if isinstance(error, ApiError) and error.status == 403:
        return (
            f"{error} (a Role must allow: get, patch deployments/scale and leaderworkersets/scale; get, list pods;"
            " create, patch events)"
        )
    return str(error)
