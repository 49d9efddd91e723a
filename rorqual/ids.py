"""Names of things that cross module borders. A NewType each, so that a page id is never passed as a slot."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
"""One client request, as logged and returned to the client ("chatcmpl-...", "cmpl-...")."""

SequenceId = NewType("SequenceId", int)
"""One choice of one request on one session: chosen by the router, unique within the session."""

WorkerId = NewType("WorkerId", str)
Incarnation = NewType("Incarnation", int)
"""Drawn when a worker starts (63 random bits); an older one is refused everywhere."""

PageId = NewType("PageId", int)
SlotId = NewType("SlotId", int)
RecordId = NewType("RecordId", int)
"""One buffer of a worker's hand-over records."""

HostPageId = NewType("HostPageId", int)
"""A page in a worker's host memory: no number of the device's pages."""
HostRecordId = NewType("HostRecordId", int)
"""A tail's record in a worker's host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseName:
    """A lease, named so that nothing stale can be taken for it: ids are used again, generations are not."""

    worker_id: WorkerId
    incarnation: Incarnation
    lease_id: int
    generation: int


def draw_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(63) | 1)


def draw_request_id(prefix: str) -> RequestId:
    return RequestId(f"{prefix}-{secrets.token_hex(12)}")
