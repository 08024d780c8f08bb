"""Outbound calls: bounded in time and size, however the other side behaves.

A read timeout begins anew with every byte, so a sender who drips holds us for minutes. Here each request has
one deadline over all of it, and a watchdog shuts down the request's own socket. Calls to Stripe are made by a
`Session`, which is here; those to tenants' URLs by a `PostClient`, built of the same parts.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from io import BufferedReader, BytesIO, RawIOBase
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import count
from threading import BoundedSemaphore, Condition, Lock, Thread
from typing import Any, Protocol, TypeVar

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError

from billing.threads import Threads

Address = IPv4Address | IPv6Address
# What getaddrinfo returns: family, kind, protocol, canonical name, and what to give to connect.
Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]

HEAD_BYTES = 64 * 1024
PIECE_BYTES = 16 * 1024
# How many connections to one host a session keeps open.
CONNECTIONS = 64
MIME_TYPE = b"content-type:"

T = TypeVar("T")


class OutboundError(requests.RequestException):
    """The call failed."""

    def __init__(self) -> None:
        # Errors of requests and urllib3 hold the URL in their message, and the request with its headers.
        super().__init__(self.__doc__)


class AddressRefused(OutboundError):
    """The name has an address that may not be called."""


class NameUnknown(OutboundError, requests.ConnectionError):
    """The name has no address, or none was found in time."""


class ConnectFailed(OutboundError, requests.ConnectionError):
    """No address of the name took the connection."""


class TlsFailed(OutboundError, requests.exceptions.SSLError):
    """TLS could not be agreed on, or the certificate is not good for the name."""


class CallTimedOut(OutboundError, requests.Timeout):
    """The call took longer than it may."""


class ConnectionBroken(OutboundError, requests.ConnectionError):
    """The connection ended before the response did, or what came is not HTTP."""


class ResponseTooLarge(OutboundError):
    """The response is longer than it may be."""


class UrlInvalid(OutboundError):
    """The URL is none of http or https, or names no host."""


@dataclass(frozen=True)
class Bounds:
    """The limits of a call.

    Args:
        connect_seconds: for the lookup of the name, and for the connection to each of its addresses.
        total_seconds: for all of a call, from the lookup to the last byte of the body.
        max_bytes: of a body. Its head has 64 KiB more, and the chunked coding as much again as the body.
        cut: whether a longer body is cut there and its rest never read; else it raises `ResponseTooLarge`.
        permitted: whether an address may be called. All that a name resolves to must be, or none is called.
    """

    connect_seconds: float
    total_seconds: float
    max_bytes: int
    cut: bool = False
    permitted: Callable[[Address], bool] | None = None

    def body_of(self, read: Callable[[int], bytes]) -> bytes:
        """The body, read in pieces within `max_bytes`."""
        body = bytearray()
        most = self.max_bytes if self.cut else self.max_bytes + 1
        while piece := read(min(PIECE_BYTES, most - len(body))):
            body += piece
        if len(body) > self.max_bytes:
            raise Stopped(ResponseTooLarge())
        return bytes(body)


class Resolver:
    """Looks names up with a timeout, which getaddrinfo itself does not have.

    A lookup that hangs holds one of `threads` until it ends. When all of them hang, every other name fails to
    resolve: calls that must not affect each other use a resolver each. Make it after a fork.
    """

    def __init__(self, threads: int = 16) -> None:
        self._free = BoundedSemaphore(threads)
        self._threads = Threads("resolver")

    def look_up(self, host: str, port: int, seconds: float) -> Sequence[Found]:
        """All addresses of the host, in the order to try them; raises `NameUnknown`, within the seconds."""
        ends_at = time.monotonic() + seconds
        return found_in(self.ask(host, port, seconds), ends_at - time.monotonic())

    def ask(self, host: str, port: int, seconds: float) -> Future[Sequence[Found]]:
        """Begin a lookup; raises `NameUnknown` if no thread becomes free within the seconds."""
        if not self._free.acquire(timeout=seconds):
            raise NameUnknown
        found: Future[Sequence[Found]] = Future()
        try:
            self._threads.start(partial(self._ask, found, host, port))
        except RuntimeError:
            self._free.release()
            raise NameUnknown from None
        return found

    def _ask(self, found: Future[Sequence[Found]], host: str, port: int) -> Callable[[], None]:
        try:
            announce = partial(found.set_result, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            announce = partial(found.set_exception, error)

        def end() -> None:
            self._free.release()
            announce()

        return end


def found_in(lookup: Future[Sequence[Found]], seconds: float) -> Sequence[Found]:
    """What a lookup finds; raises `NameUnknown`, within the seconds."""
    try:
        return lookup.result(seconds)
    except (OSError, UnicodeError):  # A TimeoutError is an OSError.
        raise NameUnknown from None


class Names(Protocol):
    """What a call resolves names with."""

    def look_up(self, host: str, port: int, seconds: float) -> Sequence[Found]:
        """As `Resolver`'s."""


