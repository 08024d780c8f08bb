"""Receivers on loopback, well-behaved and hostile, and the names that resolve to them."""

from __future__ import annotations

import gzip
import http.client
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cache

MEGABYTE = 1024 * 1024
DRIP_SECONDS = 0.05
STOP_SECONDS = 5


@dataclass(frozen=True)
class Received:
    """One request as received."""

    method: str
    path: str
    headers: Message
    body: bytes


@dataclass
class Receiver:
    """A receiver, and what it has received so far."""

    address: tuple[str, int]
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.port}/in"

    @property
    def last(self) -> Received:
        return self.received[-1]


class Visit:
    """One connection, from the receiver's side."""

    def __init__(self, receiver: Receiver, connection: socket.socket) -> None:
        self.receiver = receiver
        self.connection = connection
        self._reader = connection.makefile("rb")

    def close(self) -> None:
        self._reader.close()
        self.connection.close()

    def receive(self) -> Received | None:
        """The next request, None when there are no more."""
        if head := self.receive_head():
            body = self._reader.read(int(head.headers["content-length"] or 0))
            self.receiver.received.append(replace(head, body=body))
            return self.receiver.last
        return None

    def receive_head(self) -> Received | None:
        """The next request without its body, which does not count as received."""
        line = self._reader.readline()
        if not line:
            return None
        method, path, _ = line.decode().split()
        return Received(method, path, http.client.parse_headers(self._reader), b"")

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def send_without_end(self, piece: bytes, total_bytes: float = float("inf")) -> None:
        sent = 0
        while sent < total_bytes and not self.receiver.stopped.is_set():
            self.send(piece)
            sent += len(piece)

    def drip(self, data: Iterator[int]) -> None:
        for byte in data:
            if self.receiver.stopped.wait(DRIP_SECONDS):
                return
            self.send(bytes([byte]))


Behaviour = Callable[[Visit], None]


# Behaviours --------------------------------------------------------------------------------------


def head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answers(status: int = 200, body: bytes = b"ok", **headers: str) -> Behaviour:
    """Gives every request of the connection the same answer; `Retry_After="7"` is the header Retry-After."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def behave(visit: Visit) -> None:
        while visit.receive():
            visit.send(head(status, {"Content-Length": str(len(body)), **given}) + body)

    return behave


def says(data: bytes) -> Behaviour:
    """Sends these bytes in answer to a request, and closes the connection."""

    def behave(visit: Visit) -> None:
        visit.receive()
        visit.send(data)

    return behave


def greets(data: bytes) -> Behaviour:
    """Sends these bytes before it receives any, and closes the connection when the other side has."""

    def behave(visit: Visit) -> None:
        visit.send(data)
        while visit.connection.recv(1024):
            pass

    return behave


def resets_at_once(visit: Visit) -> None:
    """Closes the connection with RST as soon as it is accepted: the other side may never see it open."""
    visit.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def resets(visit: Visit) -> None:
    """Closes the connection with RST instead of an answer."""
    visit.receive()
    resets_at_once(visit)


def breaks_off(data: bytes) -> Behaviour:
    """Sends these bytes in answer to a request, and closes the connection with RST."""

    def behave(visit: Visit) -> None:
        visit.receive()
        visit.send(data)
        resets_at_once(visit)

    return behave


def answers_head(status: int) -> Behaviour:
    """Answers after the head of a request, and closes the connection: with RST, as its body is unread."""

    def behave(visit: Visit) -> None:
        visit.receive_head()
        visit.send(head(status, {"Content-Length": "0"}))

    return behave


def hangs(visit: Visit) -> None:
    """Accepts the connection, and neither reads nor sends."""
    visit.receiver.stopped.wait()


def drips_head(visit: Visit) -> None:
    visit.receive()
    visit.drip(itertools.chain(b"HTTP/1.1 200 OK\r\nX-Slow: ", itertools.repeat(ord("x"))))


def drips_body(visit: Visit) -> None:
    visit.receive()
    visit.send(head(200, {"Content-Length": str(MEGABYTE)}))
    visit.drip(itertools.repeat(ord("x")))


def drips_until_the_end(visit: Visit) -> None:
    """A body without a length: if it is cut off, what was read looks complete."""
    visit.receive()
    visit.send(head(200, {"Connection": "close"}))
    visit.drip(itertools.repeat(ord("x")))


def drips_handshake(visit: Visit) -> None:
    """Sends the beginning of a TLS record of 16 KiB, byte by byte."""
    visit.drip(itertools.chain(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc", itertools.repeat(0)))


def floods(status: int = 200, **headers: str) -> Behaviour:
    """Answers with 100 MB."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def behave(visit: Visit) -> None:
        visit.receive()
        visit.send(head(status, {"Content-Length": str(100 * MEGABYTE), **given}))
        visit.send_without_end(b"x" * 64 * 1024, 100 * MEGABYTE)

    return behave


