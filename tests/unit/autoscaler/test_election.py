"""Elections: of several autoscalers one acts, whatever clocks, pauses and the API server do."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.election import LEADS_PART, Create, Election, Elector, Replace, Wait
from rorqual.clock import ManualClock
from rorqual.cluster_api import ApiError, ApiUnreachable, Object


class Leases:
    """An API server that knows one lease, as Kubernetes would keep it."""

    namespace = "n"

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0
        self.is_down = False

    async def get(self, path: str, *, query: Any = None) -> Object:
        self._check()
        if self.lease is None:
            raise ApiError("not found", status=404, reason="NotFound")
        return copy.deepcopy(self.lease)

    async def create(self, path: str, body: Object) -> Object:
        self._check()
        if self.lease is not None:
            raise ApiError("exists", status=409, reason="AlreadyExists")
        return self._keep(body)

    async def replace(self, path: str, body: Object) -> Object:
        self._check()
        assert self.lease is not None
        if body["metadata"].get("resourceVersion") != self.lease["metadata"]["resourceVersion"]:
            raise ApiError("conflict", status=409, reason="Conflict")
        return self._keep(body)

    def _check(self) -> None:
        if self.is_down:
            raise ApiUnreachable("down")

    def _keep(self, body: Object) -> Object:
        self.version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)

    @property
    def holder(self) -> str:
        assert self.lease is not None
        return self.lease["spec"]["holderIdentity"]


class Candidate:
    """With a clock of its own, `skew` seconds off."""

    def __init__(self, name: str, leases: Leases, *, skew: float = 0.0) -> None:
        self.clock = ManualClock(1_000_000 + skew)
        self.election = Election(name="lease", identity=name)
        self.elector = Elector(self.election, leases, clock=self.clock, on_failure=lambda why: None)

    async def turn(self) -> None:
        with contextlib.suppress(ApiError, ApiUnreachable):
            await self.elector.turn()

    @property
    def leads(self) -> bool:
        return self.election.leads(self.clock.now)


def advance(seconds: float, *candidates: Candidate) -> None:
    for candidate in candidates:
        candidate.clock.advance(seconds)


async def test_the_first_one_leads_and_stays_so_while_it_renews() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    for _ in range(20):
        await one.turn()
        await two.turn()
        assert (one.leads, two.leads) == (True, False)
        advance(5, one, two)
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 0


async def test_a_follower_takes_over_a_duration_after_the_last_renewal_it_saw() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    await one.turn()
    for _ in range(3):
        await two.turn()
        assert not two.leads
        advance(4.9, one, two)
    assert not one.leads
    advance(0.4, one, two)
    await two.turn()
    assert two.leads
    assert leases.holder == "two"
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 1


async def test_a_leader_that_cannot_renew_stops_before_anybody_can_take_over() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    await one.turn()
    await two.turn()
    leases.is_down = True
    for _ in range(12):
        advance(1, one, two)
        await one.turn()
        await two.turn()
        assert one.leads == (one.clock.now - 1_000_000 < LEADS_PART * 15)
        assert not two.leads
    leases.is_down = False
    advance(2, one, two)
    await two.turn()
    assert not two.leads  # it has not seen a whole duration pass
    await one.turn()
    assert one.leads  # nobody took it: it goes on


async def test_of_two_who_try_at_once_one_succeeds() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    for candidate in (one, two):
        assert isinstance(candidate.election.step(None, now=0.0, wall=0.0), Create)
    await one.turn()
    with pytest.raises(ApiError):
        await leases.create("", {"metadata": {}, "spec": {}})
    await two.turn()
    assert (one.leads, two.leads) == (True, False)
    # Both see the same version run out; the second to write is refused.
    seen = copy.deepcopy(leases.lease)
    assert seen is not None
    seen["spec"]["holderIdentity"] = ""
    steps = [candidate.election.step(seen, now=50.0, wall=0.0) for candidate in (one, two)]
    assert all(isinstance(step, Replace) for step in steps)
    await leases.replace("", steps[0].body)  # type: ignore[union-attr]
    with pytest.raises(ApiError, match="conflict"):
        await leases.replace("", steps[1].body)  # type: ignore[union-attr]


async def test_a_release_lets_the_next_one_begin_at_once() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    await one.turn()
    await two.turn()
    await one.elector.release()
    assert not one.leads
    await two.turn()
    assert two.leads


async def test_a_release_takes_nothing_from_somebody_else() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    await two.turn()
    await one.elector.release()
    assert leases.holder == "two"


async def test_a_holder_that_renews_while_it_is_looked_at_is_alive() -> None:
    leases = Leases()
    one, two = Candidate("one", leases), Candidate("two", leases)
    await one.turn()
    for _ in range(2):
        await two.turn()
        assert (two.elector.hindrance, two.elector.is_hopeless) == ("one leads, which decides", False)
        advance(1, one, two)
    await one.turn()
    await two.turn()
    assert two.elector.is_hopeless
    await one.elector.release()
    await two.turn()
    assert two.leads
    assert (two.elector.hindrance, two.elector.is_hopeless) == ("", False)


async def test_metadata_of_others_stays() -> None:
    leases = Leases()
    one = Candidate("one", leases)
    await one.turn()
    assert leases.lease is not None
    leases.lease["metadata"]["labels"] = {"a": "b"}
    await one.turn()
    assert leases.lease["metadata"]["labels"] == {"a": "b"}


@pytest.mark.parametrize("spec", [{}, {"holderIdentity": "x", "leaseDurationSeconds": "soon"}, None])
def test_a_lease_of_nonsense_is_waited_for_or_taken(spec: Any) -> None:
    election = Election(name="lease", identity="one")
    lease = {"metadata": {"resourceVersion": "1"}, "spec": spec}
    first = election.step(lease, now=0.0, wall=0.0)
    assert isinstance(first, Wait if (spec or {}).get("holderIdentity") else Replace)
    assert isinstance(election.step(lease, now=15.1, wall=0.0), Replace)


@given(seed=st.integers(0, 10_000))
async def test_two_never_lead_at_once_whatever_happens(seed: int) -> None:
    """Turns, pauses of one, an API server that comes and goes, clocks that are hours apart, answers that are lost."""
    chance = random.Random(seed)
    leases = Leases()
    candidates = [Candidate(f"c{n}", leases, skew=chance.uniform(-9e4, 9e4)) for n in range(3)]
    led: set[str] = set()
    for _ in range(150):
        advance(chance.choice([0.1, 1.0, 5.0, 5.0, 20.0]), *candidates)
        leases.is_down = chance.random() < 0.2
        candidate = chance.choice(candidates)
        if chance.random() < 0.15:
            # Its write arrives, the answer does not.
            step = candidate.election.step(
                copy.deepcopy(leases.lease), now=candidate.clock.now, wall=candidate.clock.now
            )
            with contextlib.suppress(ApiError, ApiUnreachable):
                if isinstance(step, Create):
                    await leases.create("", step.body)
                elif isinstance(step, Replace):
                    await leases.replace("", step.body)
        else:
            await candidate.turn()
        leaders = [item.election.identity for item in candidates if item.leads]
        assert len(leaders) <= 1
        led.update(leaders)
    assert led