class Session(requests.Session):
    """A session for any number of threads: each call keeps within its bounds or raises an `OutboundError`.

    It follows no redirect, keeps no cookie, decodes no body, and takes nothing from the environment. The body
    has been read when a call returns. A call's `timeout`, `stream`, `proxies` and `allow_redirects` are
    ignored. Make it after a fork.

    Args:
        bounds: what each call may take.
        resolver: what looks names up; the session's own by default.
    """

    def __init__(self, bounds: Bounds, *, resolver: Resolver | None = None) -> None:
        super().__init__()
        self._bounds = bounds
        self._resolver = resolver or Resolver()
        self.trust_env = False
        self.max_redirects = 0
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self.headers = CaseInsensitiveDict({"Accept-Encoding": "identity"})
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: requests would read all of a redirect's body before it checks how many it may follow."""

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """The response with its body read; raises an `OutboundError`."""
        with watched(Call(self._bounds, self._resolver)) as call:
            outcome = self._outcome(call, request, kwargs)
        # Raised here, it has no `__context__`, which could have the URL in it.
        if isinstance(outcome, OutboundError):
            raise outcome
        return outcome

    def _outcome(
        self, call: Call, request: requests.PreparedRequest, kwargs: dict[str, Any]
    ) -> requests.Response | OutboundError:
        error: OutboundError
        try:
            response = self._exchange(request, kwargs)
        except Stopped as stopped:
            error = stopped.error
        except requests.exceptions.SSLError:
            error = TlsFailed()
        except (requests.Timeout, ReadTimeoutError):
            error = CallTimedOut()
        except (requests.ConnectionError, HTTPError):
            error = ConnectionBroken()
        else:
            return call.judged(response)
        return call.judged(error)

    def _exchange(self, request: requests.PreparedRequest, kwargs: dict[str, Any]) -> requests.Response:
        # This timeout, which is for each read and write, ends what the watchdog may have missed.
        timeout = self._bounds.total_seconds
        own = {"stream": True, "timeout": timeout, "proxies": {}, "allow_redirects": False}
        response = super().send(request, **{**kwargs, **own})
        with response:
            body = self._bounds.body_of(partial(response.raw.read, decode_content=False))
        response.raw = BytesIO(body)
        return response


def tls_context() -> ssl.SSLContext:
    """A context that trusts what requests trusts (certifi), for many connections: it takes 27 ms to make."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    context.hostname_checks_common_name = False
    context.set_alpn_protocols(["http/1.1"])
    return context


# One request's deadline --------------------------------------------------------------------------


class Stopped(Exception):
    """Carries an error through urllib3 and http.client: to the former every OSError is a broken connection."""

    def __init__(self, error: OutboundError) -> None:
        self.error = error


class Call:
    """One request: its bounds, its deadline, and its socket."""

    def __init__(self, bounds: Bounds, names: Names) -> None:
        self.bounds = bounds
        self.ends_at = time.monotonic() + bounds.total_seconds
        self.is_cut = False
        self.is_answered = False
        self.has_ended = False
        self._names = names
        self._lock = Lock()
        self._socket: socket.socket | None = None

    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    def judged(self, outcome: T | OutboundError) -> T | OutboundError:
        """The outcome, or `CallTimedOut` where the deadline caused it."""
        # A body that ends with the connection looks whole when the watchdog cuts it.
        is_late = self.is_over() if isinstance(outcome, OutboundError) else self.is_cut
        return CallTimedOut() if is_late else outcome

    def seconds(self) -> float:
        """What is left for the next step of connecting; raises `CallTimedOut`."""
        if (left := self.ends_at - time.monotonic()) <= 0:
            raise CallTimedOut
        return min(left, self.bounds.connect_seconds)

    def dial(self, host: str, port: int, options: Any) -> socket.socket:
        """Connect to the first address that accepts, of those looked up once and all permitted."""
        found = self._names.look_up(host, port, self.seconds())
        permitted = self.bounds.permitted
        if permitted and not all(permitted(ip_address(entry[4][0])) for entry in found):
            raise AddressRefused
        for entry in found:
            with suppress(OSError):
                return self._connect(entry, options)
        raise ConnectFailed

    def _connect(self, entry: Found, options: Any) -> socket.socket:
        family, kind, protocol, _, address = entry
        connection = socket.socket(family, kind, protocol)
        try:
            for option in options or ():
                connection.setsockopt(*option)
            connection.settimeout(self.seconds())
            connection.connect(address)
            connection.settimeout(self.bounds.total_seconds)
            self.watch(connection)
        except OSError:
            connection.close()
            raise
        return connection

    def watch(self, connection: socket.socket) -> None:
        """Have the watchdog cut this socket at the deadline; raises `CallTimedOut` when that has passed."""
        self.release()
        # A descriptor of our own for the same socket: TLS takes the other from its object, and once closed
        # its number may be reused for another file.
        own = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            self._socket = own
            # The watchdog cuts once, and may have done so before the socket was set.
            if self.is_over():
                raise CallTimedOut

    def release(self) -> None:
        """Stop watching the socket: from here on it may be another request's."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None

    def cut(self) -> None:
        """Shut the connection down under its reader or writer, if the request still has one."""
        with self._lock:
            if self._socket is not None:
                self.is_cut = True
                with suppress(OSError):  # The other side may have closed it.
                    self._socket.shutdown(socket.SHUT_RDWR)


