"""The connection, over real sockets: what no middleware sees."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from billing.cli.serve import DRAIN_SECONDS
from billing.http import protocol
from billing.http.guard import BODY_TIMEOUT_SECONDS
from tests.rawhttp import Address, Connection, chunked, exchange, request, serving

UPGRADE = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA",
)
ROOT = Path(__file__).parents[2]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the request; `/early` answers before it reads, `/slow` late, `/begun` never completely."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/begun":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await read(receive)
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(0.6)
    body = b"" if scope["path"] == "/early" else await read(receive)
    headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    seen = {"method": scope["method"], "path": scope["path"], "headers": headers, "body": body.decode()}
    content = orjson.dumps(seen)
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": content})


async def read(receive: Receive) -> bytes:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    return body


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with serving(echo) as address:
        yield address


@pytest.fixture
def connection(address: Address) -> Iterator[Connection]:
    with Connection(address) as connection:
        yield connection


def seen_by(connection: Connection, *packets: bytes) -> dict[str, Any]:
    connection.send(*packets)
    answer = connection.receive()
    assert answer.status == 200, answer
    seen: dict[str, Any] = answer.json()
    return seen


# Upgrade -----------------------------------------------------------------------------------------


def test_a_request_for_h2c_keeps_its_body(connection: Connection) -> None:
    assert seen_by(connection, request("POST", "/", *UPGRADE, body=b"hello"))["body"] == "hello"


def test_a_request_for_h2c_keeps_its_chunked_body(connection: Connection) -> None:
    coded = request("POST", "/", *UPGRADE, "Transfer-Encoding: chunked", body=chunked(b"he", b"llo"))
    assert seen_by(connection, coded)["body"] == "hello"


@pytest.mark.parametrize("cut", [5, 30, -7, -5, -2])
def test_a_request_for_h2c_may_come_in_pieces(connection: Connection, cut: int) -> None:
    whole = request("POST", "/", *UPGRADE, body=b"hello")
    assert seen_by(connection, whole[:cut], whole[cut:])["body"] == "hello"


def test_a_request_for_h2c_byte_by_byte(connection: Connection) -> None:
    whole = request("POST", "/", *UPGRADE, body=b"hello")
    connection.send(*[bytes([byte]) for byte in whole], pause_seconds=0.0005)
    assert connection.receive().json()["body"] == "hello"


def test_requests_for_h2c_keep_the_connection(connection: Connection) -> None:
    for body in (b"one", b"two", b"three"):
        assert seen_by(connection, request("POST", "/", *UPGRADE, body=body))["body"] == body.decode()


def test_requests_for_h2c_may_be_pipelined(connection: Connection) -> None:
    requests = [request("POST", f"/{n}", *UPGRADE, body=b"x" * n) for n in range(1, 6)]
    connection.send(b"".join(requests))
    assert [connection.receive().json()["path"] for _ in requests] == ["/1", "/2", "/3", "/4", "/5"]


def test_a_request_for_h2c_may_wait_for_100(connection: Connection) -> None:
    connection.send(request("POST", "/", *UPGRADE, "Expect: 100-continue", "Content-Length: 5"))
    assert connection.receive().status == 100
    assert seen_by(connection, b"hello")["body"] == "hello"


def test_connection_close_is_kept_when_an_upgrade_is_ignored(connection: Connection) -> None:
    seen = seen_by(
        connection, request("POST", "/", "Connection: close, Upgrade", "Upgrade: h2c", body=b"hello")
    )
    assert seen["body"] == "hello"
    assert ["connection", "close"] in seen["headers"]
    assert connection.is_closed_by_server()


@pytest.mark.parametrize("wanted", ["websocket", "h2c", "TLS/1.0", "anything"])
def test_no_upgrade_is_granted(connection: Connection, wanted: str) -> None:
    seen = seen_by(connection, request("GET", "/", "Connection: Upgrade", f"Upgrade: {wanted}"))
    assert "upgrade" not in dict(seen["headers"])


def test_many_upgrades_in_one_read_do_not_recurse(connection: Connection) -> None:
    one = request("GET", "/", "Connection: Upgrade", "Upgrade: h2c")
    connection.send(one * 900)
    assert {connection.receive().status for _ in range(1 + protocol.MAX_PIPELINED)} == {200}
    assert connection.is_closed_by_server()


def test_an_http_1_0_upgrade_request_keeps_its_body(connection: Connection) -> None:
    coded = request("POST", "/", "Connection: Upgrade", "Upgrade: h2c", body=b"hello", version="1.0")
    assert seen_by(connection, coded)["body"] == "hello"


# Ordinary requests -------------------------------------------------------------------------------


def test_a_plain_request_is_answered(connection: Connection) -> None:
    assert seen_by(connection, request("POST", "/a%20b?q=1", body=b"hello"))["path"] == "/a b"


def test_a_chunked_body_is_read_whole(connection: Connection) -> None:
    parts = [
        request("POST", "/", "Transfer-Encoding: chunked"),
        b"2\r\nhe\r\n",
        b"3\r\nllo\r\n",
        b"0\r\n\r\n",
    ]
    assert seen_by(connection, *parts)["body"] == "hello"


def test_only_the_first_of_too_many_pipelined_requests_are_answered(connection: Connection) -> None:
    connection.send(b"".join(request("GET", f"/{n}") for n in range(1_000)))
    answered = [connection.receive().json()["path"] for _ in range(1 + protocol.MAX_PIPELINED)]
    assert answered == [f"/{n}" for n in range(1 + protocol.MAX_PIPELINED)]
    assert connection.is_closed_by_server()


def test_as_many_pipelined_requests_as_allowed_are_answered_repeatedly(connection: Connection) -> None:
    for _ in range(3):
        connection.send(request("GET", "/") * protocol.MAX_PIPELINED)
        assert {connection.receive().status for _ in range(protocol.MAX_PIPELINED)} == {200}


def test_requests_sent_while_others_wait_are_answered_too(connection: Connection) -> None:
    half = protocol.MAX_PIPELINED // 2 + 1
    connection.send(request("GET", "/slow") * 2 + request("GET", "/") * half)
    assert connection.receive().status == 200
    connection.send(request("GET", "/") * half)
    assert {connection.receive().status for _ in range(1 + 2 * half)} == {200}


def test_pipelined_requests_are_answered_in_order(connection: Connection) -> None:
    connection.send(b"".join(request("GET", f"/{n}") for n in range(20)))
    assert [connection.receive().json()["path"] for _ in range(20)] == [f"/{n}" for n in range(20)]


def test_an_http_1_0_connection_is_closed_after_its_response(connection: Connection) -> None:
    assert seen_by(connection, b"GET / HTTP/1.0\r\n\r\n")["path"] == "/"
    assert connection.is_closed_by_server()


def test_100_is_sent_to_a_client_that_expects_it(connection: Connection) -> None:
    connection.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 5"))
    assert connection.receive().status == 100
    assert seen_by(connection, b"hello")["body"] == "hello"


def test_the_connection_closes_when_an_expected_100_was_never_sent(connection: Connection) -> None:
    connection.send(request("POST", "/early", "Expect: 100-continue", "Content-Length: 5"))
    assert connection.receive().status == 200
    assert connection.is_closed_by_server()


def test_the_rest_of_an_unread_body_is_dropped(connection: Connection) -> None:
    connection.send(request("POST", "/early", "Content-Length: 500000"), b"x" * 500_000)
    assert connection.receive().json()["path"] == "/early"
    assert seen_by(connection, request("GET", "/next"))["path"] == "/next"


def test_a_large_body_and_the_next_head_in_one_packet(connection: Connection) -> None:
    connection.send(request("POST", "/", body=b"x" * 60_000) + request("GET", "/next")[:-4], b"\r\n\r\n")
    assert [connection.receive().json()["path"] for _ in range(2)] == ["/", "/next"]


def test_an_absolute_target_is_reduced_to_its_path(connection: Connection) -> None:
    assert seen_by(connection, request("GET", "http://elsewhere/path/?q"))["path"] == "/path/"


def test_trailers_are_not_headers(connection: Connection) -> None:
    head = request("POST", "/", "Transfer-Encoding: chunked")
    trailer = b"5\r\nhello\r\n0\r\nX-API-Key: smuggled\r\nContent-Type: text/x\r\n\r\n"
    seen = seen_by(connection, head + trailer)
    assert {"x-api-key", "content-type"}.isdisjoint(dict(seen["headers"]))


# Refusals ----------------------------------------------------------------------------------------

MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by name": b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "unknown method": request("BREW"),
    "CONNECT": request("CONNECT", "elsewhere:443"),
    "no path": request("GET", "http://elsewhere"),
    "raw UTF-8 in the path": b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in the query": request("GET", "/?a=\0"),
    "space in the path": request("GET", "/a b"),
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": request("GET", "/", "Host: other"),
    "NUL in a header": request("GET", "/", "X: a\0b"),
    "space before the colon": request("GET", "/", "X : a"),
    "folded header": request("GET", "/", "X: a\r\n b"),
    "bare LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "two Content-Lengths": request("POST", "/", "Content-Length: 3", "Content-Length: 4", body=b"abcd"),
    "the same Content-Length twice": request(
        "POST", "/", "Content-Length: 3", "Content-Length: 3", body=b"abc"
    ),
    "signed Content-Length": request("POST", "/", "Content-Length: +3", body=b"abc"),
    "endless Content-Length": request("POST", "/", "Content-Length: 99999999999999999999", body=b"abc"),
    "both framings": request(
        "POST", "/", "Content-Length: 3", "Transfer-Encoding: chunked", body=chunked(b"abc")
    ),
    "both framings, reversed": request(
        "POST", "/", "Transfer-Encoding: chunked", "Content-Length: 3", body=chunked(b"abc")
    ),
    "chunked twice": request(
        "POST", "/", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=chunked(b"abc")
    ),
    "not chunked last": request("POST", "/", "Transfer-Encoding: chunked, gzip", body=chunked(b"abc")),
    "a bad chunk": request("POST", "/", "Transfer-Encoding: chunked", body=b"zz\r\nabc\r\n"),
    "Upgrade and a bad chunk": request("POST", "/", *UPGRADE, "Transfer-Encoding: chunked", body=b"zz\r\n"),
    "Upgrade and both framings": request(
        "POST", "/", *UPGRADE, "Content-Length: 1", "Transfer-Encoding: chunked"
    ),
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http_is_a_400_problem_and_closes_the_connection(
    connection: Connection, sent: bytes
) -> None:
    connection.send(sent)
    answer = connection.receive()
    assert (answer.status, answer.code) == (400, "invalid-request")
    assert answer["x-request-id"] == answer.json()["request_id"]
    assert answer["connection"] == "close"
    assert answer["x-content-type-options"] == "nosniff"
    assert connection.is_closed_by_server()


def test_garbage_after_a_request_does_not_replace_its_response(connection: Connection) -> None:
    connection.send(request("POST", "/", body=b"hello") + b"garbage\r\n\r\n")
    assert connection.receive().status == 200
    assert connection.is_closed_by_server()


def test_a_malformed_body_after_the_response_started_gets_no_second_one(connection: Connection) -> None:
    connection.send(request("POST", "/begun", "Transfer-Encoding: chunked"))
    assert connection.receive(to_head=True).status == 200
    connection.send(b"garbage\r\n")
    assert connection.is_closed_by_server()


def test_garbage_after_pipelined_requests_does_not_drop_their_responses(connection: Connection) -> None:
    connection.send(request("GET", "/1") + request("GET", "/2") + b"garbage\r\n\r\n")
    assert [connection.receive().json()["path"] for _ in range(2)] == ["/1", "/2"]
    assert connection.is_closed_by_server()


def test_headers_up_to_the_limit_are_accepted(connection: Connection) -> None:
    headers = [f"X-{n}: {'v' * 300}" for n in range(protocol.MAX_HEADERS - 1)]
    assert len(seen_by(connection, request("GET", "/", *headers))["headers"]) == protocol.MAX_HEADERS


TOO_LARGE = {
    "too many": [request("GET", "/", *[f"X-{n}: v" for n in range(protocol.MAX_HEADERS)])],
    "too long": [request("GET", "/", "X: " + "v" * protocol.MAX_HEAD_BYTES)],
    "too long together": [request("GET", "/", *[f"X-{n}: {'v' * 1000}" for n in range(33)])],
    "an endless header": [b"GET / HTTP/1.1\r\nHost: x\r\nX: ", *[b"v" * 5000] * 7],
    "an endless target": [b"GET /", *[b"v" * 5000] * 7],
    "a long target": [request("GET", "/" + "v" * protocol.MAX_HEAD_BYTES)],
    "with an upgrade": [request("GET", "/", *UPGRADE, "X: " + "v" * protocol.MAX_HEAD_BYTES)],
}


@pytest.mark.parametrize("packets", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_431_for_a_head_that_is_too_large(connection: Connection, packets: list[bytes]) -> None:
    connection.send(*packets)
    answer = connection.receive()
    assert (answer.status, answer.code) == (431, "request-headers-too-large")
    assert connection.is_closed_by_server()


ENDLESS_TRAILERS = {"one": [b"X: ", *[b"v" * 5000] * 7], "many": [b"X: y\r\n" * 900] * 7}


@pytest.mark.parametrize("packets", ENDLESS_TRAILERS.values(), ids=ENDLESS_TRAILERS.keys())
def test_431_for_endless_trailers(connection: Connection, packets: list[bytes]) -> None:
    connection.send(request("POST", "/", "Transfer-Encoding: chunked", "Expect: 100-continue"))
    # The head is read apart: what is read together with its end is not counted.
    assert connection.receive().status == 100
    connection.send(b"0\r\n", *packets)
    answer = connection.receive()
    assert (answer.status, answer.code) == (431, "request-headers-too-large")
    assert connection.is_closed_by_server()


def test_many_requests_on_one_connection_are_not_one_large_head(connection: Connection) -> None:
    for _ in range(10):
        assert seen_by(connection, request("POST", "/", "X: " + "v" * 5000, body=b"x" * 10_000))


def test_a_body_in_the_smallest_chunks_is_not_a_large_head(connection: Connection) -> None:
    coded = request("POST", "/", "Transfer-Encoding: chunked", body=chunked(*[b"x"] * 20_000))
    assert len(seen_by(connection, coded)["body"]) == 20_000


# Timeouts ----------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    monkeypatch.setattr(protocol, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "CHECKED_EVERY_SECONDS", 0.05)
    with serving(echo) as address:
        yield address


def is_closed_while_sending(connection: Connection, fragment: bytes) -> bool:
    """Whether the server closes the connection of a client that sends a fragment at a time."""
    for _ in range(75):
        try:
            connection.send(fragment)
        except ConnectionError:
            return True
        time.sleep(0.02)
    return False


def test_408_for_an_unfinished_request_head(hurried: Address) -> None:
    with Connection(hurried) as connection:
        connection.send(b"GET / HTTP/1.1\r\n", b"Host: x\r\n")
        assert connection.receive().code == "request-timeout"
        assert connection.is_closed_by_server()


@pytest.mark.parametrize("fragment", [b"\r\n", b"X: y\r\n"])
def test_a_slowly_sent_request_head_times_out(hurried: Address, fragment: bytes) -> None:
    with Connection(hurried) as connection:
        connection.send(b"" if fragment.isspace() else b"GET / HTTP/1.1\r\n")
        assert is_closed_while_sending(connection, fragment)


def test_a_connection_without_a_request_is_closed(hurried: Address) -> None:
    with Connection(hurried) as connection:
        assert connection.is_closed_by_server()


def test_a_slow_body_after_its_response_closes_the_connection(hurried: Address) -> None:
    with Connection(hurried) as connection:
        connection.send(request("POST", "/early", "Content-Length: 500"), b"x")
        assert connection.receive().status == 200
        assert is_closed_while_sending(connection, b"x")


def test_the_timeout_of_a_request_does_not_apply_to_its_response(hurried: Address) -> None:
    with Connection(hurried) as connection:
        assert seen_by(connection, request("GET", "/slow"))["path"] == "/slow"
        assert seen_by(connection, request("GET", "/next"))["path"] == "/next"


def test_closing_an_idle_connection_is_left_to_uvicorn(hurried: Address) -> None:
    with Connection(hurried) as connection:
        assert seen_by(connection, request("GET", "/1"))["path"] == "/1"
        time.sleep(0.6)
        assert seen_by(connection, request("GET", "/2"))["path"] == "/2"


def test_closed_connections_are_garbage_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CHECKED_EVERY_SECONDS", 3600)
    alive: weakref.WeakSet[protocol.Protocol] = weakref.WeakSet()

    class Tracked(protocol.Protocol):
        def connection_made(self, transport: Any) -> None:
            alive.add(self)
            super().connection_made(transport)

    with serving(echo, http=Tracked) as address:
        for _ in range(3):
            exchange(address, request("GET", "/", "Connection: close"))
        assert is_soon(lambda: gc.collect() >= 0 and not alive)


def is_soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within a few seconds."""
    return any(condition() or time.sleep(0.05) for _ in range(100))


