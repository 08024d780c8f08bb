"""Cross-origin requests (Fetch standard): the configured origins may call the API, with credentials."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from billing.http.edge import VARY
from billing.http.headers import Header, first
from billing.http.replies import Rendered

METHODS = b"GET, POST, DELETE"
ACCEPTED = b"Authorization, X-API-Key, Content-Type, Idempotency-Key, X-Request-Id"
EXPOSED = b"X-Request-Id, X-Key-Expires-At, Idempotent-Replayed, Retry-After, RateLimit, RateLimit-Policy"
MAX_AGE_SECONDS = b"600"

# On every answer: a cache must not give one origin the answer made for another, or for none.
BY_ORIGIN = (VARY, b"Origin")
WITH_CREDENTIALS = (b"access-control-allow-credentials", b"true")
FOR_PREFLIGHT = [
    WITH_CREDENTIALS,
    (b"access-control-allow-methods", METHODS),
    (b"access-control-allow-headers", ACCEPTED),
    (b"access-control-max-age", MAX_AGE_SECONDS),
]
FOR_ANSWER = [WITH_CREDENTIALS, (b"access-control-expose-headers", EXPOSED)]


class Cors:
    """ASGI middleware inside `Edge`, which puts the headers set here on every answer, a 500 too.

    Starlette's refuses a preflight with a 400 in text/plain, tells unknown origins what it exposes, and costs
    a request without Origin as much as one with it. Here a preflight is always 204: the browser refuses, by
    what the answer allows or omits.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Collection[str]) -> None:
        if "*" in allowed_origins:
            raise ValueError("CORS with credentials needs the origins by name: `*` would admit any site.")
        self.app = app
        self.allowed_origins = frozenset(origin.encode() for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        origin = first(scope["headers"], b"origin")
        asks_first = origin is not None and is_preflight(scope)
        scope["state"]["answer_headers"] += self._allow(origin, FOR_PREFLIGHT if asks_first else FOR_ANSWER)
        if asks_first:
            await Rendered(204, [], b"").send(send)
        else:
            await self.app(scope, receive, send)

    def _allow(self, origin: bytes | None, headers: list[Header]) -> list[Header]:
        if origin is None or origin not in self.allowed_origins:
            return [BY_ORIGIN]
        return [BY_ORIGIN, (b"access-control-allow-origin", origin), *headers]


def is_preflight(scope: Scope) -> bool:
    """Whether the request is a preflight; any other OPTIONS is an ordinary request."""
    return (
        scope["method"] == "OPTIONS" and first(scope["headers"], b"access-control-request-method") is not None
    )