class _Watchdog:
    """Cuts every call off at its deadline: one thread for all, started with the first."""

    def __init__(self) -> None:
        self._forget()
        # A forked child has none of its parent's threads, and may inherit its locks as held.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._changed = Condition()
        self._calls: list[tuple[float, int, Call]] = []
        self._numbers = count()
        self._thread: Thread | None = None

    def watch(self, call: Call) -> None:
        entry = (call.ends_at, next(self._numbers), call)
        with self._changed:
            self._start()
            heappush(self._calls, entry)
            if self._calls[0] is entry:
                self._changed.notify()

    def _start(self) -> None:
        if self._thread is None:
            thread = Thread(target=self._run, name="watchdog", daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            self._next().cut()

    def _next(self) -> Call:
        with self._changed:
            while (seconds := self._seconds()) is None or seconds > 0:
                self._changed.wait(seconds)
            return heappop(self._calls)[2]

    def _seconds(self) -> float | None:
        # Ended calls are dropped here, or each would wake us at its deadline.
        while self._calls and self._calls[0][2].has_ended:
            heappop(self._calls)
        return self._calls[0][0] - time.monotonic() if self._calls else None


_WATCHDOG = _Watchdog()
# urllib3 passes no argument of a request on to its connection.
_CALL: ContextVar[Call] = ContextVar("call")


@contextmanager
def watched(call: Call) -> Iterator[Call]:
    _WATCHDOG.watch(call)
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)
        call.release()
        call.has_ended = True


# Responses ----------------------------------------------------------------------------------------


class _Metered(RawIOBase):
    """Reads from a call's socket, up to a limit.

    http.client reads a chunk of size -1 to its end, and any number of trailers.
    """

    def __init__(self, raw: RawIOBase, call: Call) -> None:
        self._raw = raw
        self._call = call
        self._left = HEAD_BYTES + 2 * call.bounds.max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        size: int | None = self._raw.readinto(buffer)
        if size:
            self._call.is_answered = True
            self._left -= size
        if self._left < 0:
            raise Stopped(ResponseTooLarge())
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _HeaderLines(BufferedReader):
    """What http.client reads a head from, before it has it parsed as a whole MIME message.

    So a head could be a tree of parts hundreds deep, which takes seconds, or have a boundary that is not
    text, which raises arbitrary errors. With `Content-Type` renamed, and without a bare CR, which ends a line
    for MIME alone, it is parsed as plain text.
    """

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if line[: len(MIME_TYPE)].lower() == MIME_TYPE:
            # Not left out: its continuation lines would then continue the header before it.
            line = b"X-" + line
        if b"\r" in line.removesuffix(b"\r\n"):
            raise http.client.HTTPException("a bare CR")
        return line


class Response(http.client.HTTPResponse):
    """A response of limited size, without `Content-Type`, which nothing here reads."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = _HeaderLines(_Metered(self.fp.detach(), _CALL.get()))

    def begin(self) -> None:
        """Read the head of the response, past those of interim ones (1xx; RFC 9110, section 15.2)."""
        super().begin()
        while (
            HTTPStatus.CONTINUE <= self.status < HTTPStatus.OK
            and self.status != HTTPStatus.SWITCHING_PROTOCOLS
        ):
            self.headers = None  # type: ignore[assignment]  # Else http.client takes it to have begun.
            super().begin()


# Subclasses of urllib3's parts -------------------------------------------------------------------


class _Connection(HTTPConnection):
    response_class = Response

    def _new_conn(self) -> socket.socket:
        # Safe from DNS rebinding: the addresses checked here are those dialled here.
        try:
            return _CALL.get().dial(self._dns_host, self.port, self.socket_options)
        except OutboundError as error:
            raise Stopped(error) from None

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            _CALL.get().watch(self.sock)
        super().request(*args, **kwargs)


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    def _put_conn(self, conn: Any) -> None:
        # Before the next request can have it.
        _CALL.get().release()
        super()._put_conn(conn)


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    def __init__(self) -> None:
        super().__init__(pool_maxsize=CONNECTIONS)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
