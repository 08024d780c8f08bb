"""The guard before everything that inspects a request: it reads it whole, or refuses it."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing import errors
from billing.http.headers import Header, Headers, values

MAX_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_SECONDS = 15.0

# Set anew for the buffered body, or meaningless without one.
BODY_HEADERS = frozenset({b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"})
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
TOKEN = rb"[!#$%&'*+.^_`|~\w-]++"
# application/json in UTF-8, in any letter case and with any other parameter (RFC 9110, section 8.3.1); a
# charset in RFC 2231's form is refused. Possessive quantifiers keep the time linear in the header's length.
# (All but the `?`: in Python 3.11.2 a possessive one continues where its group failed.)
JSON_IN_UTF8 = re.compile(
    rb"""
    [ \t]*+ application/json
    (?:
        [ \t]*+ ; [ \t]*+
        (?: charset=(?:utf-8|"utf-8") | (?!charset[=*]) %(token)b=(?:%(token)b|"(?:[^"\\]|\\.)*+") )?
    )*+
    [ \t]*+
    """
    % {b"token": TOKEN},
    re.IGNORECASE | re.VERBOSE,
)


class Intake:
    """Reads requests, within bounds of size and time."""

    def __init__(
        self,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_timeout_seconds: float = BODY_TIMEOUT_SECONDS,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.body_timeout_seconds = body_timeout_seconds

    async def take(self, scope: Scope, receive: Receive) -> bytes | None:
        """Check the request and return its body; None when the client disconnected."""
        check_target(scope)
        if not may_have_body(scope):
            return b""
        self._check_declared_length(scope["headers"])
        body = await self._read(receive)
        if body:
            check_content(scope["headers"], body)
        return body

    def _check_declared_length(self, headers: Headers) -> None:
        for declared in values(headers, b"content-length"):
            # Refused unread; a number this long is not worth parsing.
            if len(declared) > 18 or (declared.isdigit() and int(declared) > self.max_body_bytes):
                raise errors.PayloadTooLarge

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None when the client disconnects; measured while reading, whatever was declared."""
        try:
            async with asyncio.timeout(self.body_timeout_seconds):
                return await self._read_whole(receive)
        except TimeoutError:
            raise errors.RequestTimeout from None

    async def _read_whole(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                raise errors.PayloadTooLarge
            if not message.get("more_body", False):
                return bytes(body)


class Guard:
    """ASGI middleware for `MiddlewarePosition.BEFORE_SWAGGER`, inside the error handlers: it raises errors.

    Unguarded, Connexion answers 500 to a body without Content-Type, to `Application/JSON` in capitals, to
    other charsets and to invalid UTF-8, 400 to a chunked one (spec-first/connexion#2020), and has no limit.
    """

    def __init__(self, app: ASGIApp, *, intake: Intake | None = None) -> None:
        self.app = app
        self.intake = intake or Intake()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._admit(scope, receive, send)
            case "websocket":
                # Closing before accepting makes the server answer 403; no operation uses WebSocket.
                await send({"type": "websocket.close"})
            case _:
                await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self.intake.take(scope, receive)
        if body is None:  # The client disconnected: there is nobody to answer.
            return
        headers = headers_for(scope["headers"], body)
        await self.app({**scope, "headers": headers}, replay(body, receive), send)


def check_target(scope: Scope) -> None:
    """Raise unless the path and the query, decoded, are text that a router and a database can hold."""
    # `*`, or an absolute form (RFC 9112, section 3.2) that the server did not reduce to a path, has no slash.
    path: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
    if not (path.startswith(b"/") and is_text(path)):
        raise errors.NotFound
    # Decoded, it would be a separator (RFC 3986, section 2.2), and get past a proxy that filters by prefixes.
    if b"%2f" in path.lower():
        raise errors.NotFound
    if not is_text(scope["query_string"]):
        fault = errors.Fault("/query", "It must be percent-encoded UTF-8 without NUL.")
        raise errors.InvalidRequest("The query string is not text in UTF-8.", faults=[fault])


def is_text(raw: bytes) -> bool:
    """Whether the percent-encoded bytes decode to UTF-8 without NUL; lone surrogates are no UTF-8."""
    if raw.isascii() and b"%" not in raw and b"\0" not in raw:
        return True
    decoded = unquote_to_bytes(raw)
    try:
        decoded.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in decoded


def may_have_body(scope: Scope) -> bool:
    """Whether there may be a body: HTTP/1.1 announces it, in one of two headers (RFC 9112, section 6.3)."""
    is_announced = any(name in FRAMING for name, _ in scope["headers"])
    return is_announced or scope.get("http_version") not in ("1.1", "1.0")


def check_content(headers: Headers, body: bytes) -> None:
    """Raise unless the body is declared, once, to be plain JSON in UTF-8, and is UTF-8."""
    media_types = values(headers, b"content-type")
    if len(media_types) != 1 or not JSON_IN_UTF8.fullmatch(media_types[0]):
        raise errors.UnsupportedMediaType
    if any(coding.strip().lower() != b"identity" for coding in values(headers, b"content-encoding")):
        raise errors.UnsupportedMediaType
    # The server decodes `chunked`; any coding before that, as in `gzip, chunked`, it leaves in place.
    if any(coding.strip().lower() != b"chunked" for coding in values(headers, b"transfer-encoding")):
        raise errors.UnsupportedMediaType
    try:
        body.decode()
    except UnicodeDecodeError:
        raise errors.MalformedBody from None


def headers_for(headers: Headers, body: bytes) -> list[Header]:
    """The headers, describing the body as it now is; an empty one is no body, whatever was declared."""
    others = [header for header in headers if header[0] not in BODY_HEADERS]
    if not body:
        return others
    length = str(len(body)).encode()
    return [*others, (b"content-type", b"application/json"), (b"content-length", length)]


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body as one message, and after it the server's own messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
