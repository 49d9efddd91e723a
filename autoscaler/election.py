"""Which of several autoscalers acts: a Lease of coordination.k8s.io/v1, held by one at a time.

`Election` is pure: what was read and an injected clock go in, what to write comes out. `Elector` is the shell that
asks the API server. Nobody's clock is compared with anybody else's: a follower takes over once it has seen the lease
unchanged for its whole duration on its own clock, and a leader that could not renew stops well before, counted from
before the request that renewed it. Every write is the replacement of a version that was read, so of two who try at once
one succeeds. As client-go does it, and for the same reasons.

Needs the right to get, create and update leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from rorqual.clock import Clock
from rorqual.cluster_api import ApiError, ApiUnreachable, Object
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

DURATION_SECONDS = 15.0
RENEWALS = 3
"""In a duration: two may fail."""

LEADS_PART = 0.8
"""Of the duration a leader acts after it began the renewal that succeeded. The rest is for what is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    body: Object


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    body: Object


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Somebody else holds it."""

    holder: str
    is_alive: bool  # it has renewed since this one looked first


Step = Create | Replace | Wait


class Election:
    """One candidate. `now` is of a monotonic clock, `wall` of one for people to read in the lease."""

    def __init__(self, *, name: str, identity: str, duration_seconds: float = DURATION_SECONDS) -> None:
        self.name = name
        self.identity = identity
        self.duration_seconds = duration_seconds
        self._seen: tuple[str, str, str] | None = None  # of the lease: holder, its renewal, its version
        self._seen_at = 0.0
        self._seen_renewing = ""  # the last holder that renewed between two looks
        self._leads_until = float("-inf")

    @property
    def renew_seconds(self) -> float:
        """From one attempt to the next, of leaders and followers."""
        return self.duration_seconds / RENEWALS

    def seconds_left(self, now: float) -> float:
        """For how long this one may still act; 0 or less: it may not."""
        return self._leads_until - now

    def leads(self, now: float) -> bool:
        return self.seconds_left(now) > 0

    def step(self, lease: Object | None, *, now: float, wall: float) -> Step:
        """The lease was read (None: there is none). What to do about it."""
        if lease is None:
            return Create(body=self._body({}, transitions=0, acquired=None, wall=wall))
        spec: Mapping[str, Any] = lease.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        version = str((lease.get("metadata") or {}).get("resourceVersion") or "")
        seen = holder, str(spec.get("renewTime") or ""), version
        if seen != self._seen:
            if self._seen is not None and self._seen[0] == holder and self._seen[1] != seen[1]:
                self._seen_renewing = holder
            self._seen, self._seen_at = seen, now
        if holder == self.identity:
            return Replace(
                body=self._body(
                    lease,
                    transitions=_int(spec.get("leaseTransitions")),
                    acquired=spec.get("acquireTime"),
                    wall=wall,
                )
            )
        self._leads_until = float("-inf")
        # Its holder's word for how long it holds; nonsense is ours.
        duration = _int(spec.get("leaseDurationSeconds")) or self.duration_seconds
        if holder and now - self._seen_at < duration:
            return Wait(holder=holder, is_alive=holder == self._seen_renewing)
        return Replace(
            body=self._body(
                lease, transitions=_int(spec.get("leaseTransitions")) + 1, acquired=None, wall=wall
            )
        )

    def wrote(self, *, began: float) -> None:
        """What `step` said has been written; the request began at `began`."""
        self._leads_until = began + LEADS_PART * self.duration_seconds

    def released(self, lease: Object, *, wall: float) -> Object | None:
        """The lease to write so that the next one need not wait; None: it is not ours. This one acts no more."""
        self._leads_until = float("-inf")
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") != self.identity:
            return None
        body = self._body(
            lease, transitions=_int(spec.get("leaseTransitions")), acquired=spec.get("acquireTime"), wall=wall
        )
        body["spec"]["holderIdentity"] = ""
        body["spec"]["leaseDurationSeconds"] = 1
        return body

    def stop(self) -> None:
        """Act no more, whatever the lease says."""
        self._leads_until = float("-inf")

    def _body(
        self, lease: Mapping[str, Any], *, transitions: int, acquired: str | None, wall: float
    ) -> Object:
        """A whole lease, with all that others have put into its metadata."""
        stamp = datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {**(lease.get("metadata") or {}), "name": self.name},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, round(self.duration_seconds)),
                "acquireTime": acquired or stamp,
                "renewTime": stamp,
                "leaseTransitions": transitions,
            },
        }


class LeaseApi(Protocol):
    """What is needed of `rorqual.cluster_api.ClusterApi`."""

    @property
    def namespace(self) -> str: ...

    async def get(self, path: str, *, query: Mapping[str, str] | None = None) -> Object: ...

    async def create(self, path: str, body: Object) -> Object: ...

    async def replace(self, path: str, body: Object) -> Object: ...


class Elector:
    """Keeps an `Election` going over an API server. `run` until cancelled, then `release`."""

    def __init__(
        self, election: Election, api: LeaseApi, *, clock: Clock, on_failure: Callable[[str], None]
    ) -> None:
        """`on_failure` hears why the server could not be asked, each time."""
        self.election = election
        self.hindrance = ""  # why this one does not lead, as of the last attempt
        self.is_hopeless = False  # whoever leads is alive
        self._api = api
        self._clock = clock
        self._on_failure = on_failure
        self._leases = f"/apis/coordination.k8s.io/v1/namespaces/{api.namespace}/leases"
        self._told = ""

    async def run(self) -> None:
        while True:
            began = self._clock.monotonic()
            try:
                # A call that outlives this must not be taken for a fresh renewal.
                async with asyncio.timeout(self.election.renew_seconds):
                    await self.turn()
            except (ApiError, ApiUnreachable, TimeoutError) as error:
                why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
                self.hindrance, self.is_hopeless = f"failed to take the lease: {why}", False
                self._on_failure(why)
                self._tell(f"failed to renew or take the lease: {why}")
            took = self._clock.monotonic() - began
            await asyncio.sleep(max(0.0, self.election.renew_seconds - took))

    async def turn(self) -> None:
        """Read, decide, write. Raises ApiError, ApiUnreachable."""
        election = self.election
        lease = await self._read()
        began = self._clock.monotonic()
        step = election.step(lease, now=began, wall=self._clock.wall())
        try:
            match step:
                case Wait():
                    self.hindrance, self.is_hopeless = f"{step.holder} leads, which decides", step.is_alive
                    self._tell(f"waits, {step.holder} leads")
                    return
                case Create():
                    await self._api.create(self._leases, step.body)
                case Replace():
                    await self._api.replace(f"{self._leases}/{election.name}", step.body)
        except ApiError as error:
            if error.status != 409:
                raise
            self.hindrance = "somebody else wrote the lease first"
            self._tell("somebody else wrote the lease first")  # whose it is, the next turn reads
            return
        election.wrote(began=began)
        self.hindrance, self.is_hopeless = "", False
        self._tell("leads")

    async def release(self) -> None:
        """At the end; whoever comes next need not wait. Raises ApiError, ApiUnreachable."""
        self.election.stop()
        lease = await self._read()
        body = None if lease is None else self.election.released(lease, wall=self._clock.wall())
        if body is not None:
            await self._api.replace(f"{self._leases}/{self.election.name}", body)

    async def _read(self) -> Object | None:
        try:
            return await self._api.get(f"{self._leases}/{self.election.name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _tell(self, state: str) -> None:
        if state != self._told:
            self._told = state
            log.info(
                "took part in the election %s",
                fields(lease=self.election.name, identity=self.election.identity, state=state),
            )


def _int(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
