"""Failures as HTTP answers: a status, an OpenAI-style body, headers. Pure; called by
`router.gateway.server`."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut, WorkerLost
from router.admission import TooManyRequests
from router.gateway.http1 import Headers, Refusal

RETRY_AFTER: Headers = ((b"retry-after", b"1"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    status: int
    body: bytes
    headers: Headers = ()


def answer_to(error: RorqualError) -> ErrorAnswer:
    if isinstance(error, InvalidRequest):
        return ErrorAnswer(
            status=error.status,
            body=error_body(str(error), kind="invalid_request_error", param=error.field, code=error.code),
        )
    if isinstance(error, TooManyRequests):
        body = error_body(str(error), kind="rate_limit_error", code="too_many_requests")
        return ErrorAnswer(status=429, body=body, headers=RETRY_AFTER)
    if isinstance(error, Overloaded):
        body = error_body(str(error), kind="overloaded_error", code="overloaded")
        return ErrorAnswer(status=503, body=body, headers=RETRY_AFTER)
    if isinstance(error, StageTimedOut):
        return ErrorAnswer(status=504, body=error_body(str(error), kind="timeout_error", code="timeout"))
    if isinstance(error, WorkerLost):
        return ErrorAnswer(status=502, body=error_body(str(error), kind="server_error", code="worker_lost"))
    return ErrorAnswer(status=500, body=error_body(str(error), kind="server_error"))


def error_of(refusal: Refusal) -> RorqualError:
    """What the HTTP server or a look at the head refused, as the failure that it is."""
    if refusal.status >= 500:
        return Overloaded(refusal.message)
    if refusal.status == 429:
        return TooManyRequests(refusal.message)
    return InvalidRequest(refusal.message, status=refusal.status, code=refusal.code)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
