"""uvicorn's httptools protocol, hardened: `uvicorn --http billing.http.protocol:Protocol`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from billing import errors, metrics
from billing.errors import BillingError
from billing.http import problems
from billing.http.edge import OUTSIDE, SECURITY_HEADERS
from billing.ids import new_name

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# Requests kept while earlier ones are answered. A client may repeat one left unanswered (RFC 9112, 9.3.2).
MAX_PIPELINED = 32
PATIENCE_SECONDS = 15.0
CHECKED_EVERY_SECONDS = 5.0

UPGRADING = frozenset({b"upgrade", b"http2-settings"})
VERSIONS = frozenset({"1.0", "1.1"})

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


class Protocol(HttpToolsProtocol):
    """Closes gaps that uvicorn leaves in the connection, which no middleware sees.

    - `Upgrade: h2c`, as Java's HttpClient sends it, makes uvicorn drop the body (Kludex/uvicorn#2722). We
      support no upgrade, and a server may ignore the header (RFC 9110, section 7.8).
    - Its own refusals are text/plain; here every error is a problem.
    - It does not limit a head's size, number of headers or time, and merges trailers into the headers.
    - Nor does it limit pipelined requests: it resumes reading after each answer.
    """

    in_head = True
    pending_bytes = 0  # Fed since the parser last finished a head or emitted a part of a body.
    waiting_since = 0.0  # On the loop's clock.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CoalescingTransport(transport, self.loop))  # type: ignore[arg-type]
        self._await_head()
        self.watch = self.loop.call_later(CHECKED_EVERY_SECONDS, self._check_patience)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        unparsed: bytes | None = data
        while unparsed is not None:
            unparsed = self._feed(unparsed)

    def _feed(self, data: bytes) -> bytes | None:
        """Feed the parser; returns the data to parse next, None when there is no more."""
        self.pending_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._head_without_upgrade() + data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._refuse(reason_of(error))
        else:
            # An endless header or trailer is buffered and reaches no callback: only the bytes fed reveal it.
            if self.pending_bytes > MAX_HEAD_BYTES:
                self._refuse(errors.RequestHeadersTooLarge())
        return None

    # The parser's callbacks, in their order --------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waiting_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        # RFC 9110, section 6.5.1: a trailer is not to be merged into the headers; the guard has seen those.
        if self.in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head()
        if self.parser.should_upgrade():
            return  # It is parsed again, without the headers of the upgrade.
        super().on_headers_complete()
        self.in_head = False
        self.pending_bytes = 0

    def on_body(self, body: bytes) -> None:
        self.pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._await_head()
        super().on_message_complete()

    # -----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()
        # Of a body still to come after the answer, as with 413, the rest is read and dropped: most clients
        # read the answer only after sending all. But one that waits for 100 may send its next request
        # instead.
        if self.expect_100_continue and not self.in_head and self.cycle.response_complete:
            self.transport.close()

    def _await_head(self) -> None:
        self.in_head = True
        self.pending_bytes = 0
        self.waiting_since = self.loop.time()

    def _check_head(self) -> None:
        """Raise for what the parser accepts and RFC 9112 (sections 2.3, 3.2) or our limits do not."""
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in VERSIONS or self.parser.get_method() == b"CONNECT":
            raise malformed()
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise malformed()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise errors.RateLimited  # Never sent: the connection closes after the answers before it.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            raise errors.RequestHeadersTooLarge

    def _head_without_upgrade(self) -> bytes:
        """The request's head without the headers of its upgrade, for a fresh parser."""
        version = self.parser.get_http_version().encode()
        request_line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)
        lines = [b"%b: %b" % header for header in without_upgrade(self.headers)]
        self.parser = httptools.HttpRequestParser(self)
        self._await_head()
        return b"\r\n".join([request_line, *lines, b"", b""])

    def _check_patience(self) -> None:
        """Close a connection that keeps us waiting; uvicorn's own timer covers only idle ones."""
        if not self._is_overdue():
            self.watch = self.loop.call_later(CHECKED_EVERY_SECONDS, self._check_patience)
        elif self.in_head and self.pending_bytes:
            self._refuse(errors.RequestTimeout())
        else:
            self.transport.close()

    def _is_overdue(self) -> bool:
        if self._is_busy() or self.timeout_keep_alive_task:
            return False
        return self.loop.time() - self.waiting_since > PATIENCE_SECONDS

    def _is_busy(self) -> bool:
        # None before the first request, whatever uvicorn's annotation says.
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _refuse(self, error: BillingError) -> None:
        """Answer in place of the application, and close."""
        if self._is_busy() and (self.in_head or self.pipeline):
            # Written now, it would be taken for the answer to an earlier request, which may well succeed.
            self.cycle.keep_alive = False
            return
        if not (self._is_busy() and self.cycle.response_started):
            self._answer(error)
        self.transport.close()

    def _answer(self, error: BillingError) -> None:
        request_id = new_name()
        rendered = problems.render(error, request_id=request_id)
        headers = [
            *self.server_state.default_headers,
            *rendered.headers,
            *SECURITY_HEADERS,
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = [b"HTTP/1.1 %d %b" % (rendered.status, HTTPStatus(rendered.status).phrase.encode())]
        lines += [b"%b: %b" % header for header in headers]
        self.transport.write(b"\r\n".join([*lines, b"", rendered.body]))
        log.info("request", request_id=request_id, status=rendered.status, refused=error.code())
        metrics.REQUESTS.count(OUTSIDE, "other", str(rendered.status))
        metrics.PROBLEMS.count(OUTSIDE, error.code())


class CoalescingTransport:
    """A transport that sends together what is written within one iteration of the event loop.

    uvloop sends each write by itself, and uvicorn writes head and body apart: two system calls, two packets.
    The writes of one iteration bypass flow control, but they are few: an answer is one body.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self._send)
        self._written.append(data)

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.write(b"".join(parts))

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        written, self._written = self._written, []
        if written and not self._transport.is_closing():
            self._transport.write(b"".join(written))


def malformed() -> BillingError:
    """The error for the parser's own refusals, whose messages could quote the request."""
    return errors.InvalidRequest("The request is not well-formed HTTP/1.1 (RFC 9112).")


def reason_of(error: httptools.HttpParserError) -> BillingError:
    """The error that one of our callbacks raised, or else that the request is malformed."""
    return error.__context__ if isinstance(error.__context__, BillingError) else malformed()


def without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without those of an upgrade; `close` and `keep-alive` stay."""
    kept = [(name, value) for name, value in headers if name not in UPGRADING]
    return [(name, other_options(value) if name == b"connection" else value) for name, value in kept]


def other_options(connection: bytes) -> bytes:
    """The options of a Connection header without those of an upgrade."""
    options = [option.strip() for option in connection.split(b",")]
    return b", ".join(option for option in options if option.lower() not in UPGRADING)
