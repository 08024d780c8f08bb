"""Errors on the wire: problem details for HTTP APIs (RFC 9457), one table from family to status."""

from __future__ import annotations

from typing import Any

import orjson
import structlog
from starlette.types import Scope

from billing import errors
from billing.errors import BillingError
from billing.http.replies import Rendered
from billing.ids import new_name

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")

MEDIA_TYPE = "application/problem+json"
# On every error answer: a problem may concern credentials, and no cache should keep it.
BASE_HEADERS = [(b"content-type", MEDIA_TYPE.encode()), (b"cache-control", b"no-store")]
BASE_URL = "http://127.0.0.1:8000"

STATUSES: dict[type[BillingError], int] = {
    errors.Invalid: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.RequestTimeout: 408,
    errors.Conflict: 409,
    errors.PayloadTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.Refused: 422,
    errors.RateLimited: 429,
    errors.RequestHeadersTooLarge: 431,
    errors.InternalError: 500,
    errors.StripeUnavailable: 502,
    errors.Unavailable: 503,
}


def configure(base_url: str) -> None:
    """Set the origin that `type` points to; called once, where the application is made."""
    global BASE_URL
    BASE_URL = base_url


def status_of(error: type[BillingError]) -> int:
    """The HTTP status of an error's family."""
    return next(STATUSES[family] for family in error.__mro__ if family in STATUSES)


def answer_to(error: BillingError, scope: Scope) -> Rendered:
    """The answer to a request that ended in an error; logs the type of the error's cause, if it has one."""
    if error.__cause__ is not None:
        log.warning(error.code(), cause=type(error.__cause__).__name__)
    scope["state"]["problem"] = error.code()
    return render(error, request_id=scope["state"]["request_id"])


def render(error: BillingError, *, request_id: str) -> Rendered:
    """The error as an application/problem+json answer that repeats nothing the client sent."""
    status = status_of(type(error))
    body = orjson.dumps(_problem(error, status, request_id))
    headers = [*BASE_HEADERS, (b"content-length", str(len(body)).encode()), *_headers(error)]
    return Rendered(status, headers, body, error.code())


def _problem(error: BillingError, status: int, request_id: str) -> dict[str, Any]:
    problem = {
        "type": f"{BASE_URL}/problems/{error.code()}",
        "title": error.title(),
        "status": status,
        "detail": error.detail,
        "instance": f"urn:uuid:{new_name()}",
        "code": error.code(),
        "request_id": request_id,
    }
    if status == 400:
        problem["errors"] = [{"pointer": fault.pointer, "message": fault.message} for fault in error.faults]
    return problem


def _headers(error: BillingError) -> list[tuple[bytes, bytes]]:
    headers = []
    if challenge := _challenge(error):
        headers.append((b"www-authenticate", challenge))
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(error.retry_after_seconds).encode()))
    return headers


def _challenge(error: BillingError) -> bytes | None:
    # RFC 6750, section 3: no error code where no credentials were sent. A login does not send bearer ones,
    # but RFC 9110 requires the header on every 401.
    match error:
        case errors.CredentialsMissing() | errors.InvalidCredentials():
            return b'Bearer realm="billing"'
        case errors.Unauthenticated():
            return b'Bearer realm="billing", error="invalid_token"'
        case errors.InsufficientScope():
            return b'Bearer realm="billing", error="insufficient_scope"'
    return None
