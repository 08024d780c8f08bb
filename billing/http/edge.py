"""The outermost layer: gives each request an id, an answer, and one log line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing import crashes, errors, metrics, tracing
from billing.errors import BillingError
from billing.http import problems
from billing.http.addresses import client_address
from billing.http.headers import Header, Headers, texts, values
from billing.ids import new_name
from billing.settings import Network

# A response that is not one of our pages may load nothing and may not be framed, should a browser render it.
NO_CONTENT = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", NO_CONTENT),
]
# A year, subdomains included (RFC 6797). Sent only where clients use https.
STRICT_TRANSPORT = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")
VARY = b"vary"
SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before its answer; never sent.
MAX_LOGGED_PATH = 200
# Stands for requests outside the document's operations: pages, health checks, unknown paths.
OUTSIDE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


class Edge:
    """ASGI middleware around everything else.

    It sets `request_id` and `client_address` in `scope["state"]`, and logs what inner layers set there:
    `operation_id`, `tenant_id` and `problem`. Headers that they add to `answer_headers` go on whatever answer
    is sent and replace its own of the same name; only `Vary` is kept beside its own.
    """

    def __init__(
        self, app: ASGIApp, *, trusted_proxies: Sequence[Network] = (), https_only: bool = False
    ) -> None:
        self.app = app
        self.trusted_proxies = tuple(trusted_proxies)
        self.fixed_headers = [STRICT_TRANSPORT] if https_only else []
        self.in_flight = 0

    def sample(self) -> None:
        """Set the gauge of requests in flight."""
        metrics.IN_FLIGHT.set(self.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client_address"] = client_address(scope, self.trusted_proxies)
        state["answer_headers"] = [(b"x-request-id", request_id.encode()), *self.fixed_headers]
        # By hand: `bound_contextvars` costs four microseconds more.
        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            answer = self._traced if tracing.is_on() else self._answer
            await answer(scope, Exchange(receive, send, state["answer_headers"]))
        finally:
            structlog.contextvars.reset_contextvars(**bound)

    async def _traced(self, scope: Scope, exchange: Exchange) -> None:
        parents = texts(scope["headers"], b"traceparent")
        with tracing.span("request", "server", parent=parents[0] if len(parents) == 1 else None) as span:
            try:
                await self._answer(scope, exchange)
            finally:
                span.rename(span_name(scope))
                span.set_attributes(span_attributes(scope, exchange.status))
                if (exchange.status or 0) >= 500:
                    span.fail(str(exchange.status))

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        started = perf_counter()
        self.in_flight += 1
        try:
            await self._answer_somehow(scope, exchange)
        finally:
            self.in_flight -= 1
            seconds = perf_counter() - started
            measure(scope, exchange.status, seconds)
            log.info("request", **summary(scope, exchange.status, seconds))

    async def _answer_somehow(self, scope: Scope, exchange: Exchange) -> None:
        # Whatever failed, the client is owed an answer and the operator a log line; nothing goes on after it.
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            log.exception("request failed")
            crashes.report(error, operation_id=scope["state"].get("operation_id") or OUTSIDE)
        else:
            if exchange.is_unanswered:
                log.error("request left unanswered")
        if exchange.is_unanswered:
            await send_error(exchange.send, scope, errors.InternalError())


class Exchange:
    """A request and its answer: keeps the answer's status, and adds the headers that every answer has."""

    def __init__(self, receive: Receive, send: Send, headers: Headers) -> None:
        self._receive = receive
        self._send = send
        self._headers = headers
        self._is_abandoned = False
        self.status: int | None = None

    @property
    def is_unanswered(self) -> bool:
        """Whether the client still waits for an answer."""
        return self.status is None and not self._is_abandoned

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._is_abandoned = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._signed(message.get("headers", ()))}
        await self._send(message)

    def _signed(self, headers: Headers) -> list[Header]:
        ours = {name for name, _ in self._headers if name != VARY}
        others = [header for header in headers if header[0].lower() not in ours]
        present = {name.lower() for name, _ in others}
        missing = [header for header in SECURITY_HEADERS if header[0] not in present]
        # RFC 9110, section 15.5.9: we do not wait for the rest of the slow request.
        closing = [(b"connection", b"close")] if self.status == 408 else []
        return [*others, *missing, *closing, *self._headers]


async def send_error(send: Send, scope: Scope, error: BillingError) -> None:
    """Send the error in place of an application that sent no answer."""
    await problems.answer_to(error, scope).send(send)


def request_id_of(headers: Headers) -> str:
    """The client's X-Request-Id if it sent exactly one that is safe to echo and log, else a new UUIDv7."""
    offered = values(headers, b"x-request-id")
    if len(offered) == 1 and SAFE_REQUEST_ID.fullmatch(offered[0]):
        return offered[0].decode()
    return new_name()


def summary(scope: Scope, status: int | None, seconds: float) -> dict[str, Any]:
    """The log fields of a request: never its query, body or credentials."""
    state = scope["state"]
    fields = {"method": scope["method"], "status": status or CLIENT_CLOSED_REQUEST}
    fields["duration_ms"] = round(seconds * 1000, 2)
    if operation_id := state.get("operation_id"):
        fields["operation_id"] = operation_id
    else:
        fields["path"] = ascii(scope["path"][:MAX_LOGGED_PATH])[1:-1]
    if problem := state.get("problem"):
        fields["problem"] = problem
    if tenant_id := state.get("tenant_id"):
        fields["tenant_id"] = str(tenant_id)
    return fields


def measure(scope: Scope, status: int | None, seconds: float) -> None:
    """Count a request under labels of our own: each value chosen by a client would make a new series."""
    state = scope["state"]
    operation = state.get("operation_id") or OUTSIDE
    method = scope["method"] if scope["method"] in METHODS else "other"
    metrics.REQUESTS.count(operation, method, str(status or CLIENT_CLOSED_REQUEST))
    metrics.REQUEST_SECONDS.observe(seconds, operation)
    if problem := state.get("problem"):
        metrics.PROBLEMS.count(operation, problem)


def span_name(scope: Scope) -> str:
    """The name of a request's span."""
    return f"{span_method(scope)} {scope['state'].get('operation_id') or OUTSIDE}"


def span_attributes(scope: Scope, status: int | None) -> tracing.Attributes:
    """The attributes of a request's span: no path but an operation's, and no query."""
    state = scope["state"]
    operation_id = state.get("operation_id")
    return {
        "http.request.method": span_method(scope),
        "http.response.status_code": status or CLIENT_CLOSED_REQUEST,
        "http.route": scope["path"] if operation_id else None,
        "url.scheme": scope.get("scheme"),
        "billing.operation_id": operation_id,
        "billing.problem": state.get("problem"),
        "billing.request_id": state["request_id"],
        "billing.tenant_id": str(state["tenant_id"]) if "tenant_id" in state else None,
    }


def span_method(scope: Scope) -> str:
    """The method in OpenTelemetry's words."""
    return scope["method"] if scope["method"] in METHODS else "_OTHER"
