"""The outermost layer: request ids, the fallback 500, the client's address, the log line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import orjson
import pytest
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing.http.edge import Edge
from tests.rawhttp import exchange, request, serving

Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def events() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as captured:
        yield captured


def answering(status: int = 200, headers: Headers | None = None, **state: Any) -> ASGIApp:
    """An application that answers, and adds to the state."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"].update(state)
        await send({"type": "http.response.start", "status": status, "headers": headers or []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


def messages_of(app: ASGIApp, scope: dict[str, Any] | None = None, *received: Message) -> list[Message]:
    """Return the messages that an application sends."""
    sent: list[Message] = []
    pending = iter(received)

    async def receive() -> Message:
        return next(pending, {"type": "http.disconnect"})

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        await app({**plain_scope(), **(scope or {})}, receive, send)

    asyncio.run(run())
    return sent


def plain_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": "/a/",
        "query_string": b"q=secret",
        "headers": [],
        "client": None,
    }


def header(sent: list[Message], name: bytes) -> list[bytes]:
    return [value for key, value in sent[0]["headers"] if key == name]


# Request ids and headers -------------------------------------------------------------------------


@pytest.mark.parametrize("offered", [b"12345678", b"a" * 64, b"Az09._-Az09"])
def test_a_safe_request_id_is_kept(offered: bytes) -> None:
    sent = messages_of(Edge(answering()), {"headers": [(b"x-request-id", offered)]})
    assert header(sent, b"x-request-id") == [offered]


@pytest.mark.parametrize(
    "offered", [b"1234567", b"a" * 65, b"has space", b"tab\there", b"12345678\n", b"caf\xe9-au-lait", b""]
)
def test_an_unsafe_request_id_is_replaced_by_a_uuid7(offered: bytes) -> None:
    sent = messages_of(Edge(answering()), {"headers": [(b"x-request-id", offered)]})
    assert UUID(header(sent, b"x-request-id")[0].decode()).version == 7


def test_two_request_ids_are_both_ignored() -> None:
    twice = [(b"x-request-id", b"12345678"), (b"x-request-id", b"87654321")]
    (request_id,) = header(messages_of(Edge(answering()), {"headers": twice}), b"x-request-id")
    assert request_id not in (b"12345678", b"87654321")


def test_the_request_id_is_in_the_state_and_the_log(events: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        structlog.get_logger().info(scope["state"]["request_id"])
        await answering()(scope, receive, send)

    left: dict[str, Any] = {}

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await Edge(app)(scope, receive, send)
        # In the task that answered: what it logs next belongs to another request.
        left.update(structlog.contextvars.get_contextvars())

    messages_of(server, {"headers": [(b"x-request-id", b"12345678")]})
    assert [(event["event"], event["request_id"]) for event in events] == [
        ("12345678", "12345678"),
        ("request", "12345678"),
    ]
    assert "request_id" not in left


def test_a_response_has_one_request_id_and_the_security_headers() -> None:
    sent = messages_of(
        Edge(answering(headers=[(b"X-Request-Id", b"of-the-app"), (b"content-type", b"text/html")]))
    )
    names = [name.lower() for name, _ in sent[0]["headers"]]
    assert names.count(b"x-request-id") == 1
    assert header(sent, b"x-content-type-options") == [b"nosniff"]
    assert header(sent, b"referrer-policy") == [b"no-referrer"]
    (policy,) = header(sent, b"content-security-policy")
    assert {b"default-src 'none'", b"base-uri 'none'", b"frame-ancestors 'none'"} <= set(policy.split(b"; "))
    assert header(sent, b"content-type") == [b"text/html"]


@pytest.mark.parametrize("https_only", [True, False])
def test_hsts_is_sent_only_when_clients_use_https(https_only: bool) -> None:
    sent = messages_of(Edge(answering(), https_only=https_only))
    expected = [b"max-age=31536000; includeSubDomains"] if https_only else []
    assert header(sent, b"strict-transport-security") == expected


def test_headers_added_by_inner_layers_are_sent_on_errors_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["answer_headers"].append((b"ratelimit", b"r=1"))
        raise RuntimeError

    assert header(messages_of(Edge(app)), b"ratelimit") == [b"r=1"]


def test_a_page_may_choose_its_own_referrer_policy() -> None:
    sent = messages_of(Edge(answering(headers=[(b"Referrer-Policy", b"same-origin")])))
    assert [value for name, value in sent[0]["headers"] if name.lower() == b"referrer-policy"] == [
        b"same-origin"
    ]


def test_only_a_408_closes_the_connection() -> None:
    assert header(messages_of(Edge(answering(408))), b"connection") == [b"close"]
    assert header(messages_of(Edge(answering(409))), b"connection") == []


# The log -----------------------------------------------------------------------------------------


def test_one_log_line_per_request(events: list[Any]) -> None:
    messages_of(Edge(answering(201, operation_id="log_in", tenant_id=UUID(int=7))), {"method": "POST"})
    (event,) = events
    assert event.pop("duration_ms") >= 0
    assert UUID(event.pop("request_id")).version == 7
    assert event == {
        "event": "request",
        "log_level": "info",
        "method": "POST",
        "status": 201,
        "operation_id": "log_in",
        "tenant_id": str(UUID(int=7)),
    }


def test_a_refusal_is_logged_with_its_problem_code(events: list[Any]) -> None:
    messages_of(Edge(answering(403, operation_id="list_api_keys", problem="insufficient-scope")))
    (event,) = events
    assert (event["status"], event["problem"]) == (403, "insufficient-scope")


def test_a_path_is_logged_escaped_and_truncated_only_without_an_operation(events: list[Any]) -> None:
    messages_of(Edge(answering(404)), {"path": "/a\nb\x1b[31mé" + "x" * 500})
    messages_of(Edge(answering(operation_id="log_in")), {"path": "/secret"})
    assert events[0]["path"] == "/a\\nb\\x1b[31m\\xe9" + "x" * (200 - 10)
    assert "secret" not in str(events)


def test_a_client_that_left_is_logged_as_499(events: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert messages_of(Edge(app)) == []
    assert [event["status"] for event in events] == [499]


async def disconnects(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError


@pytest.mark.parametrize("app", [answering(), disconnects, fails])
def test_no_request_stays_in_flight_however_it_ends(app: ASGIApp) -> None:
    edge = Edge(app)
    messages_of(edge)
    assert edge.in_flight == 0


# Failures of the application ---------------------------------------------------------------------


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a secret of the inside")


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    pass


@pytest.mark.parametrize("app", [failing, silent])
def test_500_is_a_problem_with_the_request_id(app: ASGIApp, events: list[Any]) -> None:
    sent = messages_of(Edge(app))
    problem = orjson.loads(sent[1]["body"])
    assert (sent[0]["status"], problem["code"]) == (500, "internal-error")
    assert header(sent, b"content-type") == [b"application/problem+json"]
    assert header(sent, b"x-request-id") == [problem["request_id"].encode()]
    assert b"secret" not in sent[1]["body"]
    assert [event["log_level"] for event in events] == ["error", "info"]


def test_an_exception_is_logged_once(events: list[Any]) -> None:
    messages_of(Edge(failing))
    assert [event["event"] for event in events] == ["request failed", "request"]
    assert events[0]["exc_info"] is True


def test_a_failure_after_the_response_started_sends_no_second_one(events: list[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await failing(scope, receive, send)

    assert [message["type"] for message in messages_of(Edge(app))] == ["http.response.start"]
    assert [event["event"] for event in events] == ["request failed", "request"]


def test_an_incomplete_response_closes_the_connection() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError

    with serving(Edge(app), lifespan="off") as address, pytest.raises(AssertionError, match="shorter"):
        exchange(address, request())


def test_the_lifespan_passes_untouched() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    lifespan = {"type": "lifespan", "state": {}}
    asyncio.run(Edge(app)(lifespan, None, None))  # type: ignore[arg-type]
    assert scopes == [{"type": "lifespan", "state": {}}]


# The client's address ----------------------------------------------------------------------------

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("198.51.100.1", [], "198.51.100.1"),
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9,10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9", "10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["2001:DB8:0::1"], "2001:db8::1"),
        ("10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("fd00::1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, garbage\xff, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("not-an-address", ["203.0.113.9"], "not-an-address"),
    ],
)
def test_the_rightmost_untrusted_address_is_the_clients(
    peer: str, forwarded: list[str], address: str
) -> None:
    headers = [(b"x-forwarded-for", line.encode("latin-1")) for line in forwarded]
    assert client_address(peer, headers, PROXIES) == address


def test_without_trusted_proxies_the_forwarded_header_is_ignored() -> None:
    assert client_address("127.0.0.1", [(b"x-forwarded-for", b"203.0.113.9")], []) == "127.0.0.1"


def test_a_unix_socket_has_no_address() -> None:
    assert client_address(None, [(b"x-forwarded-for", b"203.0.113.9")], PROXIES) is None


def client_address(peer: str | None, headers: Headers, proxies: list[Any]) -> str | None:
    scope: dict[str, Any] = {"client": peer and (peer, 1), "headers": headers, "state": {}}
    messages_of(Edge(answering(), trusted_proxies=proxies), scope)
    found: str | None = scope["state"]["client_address"]
    return found
