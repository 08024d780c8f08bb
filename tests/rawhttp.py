"""Raw HTTP/1.1: a client that sends any bytes, and a server on loopback to send them to."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any

import uvicorn

Address = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """One answer as received; header names are case-insensitive."""

    status: int
    headers: Message
    body: bytes

    def __getitem__(self, name: str) -> str | None:
        return self.headers[name]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The `code` of a problem; fails if the answer is no problem."""
        assert self["content-type"] == "application/problem+json", (
            self.status,
            self["content-type"],
            self.body,
        )
        assert self.json()["status"] == self.status
        code: str = self.json()["code"]
        return code


class Connection:
    """One TCP connection; nothing is added to what is sent.

    The timeout is shorter than uvicorn's keep-alive of 5 s: an idle connection does not seem closed.
    """

    def __init__(self, address: Address, *, timeout_seconds: float = 3.0) -> None:
        self._socket = socket.create_connection(address, timeout=timeout_seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._socket.close()

    def send(self, *packets: bytes, pause_seconds: float = 0.02) -> None:
        """Send each packet by itself, so that the server reads them separately."""
        for number, packet in enumerate(packets):
            if number:
                time.sleep(pause_seconds)
            self._socket.sendall(packet)

    def receive(self, *, to_head: bool = False) -> Answer:
        """The next answer, a 100 included; ConnectionError when there is none."""
        line = self._reader.readline()
        if not line:
            raise ConnectionError("The server closed the connection without an answer.")
        status = int(line.split()[1])
        headers = http.client.parse_headers(self._reader)
        has_no_body = to_head or status < 200 or status in (204, 304)
        return Answer(status, headers, b"" if has_no_body else self._body(headers))

    def is_closed_by_server(self) -> bool:
        """Whether the server has ended the connection; waits for that up to the timeout."""
        try:
            return self._reader.read(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def _body(self, headers: Message) -> bytes:
        if headers["transfer-encoding"] == "chunked":
            return b"".join(self._chunks())
        if headers["content-length"] is None:
            return self._reader.read()
        length = int(headers["content-length"])
        body = self._reader.read(length)
        assert len(body) == length, "The body is shorter than its Content-Length."
        return body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._reader.readline().partition(b";")[0], 16):
            yield self._reader.read(size)
            self._reader.readline()
        self._reader.readline()


def exchange(address: Address, *packets: bytes, timeout_seconds: float = 3.0) -> Answer:
    """Send the packets over a new connection and read one answer."""
    with Connection(address, timeout_seconds=timeout_seconds) as connection:
        connection.send(*packets)
        return connection.receive()


def request(
    method: str = "GET", target: str = "/", *headers: str, body: bytes | None = None, version: str = "1.1"
) -> bytes:
    """The bytes of a request, with Host, and with Content-Length when there is a body and no such header."""
    lines = [f"{method} {target} HTTP/{version}", "Host: test", *headers]
    is_framed = any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in headers)
    if body is not None and not is_framed:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*chunks: bytes) -> bytes:
    """A body in the chunked coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


@contextmanager
def serving(app: Any, **config: Any) -> Iterator[Address]:
    """A uvicorn server in a separate thread, on a free port of loopback, stopped at the end."""
    settings: dict[str, Any] = {"http": "billing.http.protocol:Protocol", "lifespan": "auto", "ws": "none"}
    settings |= {"proxy_headers": False, "server_header": False, "log_config": None} | config
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield _address_of(server, thread)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=5)
        assert not thread.is_alive(), "The server did not stop."


def _address_of(server: uvicorn.Server, thread: threading.Thread) -> Address:
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "The server did not start."
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return host, port