def test_an_idle_connection_has_the_full_timeout_for_its_next_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(protocol, "CHECKED_EVERY_SECONDS", 0.05)
    with serving(echo) as address, Connection(address) as connection:
        assert seen_by(connection, request("GET", "/1"))["path"] == "/1"
        time.sleep(2.2)
        connection.send(b"GET /2 HTTP/1.1\r\n", b"Host: test\r\n\r\n", pause_seconds=0.3)
        assert connection.receive().json()["path"] == "/2"


def test_draining_lasts_longer_than_a_request_may_take_to_arrive() -> None:
    assert protocol.PATIENCE_SECONDS + protocol.CHECKED_EVERY_SECONDS < DRAIN_SECONDS
    assert BODY_TIMEOUT_SECONDS < DRAIN_SECONDS
    documented = f"A body may take {BODY_TIMEOUT_SECONDS:.0f} s to arrive"
    assert documented in (ROOT / "docs/settings.md").read_text()


# The command -------------------------------------------------------------------------------------


def test_the_uvicorn_command_accepts_the_protocol(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text("async def app(scope, receive, send): pass\n")
    command = [sys.executable, "-m", "uvicorn", "tiny:app", "--http", "billing.http.protocol:Protocol"]
    arguments = ["--lifespan", "off", "--port", "0", "--app-dir", str(tmp_path)]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stderr
        line = next(line for line in process.stderr if "running on" in line)
        port = int(line.partition("127.0.0.1:")[2].split()[0])
        assert exchange(("127.0.0.1", port), b"garbage\r\n\r\n").code == "invalid-request"
    finally:
        process.terminate()
        process.communicate(timeout=10)


class Wire(asyncio.Transport):
    """Records what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.packets.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True


def test_writes_of_one_event_loop_iteration_are_sent_together() -> None:
    async def write(wire: Wire) -> None:
        coalescing = protocol.CoalescingTransport(wire, asyncio.get_running_loop())
        coalescing.write(b"head ")
        coalescing.write(b"body")
        await asyncio.sleep(0)
        coalescing.write(b"next")
        await asyncio.sleep(0)

    wire = Wire()
    asyncio.run(write(wire))
    assert wire.packets == [b"head body", b"next"]


def test_pending_writes_are_sent_before_the_connection_is_closed() -> None:
    async def write(wire: Wire) -> None:
        coalescing = protocol.CoalescingTransport(wire, asyncio.get_running_loop())
        coalescing.write(b"farewell")
        coalescing.close()
        await asyncio.sleep(0)

    wire = Wire()
    asyncio.run(write(wire))
    assert (wire.packets, wire.is_closed) == ([b"farewell"], True)
