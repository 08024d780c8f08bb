"""The metrics' own port, while clients hold its connections open."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import requests
from structlog.testing import capture_logs

from billing.http.exposition import MOST_CONNECTIONS, PATH, Exporter, Read
from tests.live import eventually

PATIENCE_SECONDS = 5  # Less than the time a silent connection is left open.


@contextmanager
def exporting(read: Read) -> Iterator[tuple[str, int]]:
    with Exporter(read, "127.0.0.1", 0, None) as exporter:
        yield exporter.server_address[0], exporter.server_address[1]  # type: ignore[misc]


def scrape(address: tuple[str, int]) -> requests.Response:
    host, port = address
    return requests.get(f"http://{host}:{port}{PATH}", timeout=PATIENCE_SECONDS)


def connect(stack: ExitStack, address: tuple[str, int], sent: bytes) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(address, PATIENCE_SECONDS))
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # With something unread.
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: "], ids=["silent", "half a head"])
def test_idle_connections_do_not_block_scrapes(sent: bytes) -> None:
    before = threading.active_count()
    with exporting(lambda _: (b"metrics", "text/plain")) as address, ExitStack() as stack:
        idle = [connect(stack, address, sent) for _ in range(3 * MOST_CONNECTIONS)]
        assert scrape(address).content == b"metrics"
        # Those that came first have been closed.
        for connection in idle[: 2 * MOST_CONNECTIONS]:
            assert is_closed(connection)
        # A thread told to end may not have ended yet; the server has one of its own.
        eventually(lambda: threading.active_count() - before <= 2 * MOST_CONNECTIONS)


def test_a_connection_being_answered_is_not_closed_for_a_new_one() -> None:
    may_answer, requested = threading.Event(), threading.Semaphore(0)

    def read(_accept: str) -> tuple[bytes, str]:
        requested.release()
        assert may_answer.wait(PATIENCE_SECONDS)
        return b"metrics", "text/plain"

    with exporting(read) as address, ExitStack() as stack:
        whole = f"GET {PATH} HTTP/1.1\r\n\r\n".encode()
        accepted = [connect(stack, address, whole) for _ in range(MOST_CONNECTIONS)]
        for _ in accepted:
            assert requested.acquire(timeout=PATIENCE_SECONDS)
        refused = connect(stack, address, b"")
        assert is_closed(refused)
        may_answer.set()
        for connection in accepted:
            assert connection.makefile("rb").read().endswith(b"metrics")
        assert scrape(address).content == b"metrics"


def test_a_client_disconnect_prints_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    has_left, has_answered = threading.Event(), threading.Event()

    def read(_accept: str) -> tuple[bytes, str]:
        has_left.wait(PATIENCE_SECONDS)
        has_answered.set()
        return b"x" * 10_000_000, "text/plain"

    with exporting(read) as address:
        with ExitStack() as stack:
            leaving = connect(stack, address, b"GET /metrics HTTP/1.1\r\n\r\n")
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        has_left.set()
        assert has_answered.wait(PATIENCE_SECONDS)
        assert scrape(address).status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError(), OSError(24, "Too many open files")])
def test_an_error_is_logged_and_not_printed(capfd: pytest.CaptureFixture[str], error: Exception) -> None:
    def read(_accept: str) -> tuple[bytes, str]:
        raise error

    with capture_logs() as lines, exporting(read) as address:
        with pytest.raises(requests.ConnectionError):
            scrape(address)
        eventually(lambda: [line["event"] for line in lines] == ["metrics cannot be shown"])
    assert capfd.readouterr().err == ""