def floods_head(visit: Visit) -> None:
    visit.receive()
    visit.send(b"HTTP/1.1 200 OK\r\n")
    visit.send_without_end(b"Set-Cookie: a=" + b"x" * 60_000 + b"\r\n")


def floods_continue(visit: Visit) -> None:
    """Sends 100 (Continue) without end, which http.client skips."""
    visit.receive()
    visit.send_without_end(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def sends_head(*lines: bytes) -> Behaviour:
    """Answers 204 with these lines in its head, valid or not."""
    return says(b"\r\n".join([b"HTTP/1.1 204 No Content", *lines, b"", b""]))


def nested_parts(levels: int) -> bytes:
    """A header that a MIME parser reads as nested parts with many empty lines in each."""
    types = [b"Content-Type:multipart/m;boundary=%d\r\r--%d" % (level, level) for level in range(levels)]
    return b"X: y\r" + b"\r".join(types) + b"\r" * 30_000


def floods_negative_chunk(visit: Visit) -> None:
    """Sends a chunk of size -1, which http.client reads to the end of the stream."""
    visit.receive()
    visit.send(head(200, {"Transfer-Encoding": "chunked"}) + b"-1\r\n")
    visit.send_without_end(b"x" * 64 * 1024)


def floods_trailers(visit: Visit) -> None:
    visit.receive()
    visit.send(head(200, {"Transfer-Encoding": "chunked"}) + b"2\r\nok\r\n0\r\n")
    visit.send_without_end(b"X-Trailer: x\r\n" * 1000)


@cache
def bomb() -> bytes:
    """100 MB of zeros in less than 1 MB."""
    return gzip.compress(bytes(100 * MEGABYTE), 1)


def sends_bomb(visit: Visit) -> None:
    answers(200, bomb(), Content_Encoding="gzip")(visit)


# Running them ------------------------------------------------------------------------------------


@contextmanager
def receiving(
    behave: Behaviour, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> Iterator[Receiver]:
    """A receiver on a free port with this behaviour on every connection, for as long as the block."""
    listener = socket.create_server((host, 0), backlog=256)
    receiver = Receiver(listener.getsockname()[:2])
    visits = _Visits(receiver, behave, tls)
    thread = threading.Thread(target=visits.accept, args=(listener,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(STOP_SECONDS)
        listener.close()
        visits.end()


class _Visits:
    def __init__(self, receiver: Receiver, behave: Behaviour, tls: ssl.SSLContext | None) -> None:
        self._receiver = receiver
        self._behave = behave
        self._tls = tls
        self._running: list[tuple[socket.socket, threading.Thread]] = []

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self._receiver.connections += 1
                thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
                self._running.append((connection, thread))
                thread.start()

    def _run(self, connection: socket.socket) -> None:
        # The other side may do anything to the connection: that is no failure of the receiver.
        with connection, suppress(OSError), self._wrapped(connection) as wrapped:
            visit = Visit(self._receiver, wrapped)
            try:
                self._behave(visit)
            finally:
                visit.close()
        self._receiver.ended.release()

    def _wrapped(self, connection: socket.socket) -> socket.socket:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A duplicate descriptor, or end() could not shut the connection down.
        return self._tls.wrap_socket(connection.dup(), server_side=True) if self._tls else connection

    def end(self) -> None:
        for connection, thread in self._running:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(STOP_SECONDS)
            assert not thread.is_alive(), "A receiver did not stop."


# Names -------------------------------------------------------------------------------------------


class Names:
    """Replaces `socket.getaddrinfo`: resolves these names and numeric addresses, and no other names."""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self.addresses = addresses
        self.looked_up: list[str] = []
        self._read = socket.getaddrinfo

    def __call__(self, host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        self.looked_up.append(host)
        known = self.addresses.get(host.lower().removesuffix("."), [host])
        return [entry for address in known for entry in self._numeric(address, port)]

    def _numeric(self, address: str, port: int) -> list[tuple[object, ...]]:
        return list(self._read(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))


class HangingNames(Names):
    """As `Names`, but a lookup of `hangs.example` returns only once `freed` is set."""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        super().__init__(addresses)
        self.freed = threading.Event()

    def __call__(self, host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host == "hangs.example":
            self.freed.wait(STOP_SECONDS)
        return super().__call__(host, port)
