"""How many requests the router works on at once, over both gateways.

A pure count with a bound; the gateways enter it for each generation and answer 429 or RESOURCE_EXHAUSTED
when full. It never queues: a request that cannot start is told so at once and may be retried elsewhere.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rorqual.errors import RorqualError


class TooManyRequests(RorqualError):
    """The bound on concurrent requests is reached (429, RESOURCE_EXHAUSTED)."""


class Admission:
    def __init__(self, *, num_requests_max: int) -> None:
        assert num_requests_max > 0
        self.num_requests_max = num_requests_max
        self.num_requests = 0

    @contextmanager
    def enter(self) -> Generator[None, None, None]:
        if self.num_requests >= self.num_requests_max:
            raise TooManyRequests(
                f"{self.num_requests} requests are running, the most there may be; try again later"
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
