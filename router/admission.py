"""How much the router works on at once, over both gateways: a bound on choices, not on requests.

A pure count; the gateways enter it for each generation and answer 429 or RESOURCE_EXHAUSTED when full. A
request counts as one while it is being read and as its choices from then on, so that one client that asks
for many is weighed as the many it is. It never queues: a request that cannot start is told so at once and
may be retried elsewhere.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rorqual.errors import InvalidRequest, RorqualError


class TooManyRequests(RorqualError):
    """The bound on what is worked on at once is reached (429, RESOURCE_EXHAUSTED)."""


class Admission:
    def __init__(self, *, num_choices_max: int) -> None:
        assert num_choices_max > 0
        self.num_choices_max = num_choices_max
        self.num_choices = 0

    @contextmanager
    def enter(self) -> Generator[Place, None, None]:
        """Room for a request of one choice until the block ends; `grow` it once more are known of."""
        place = Place(self)
        place.grow(1)
        try:
            yield place
        finally:
            place.leave()


class Place:
    """The room that one request takes."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_choices = 0

    def grow(self, num_choices: int) -> None:
        """Take room for this many in all. Raises TooManyRequests, or InvalidRequest where waiting cannot
        help."""
        assert num_choices >= self._num_choices
        admission = self._admission
        if num_choices > admission.num_choices_max:
            raise InvalidRequest(
                f"{num_choices} choices are asked for; at most {admission.num_choices_max} are served at once",
                field="n",
            )
        more = num_choices - self._num_choices
        if admission.num_choices + more > admission.num_choices_max:
            raise TooManyRequests(
                f"{admission.num_choices} choices are being generated, of at most"
                f" {admission.num_choices_max}; try again later"
            )
        admission.num_choices += more
        self._num_choices = num_choices

    def leave(self) -> None:
        self._admission.num_choices -= self._num_choices
        self._num_choices = 0
