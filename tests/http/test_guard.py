"""The guard: what it passes on to Connexion, and what it refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import connexion
import pytest
import structlog
from connexion.lifecycle import ConnexionRequest, ConnexionResponse
from connexion.middleware import MiddlewarePosition
from starlette.types import Message, Receive, Scope, Send

from billing import errors
from billing.http import problems
from billing.http.edge import Edge
from billing.http.guard import MAX_BODY_BYTES, Guard, Intake
from tests.rawhttp import Address, Connection, chunked, exchange, request, serving

JSON = (b"content-type", b"application/json")


@dataclass
class Seen:
    """What the application behind the guard was given."""

    headers: list[tuple[bytes, bytes]]
    messages: list[Message]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def pass_through(
    messages: list[Message], headers: list[tuple[bytes, bytes]], guard: dict[str, Any], **target: Any
) -> Seen | None:
    """Return what the guard passes on; None if it passes nothing on."""
    seen: list[Seen] = []
    pending = iter(messages)

    async def receive() -> Message:
        if (message := next(pending, None)) is not None:
            return message
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await receive()
        seen.append(Seen(scope["headers"], [body]))
        if messages[-1]["type"] == "http.disconnect":
            seen[0].messages.append(await receive())

    async def send(message: Message) -> None:
        raise AssertionError(f"The guard itself answers nothing: {message}")

    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b""} | target
    await Guard(app, intake=Intake(**guard))({**scope, "headers": headers}, receive, send)
    return seen[0] if seen else None


def piece(body: bytes) -> Message:
    """A part of a body that is not its last."""
    return {"type": "http.request", "body": body, "more_body": True}


def through(
    *chunks: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
    guard: dict[str, Any] | None = None,
    **target: Any,
) -> Seen:
    messages: list[Message] = [piece(chunk) for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    seen = asyncio.run(pass_through(messages, [JSON] if headers is None else headers, guard or {}, **target))
    assert seen
    return seen


# The body ----------------------------------------------------------------------------------------


def test_a_body_in_pieces_arrives_whole() -> None:
    seen = through(b'{"a"', b":", b"1}", headers=[JSON, (b"transfer-encoding", b"chunked")])
    assert seen.messages == [{"type": "http.request", "body": b'{"a":1}', "more_body": False}]
    assert dict(seen.headers) == {b"content-type": b"application/json", b"content-length": b"7"}


def test_a_wrong_content_length_is_corrected() -> None:
    seen = through(b'{"a":1}', headers=[JSON, (b"content-length", b"3")])
    assert (b"content-length", b"7") in seen.headers
    assert (b"content-length", b"3") not in seen.headers


def test_other_headers_pass() -> None:
    assert (b"x-api-key", b"k") in through(b"{}", headers=[JSON, (b"x-api-key", b"k")]).headers


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [JSON],
        [(b"content-type", b"application/x-www-form-urlencoded"), (b"content-length", b"0")],
        [(b"content-type", b"text/plain"), (b"content-type", b"image/png"), (b"content-encoding", b"gzip")],
    ],
)
def test_headers_describing_an_empty_body_are_dropped(headers: list[tuple[bytes, bytes]]) -> None:
    seen = through(headers=headers)
    assert (seen.headers, seen.body) == ([], b"")


@pytest.mark.parametrize("declared", [[], [(b"content-length", b"%d" % MAX_BODY_BYTES)]])
def test_a_body_at_the_size_limit_is_accepted(declared: list[tuple[bytes, bytes]]) -> None:
    assert len(through(b"x" * MAX_BODY_BYTES, headers=[JSON, *declared]).body) == MAX_BODY_BYTES


def test_413_for_a_body_over_the_limit_whatever_its_declared_length() -> None:
    for declared in ([JSON], [JSON, (b"content-length", b"5")]):
        with pytest.raises(errors.PayloadTooLarge):
            through(b"x" * MAX_BODY_BYTES, b"x", headers=declared)


@pytest.mark.parametrize("length", [b"65537", b"999999999999", b"9" * 5000])
def test_413_for_a_declared_length_before_reading(length: bytes) -> None:
    with pytest.raises(errors.PayloadTooLarge):
        asyncio.run(pass_through([], [JSON, (b"content-length", length)], {"body_timeout_seconds": 0.05}))


@pytest.mark.parametrize(
    "body", [b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\x80"', '"é"'.encode("latin-1"), b'"\xe2\x82']
)
def test_400_for_a_body_that_is_not_utf8(body: bytes) -> None:
    with pytest.raises(errors.MalformedBody):
        through(body)


def test_a_character_split_between_chunks_is_decoded() -> None:
    assert through(b'"\xe2\x82', b'\xac"').body.decode() == '"€"'


def test_408_for_a_body_that_takes_too_long() -> None:
    with pytest.raises(errors.RequestTimeout):
        asyncio.run(pass_through([piece(b"{")], [JSON], {"body_timeout_seconds": 0.05}))


def test_a_disconnect_while_sending_ends_the_request_quietly() -> None:
    assert asyncio.run(pass_through([piece(b"{"), {"type": "http.disconnect"}], [JSON], {})) is None


def test_messages_after_the_body_come_from_the_server() -> None:
    # Marked as the server's: a message made up by the guard would differ.
    gone: Message = {"type": "http.disconnect", "said_by": "the server"}
    messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}, gone]
    seen = asyncio.run(pass_through(messages, [JSON], {}))
    assert seen
    assert seen.messages == messages


# The media type ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"Application/JSON",
        b" application/json ",
        b"application/json;charset=utf-8",
        b"application/json; charset=UTF-8",
        b'application/json; charset="utf-8"',
        b'APPLICATION/JSON ; CharSet="Utf-8"',
        b"application/json; version=1",
        b"application/json;",
        b'application/json; a="b;\\"c"; a*=x; a*1=y',
        b"application/json" + b"; a*%b=b" % (b"1" * 5_000),
    ],
)
def test_any_spelling_of_json_in_utf8_is_accepted(content_type: bytes) -> None:
    assert JSON in through(b"{}", headers=[(b"content-type", content_type)]).headers


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [JSON, JSON],
        [(b"content-type", b"")],
        [(b"content-type", b"application/problem+json")],
        [(b"content-type", b"text/json")],
        [(b"content-type", b"application/jsonx")],
        [(b"content-type", b"application/json, text/plain")],
        [(b"content-type", b"application/x-www-form-urlencoded")],
        [(b"content-type", b"multipart/form-data; boundary=x")],
        [(b"content-type", b"\xff\xfe")],
        [(b"content-type", b"application/json; charset=utf-16")],
        [(b"content-type", b"application/json; charset=latin-1")],
        [(b"content-type", b"application/json; charset=")],
        [(b"content-type", b"application/json; charset=utf-8; charset=utf-16")],
        [(b"content-type", b"application/json; charset*=utf-16''utf-8")],
        [(b"content-type", b"application/json; charset*0=utf-; charset*1=16")],
        [(b"content-type", b'application/json; charset="utf-8')],
        [(b"content-type", b"application/json; a=")],
        [(b"content-type", b'application/json; a="b')],
        [(b"content-type", b'application/json; a="' + b";" * 31_000)],
        [(b"content-type", b"application/json" + b";   " * 8_000 + b"!")],
        [JSON, (b"content-encoding", b"gzip")],
        [JSON, (b"content-encoding", b"identity"), (b"content-encoding", b"br")],
        [JSON, (b"transfer-encoding", b"gzip, chunked")],
    ],
)
def test_415_for_any_other_media_type_or_encoding(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(errors.UnsupportedMediaType):
        through(b"{}", headers=headers)


def test_the_identity_content_encoding_is_accepted() -> None:
    assert through(b"{}", headers=[JSON, (b"content-encoding", b"Identity")]).body == b"{}"


# The target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [b"a=%00", b"a=%ff", b"a=%ED%A0%80", b"%C0%80=a", b"a=\xff", b"a=\0"])
def test_400_for_a_query_that_is_not_text(query: bytes) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        through(query_string=query)
    assert [fault.pointer for fault in refused.value.faults] == ["/query"]


@pytest.mark.parametrize(
    "query", [b"", b"a=b&c", b"a=%E2%82%AC+%2B", b"a=%", b"a=%zz", b"a=\xe2\x82\xac", b"&&=="]
)
def test_a_query_of_valid_text_is_accepted(query: bytes) -> None:
    assert through(b"{}", query_string=query).body == b"{}"


@pytest.mark.parametrize(
    "path",
    [b"/%00", b"/%ff", b"/%ED%A0%80", b"*", b"http://host/path", b"relative", b"/\xff", b"/a%2Fb", b"/a%2fb"],
)
def test_404_for_an_invalid_path(path: bytes) -> None:
    with pytest.raises(errors.NotFound):
        through(path="/", raw_path=path)


@pytest.mark.parametrize("path", ["/\0", "/\udcff", "*", ""])
def test_404_for_an_invalid_path_without_a_raw_path(path: str) -> None:
    with pytest.raises(errors.NotFound):
        through(path=path, raw_path=None)


# Other protocols ---------------------------------------------------------------------------------


def test_the_lifespan_passes_untouched() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def unused(*_: object) -> Any:
        raise AssertionError

    lifespan = {"type": "lifespan"}
    asyncio.run(Guard(app)(lifespan, unused, unused))
    assert scopes == [lifespan]


def test_a_websocket_is_refused() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def unused(*_: object) -> Any:
        raise AssertionError

    asyncio.run(Guard(unused)({"type": "websocket"}, unused, send))
    assert sent == [{"type": "websocket.close"}]


# In front of Connexion, over sockets -------------------------------------------------------------

DOCUMENT = {
    "openapi": "3.0.3",
    "info": {"title": "Echo", "version": "1"},
    "paths": {
        "/echo/": {
            "post": {
                "operationId": "echo",
                "parameters": [{"name": "q", "in": "query", "schema": {"type": "string"}}],
                "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}},
                "responses": {"200": {"description": "The body."}},
            }
        }
    },
}


def echo(body: Any = None, q: str | None = None) -> Any:
    return {"body": body}, 200


async def refuse(_request: ConnexionRequest, error: Exception) -> ConnexionResponse:
    """Handle errors as `billing.http.problems` does in the real application."""
    known = error if isinstance(error, errors.BillingError) else errors.NotFound()
    rendered = problems.render(known, request_id="a-request")
    headers = {name.decode(): value.decode() for name, value in rendered.headers}
    return ConnexionResponse(body=rendered.body, status_code=rendered.status, headers=headers)


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    app = connexion.AsyncApp(__name__)
    app.add_middleware(Guard, MiddlewarePosition.BEFORE_SWAGGER, intake=Intake(body_timeout_seconds=0.5))
    app.add_error_handler(errors.BillingError, refuse)
    app.add_error_handler(404, refuse)
    app.add_api(DOCUMENT, resolver=connexion.Resolver(lambda _: echo))
    with serving(Edge(app)) as address:
        yield address


def post(*headers: str, body: bytes | None = None, target: str = "/echo/") -> bytes:
    return request("POST", target, *headers, body=body)


@pytest.mark.parametrize(
    "sent",
    [
        post("Content-Type: Application/JSON", body=b'{"a":1}'),
        post('Content-Type: application/json; charset="UTF-8"', body=b'{"a":1}'),
        post("Content-Type: application/json", "Transfer-Encoding: chunked", body=chunked(b'{"a"', b":1}")),
        post("Content-Type: application/json", "Connection: Upgrade", "Upgrade: h2c", body=b'{"a":1}'),
    ],
)
def test_connexion_accepts_what_the_guard_passes(address: Address, sent: bytes) -> None:
    answer = exchange(address, sent)
    assert (answer.status, answer.json()) == (200, {"body": {"a": 1}})


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
def test_connexion_never_sees_the_content_type_of_an_empty_body(address: Address, content_type: str) -> None:
    assert exchange(address, post(f"Content-Type: {content_type}", body=b"")).status != 415


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (post(body=b"{}"), 415, "unsupported-media-type"),
        (
            post("Content-Type: application/json", "Content-Type: text/plain", body=b"{}"),
            415,
            "unsupported-media-type",
        ),
        (post("Content-Type: application/json; charset=utf-16", body=b"{}"), 415, "unsupported-media-type"),
        (post("Content-Type: application/json", body=b'"\xff"'), 400, "malformed-body"),
        (post("Content-Type: application/json", body=b"x" * 65_537), 413, "payload-too-large"),
        (post("Transfer-Encoding: chunked", body=chunked(*[b"x" * 8_192] * 9)), 413, "payload-too-large"),
        (post("Content-Length: 99999999"), 413, "payload-too-large"),
        (post("Content-Type: application/json", "Content-Length: 9", body=b"{}"), 408, "request-timeout"),
        (post(target="/echo/?q=%00", body=b""), 400, "invalid-request"),
        (post(target="/echo/?q=%ff", body=b""), 400, "invalid-request"),
        (post(target="/%00", body=b""), 404, "not-found"),
        (post(target="/%ff", body=b""), 404, "not-found"),
        (post(target="//echo/", body=b""), 404, "not-found"),
        (request("OPTIONS", "*"), 404, "not-found"),
        (request("GET", "http://elsewhere/nothing/"), 404, "not-found"),
    ],
)
def test_every_refusal_is_a_problem(address: Address, sent: bytes, status: int, code: str) -> None:
    answer = exchange(address, sent)
    assert (answer.status, answer.code) == (status, code)


def test_413_is_sent_instead_of_100_continue(address: Address) -> None:
    answer = exchange(address, post("Content-Length: 65537", "Expect: 100-continue"))
    assert answer.code == "payload-too-large"


def test_408_closes_the_connection(address: Address) -> None:
    with Connection(address) as connection:
        connection.send(post("Content-Type: application/json", "Content-Length: 9", body=b"{}"))
        assert connection.receive()["connection"] == "close"
        assert connection.is_closed_by_server()


def test_a_client_disconnect_is_logged_as_499_and_not_as_an_error(
    address: Address, caplog: pytest.LogCaptureFixture
) -> None:
    with structlog.testing.capture_logs() as events:
        with Connection(address) as connection:
            connection.send(post("Content-Type: application/json", "Content-Length: 9", body=b"{}"))
        deadline = time.monotonic() + 0.4
        while not events and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [(event["event"], event["status"]) for event in events] == [("request", 499)]
    assert not caplog.records
