"""The small tree of failures that somebody decides about.

Broken invariants are assertions and end the process; what is here is expected: a bad request, a bad file, a full
pool, a lost peer. The command line prints `str(error)` as one line and exits non-zero; the gateways turn
`InvalidRequest` into a 4xx or INVALID_ARGUMENT that names the field.
"""

from __future__ import annotations


class RorqualError(Exception):
    """Base of every expected failure. Its text is one clear line for a person."""


class ConfigError(RorqualError):
    """A configuration file or option cannot be used; the text names the key."""


class CheckpointError(RorqualError):
    """A checkpoint directory cannot be used; the text lists every tensor that is wrong, by name."""


class WireError(RorqualError):
    """Bytes from a peer that are not a message of this protocol."""


class InvalidRequest(RorqualError):
    """The client's request is wrong. `field` is the field as the client wrote it, `status` an HTTP 4xx code."""

    def __init__(
        self, message: str, *, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.field = field
        self.status = status
        self.code = code


class Overloaded(RorqualError):
    """Nothing can take this request now; the client may try again later (503, UNAVAILABLE)."""


class WorkerLost(RorqualError):
    """The worker that ran a sequence is gone or failed (502, UNAVAILABLE)."""


class StageTimedOut(RorqualError):
    """A stage of a request outlived its deadline (504, DEADLINE_EXCEEDED); the text names the stage."""
