"""POSTs to tenants' URLs: each within its bounds, those to one URL over connections kept for a while."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from threading import Lock
from typing import Any, Self

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url, wait_for_read

from billing.outbound import (
    PIECE_BYTES,
    Bounds,
    Call,
    CallTimedOut,
    ConnectionBroken,
    Found,
    NameUnknown,
    OutboundError,
    Resolver,
    Response,
    Stopped,
    TlsFailed,
    UrlInvalid,
    found_in,
    watched,
)

DEFAULT_PORTS = {"http": 80, "https": 443}
NO_DELAY = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
# How the use of a kept connection fails that the receiver has closed.
ENDED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


@dataclass(frozen=True)
class Answer:
    """The response; `body` as it came, or its beginning."""

    status: int
    headers: Message
    body: bytes


class PostClient:
    """POSTs to one URL, from any number of threads; connections kept between them are closed with the block.

    The name is looked up once; the addresses found are checked against `permitted` at each connection.
    Connections that the receiver keeps open are reused. Each call keeps within its bounds or raises an
    `OutboundError`, and none follows a redirect.

    It is built on http.client: a call takes 200 µs of CPU, a new connection included, and with requests 500.
    urllib3 parses the URL, as it does for requests, and tells whether a connection has data to read.
    """

    def __init__(self, url: str, bounds: Bounds, *, resolver: Resolver, tls: ssl.SSLContext) -> None:
        self._to = _Place.of(url)
        self._bounds = bounds
        self._names = _Lookup(resolver)
        self._tls = tls
        self._kept = deque[_Wire]()
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._close_kept()

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The answer, whatever its status; raises an `OutboundError`.

        The body may arrive twice: a receiver may close a kept connection in the moment in which we use it.
        Once any part of an answer came, it is not sent again.
        """
        with watched(Call(self._bounds, self._names)) as call:
            outcome = call.judged(self._outcome(call, body, headers))
        # Raised here, it has no `__context__`, which could have the URL in it.
        if isinstance(outcome, OutboundError):
            raise outcome
        return outcome

    def _outcome(self, call: Call, body: bytes, headers: Mapping[str, str]) -> Answer | OutboundError:
        try:
            return self._exchange(call, body, headers)
        except Stopped as stopped:
            return stopped.error
        except OutboundError as error:
            return error
        except ssl.SSLError:
            return TlsFailed()
        except TimeoutError:
            return CallTimedOut()
        except (OSError, http.client.HTTPException):
            return ConnectionBroken()

    def _exchange(self, call: Call, body: bytes, headers: Mapping[str, str]) -> Answer:
        wire, response = self._answered(call, body, headers)
        with ExitStack() as ends:
            ends.callback(wire.close)
            ends.callback(response.close)
            answer = Answer(response.status, response.headers, self._body_of(response))
            if wire.may_go_on(response):
                ends.pop_all()
                # Before the next call can have it.
                call.release()
                self._keep(wire)
        return answer

    def _answered(
        self, call: Call, body: bytes, headers: Mapping[str, str]
    ) -> tuple[_Wire, http.client.HTTPResponse]:
        if wire := self._quiet():
            try:
                call.watch(wire.sock)
                return wire, wire.posted(self._to.target, body, headers)
            except ENDED:
                # RFC 9110, 9.2.2: a POST may be sent again where its semantics are known to be idempotent. Those of a
                # delivery are, by its `webhook-id`; but a receiver that has begun to answer has it.
                if call.is_answered:
                    raise
        wire = self._new(call)
        return wire, wire.posted(self._to.target, body, headers)

    def _new(self, call: Call) -> _Wire:
        to = self._to
        connected = call.dial(to.host, to.port, NO_DELAY)
        if to.scheme == "https":
            connected = self._tls.wrap_socket(connected, server_hostname=to.name)
        return _Wire(connected, to)

    def _quiet(self) -> _Wire | None:
        """A kept connection with nothing to read: data would be its end, or an answer to no request."""
        with suppress(IndexError):
            while wait_for_read((wire := self._kept.pop()).sock, 0):
                wire.close()
            return wire
        return None

    def _body_of(self, response: http.client.HTTPResponse) -> bytes:
        body = self._bounds.body_of(response.read)
        is_cut = self._bounds.cut and len(body) == self._bounds.max_bytes
        if response.length and not is_cut:
            raise ConnectionBroken
        return body

    def _keep(self, wire: _Wire) -> None:
        self._kept.append(wire)
        if not self._is_open:
            self._close_kept()

    def _close_kept(self) -> None:
        with suppress(IndexError):
            while True:
                self._kept.pop().close()


@dataclass(frozen=True)
class _Place:
    """Where a URL leads."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, url: str) -> Self:
        """Raises `UrlInvalid`."""
        try:
            parts = parse_url(url)
        except LocationParseError:
            raise UrlInvalid from None
        if parts.scheme not in DEFAULT_PORTS or not parts.host:
            raise UrlInvalid
        host, port = parts.host.strip("[]"), parts.port or DEFAULT_PORTS[parts.scheme]
        return cls(parts.scheme, host, port, parts.request_uri)

    @property
    def name(self) -> str:
        """The host as the receiver knows it: a trailing dot is for the resolver alone."""
        return self.host.rstrip(".")


class _Lookup:
    """A name's addresses, looked up once for all calls."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._lock = Lock()
        self._lookup: Future[Sequence[Found]] | None = None

    def look_up(self, host: str, port: int, seconds: float) -> Sequence[Found]:
        """As the resolver's. Calls share one lookup, repeated only if it failed: a name holds one thread."""
        ends_at = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise NameUnknown
        try:
            if self._lookup is None or (self._lookup.done() and self._lookup.exception()):
                self._lookup = self._resolver.ask(host, port, ends_at - time.monotonic())
            lookup = self._lookup
        finally:
            self._lock.release()
        return found_in(lookup, ends_at - time.monotonic())


# One connection ----------------------------------------------------------------------------------


class _Wire(http.client.HTTPConnection):
    """A connection that is made already, and never reconnects."""

    response_class = Response
    auto_open = 0

    def __init__(self, connected: socket.socket, place: _Place) -> None:
        super().__init__(place.name, place.port)
        self.sock = connected
        # The port that `Host` leaves out.
        self.default_port = DEFAULT_PORTS[place.scheme]
        self._body = b""

    def posted(self, target: str, body: bytes, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a POST; returns its response."""
        self._body = body
        try:
            self.request("POST", target, headers={**headers, "Content-Length": str(len(body))})
            response = self.getresponse()
        except BaseException:
            self.close()
            raise
        return response

    def send(self, data: Any) -> None:
        """Send the head, made by http.client, and then the body: in one write if it is small."""
        if len(self._body) <= PIECE_BYTES:
            super().send(data + self._body)
        else:
            super().send(data)
            # A receiver that answers the head (410, 413, 429) may close before the body came. Read its
            # answer.
            with suppress(*ENDED):
                super().send(self._body)

    def may_go_on(self, response: http.client.HTTPResponse) -> bool:
        """Whether another request may follow: all of the answer has been read, and no other belongs to it."""
        return self.sock is not None and response.isclosed() and response.status >= HTTPStatus.OK
