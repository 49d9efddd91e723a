"""The connected workers of a fleet and what they have in common, counted as they come and go.

Belongs to `router.fleet`; links join and leave. `router.dispatch` asks with every request, so nothing here walks over
the workers. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypeVar

from rorqual.session import Role, Welcome
from router.placement import missing_roles
from router.prompt_keys import Root

T = TypeVar("T")


class Members:
    def __init__(self) -> None:
        self._welcomes: dict[str, Welcome] = {}  # by address; who joined first is foremost
        self._hand_over: dict[str, Welcome] = {}  # of these, those of one role
        self._roles: Counter[Role] = Counter()
        self._roots: Counter[Root] = Counter()
        self._tokens_max: Counter[int] = Counter()
        self._versions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._welcomes)

    def join(self, address: str, welcome: Welcome) -> None:
        assert address not in self._welcomes, f"{address} has joined already"
        self._welcomes[address] = welcome
        if welcome.role is not Role.BOTH:
            self._hand_over[address] = welcome
        self._roles[welcome.role] += 1
        self._roots[_root(welcome)] += 1
        self._tokens_max[welcome.sequence_tokens_max] += 1
        self._versions[welcome.version] += 1

    def leave(self, address: str) -> None:
        """Who has not joined is passed over."""
        welcome = self._welcomes.pop(address, None)
        if welcome is None:
            return
        self._hand_over.pop(address, None)
        _take_out(self._roles, welcome.role)
        _take_out(self._roots, _root(welcome))
        _take_out(self._tokens_max, welcome.sequence_tokens_max)
        _take_out(self._versions, welcome.version)

    @property
    def welcomes(self) -> Collection[Welcome]:
        return self._welcomes.values()

    @property
    def first(self) -> Welcome | None:
        """Any of them, where they must be alike."""
        return next(iter(self._welcomes.values()), None)

    @property
    def first_to_hand_over(self) -> Welcome | None:
        """Any of those that hand state over."""
        return next(iter(self._hand_over.values()), None)

    @property
    def roots(self) -> Collection[Root]:
        """Where their page keys begin."""
        return self._roots.keys()

    @property
    def sequence_tokens_max(self) -> int:
        """That every one of them can serve; there is one at least."""
        return min(self._tokens_max)

    @property
    def versions(self) -> Mapping[str, int]:
        """Versions of Rorqual that they run, each with the number of them; empty: they do not say."""
        return self._versions

    def missing(self) -> str:
        """Which worker must connect before a request can be answered; empty when it can."""
        return missing_roles(self._roles)


def _root(welcome: Welcome) -> Root:
    return Root(fingerprint=welcome.model_fingerprint, numerics=welcome.numerics, wire_id=welcome.wire_id)


def _take_out(counts: Counter[T], item: T) -> None:
    """What is counted no more is not there, so that keys are those of members."""
    counts[item] -= 1
    if not counts[item]:
        del counts[item]
