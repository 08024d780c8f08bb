"""`/metrics` for Prometheus: the metrics of all processes, and the backlog in the database."""

from __future__ import annotations

import hmac
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6, SHUT_RDWR
from typing import Any, Self

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from billing import metrics
from billing.clock import Clock
from billing.errors import CredentialsMissing, DatabaseUnavailable, TokenInvalid
from billing.http.lanes import BoundedThreads
from billing.storage.driver import StorageError
from billing.storage.store import Store
from billing.tasks import Backlog

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.metrics")

PATH = "/metrics"
# A client slower than this is not Prometheus.
PATIENCE_SECONDS = 10
# Open at once on the page's own port. A Prometheus needs one.
MOST_CONNECTIONS = 32

Read = Callable[[str], tuple[bytes, str]]


def reader(directory: Path, store: Store, clock: Clock, *, is_embedded: bool) -> Read:
    """Make the function that renders the page in the format of an `Accept`; one page at a time for all."""
    lock = threading.Lock()
    kind = "embedded" if is_embedded else "external"

    def read(accept: str) -> tuple[bytes, str]:
        with lock:
            answers = {**metrics.build(), **database_gauges(store, clock, kind)}
            return metrics.page(directory, answers, accept)

    return read


def database_gauges(store: Store, clock: Clock, kind: str) -> metrics.Answers:
    """Whether the database answers, and only then the backlog: zeros would pass for good news."""
    try:
        backlog, offset = store.backlog(clock()), store.clock_offset(clock)
    except (DatabaseUnavailable, StorageError):
        return {metrics.DATABASE_UP: {(kind,): 0}}
    return {
        metrics.DATABASE_UP: {(kind,): 1},
        metrics.CLOCK_OFFSET: {(): offset.total_seconds()},
        **depths(backlog),
    }


def depths(backlog: Backlog) -> metrics.Answers:
    """The backlog as gauges: how much waits, and for how long."""
    return {
        metrics.DUE: {(name,): depth.number for name, depth in backlog.queues.items()},
        metrics.DUE_AGE: {(name,): depth.oldest_seconds for name, depth in backlog.queues.items()},
        metrics.OUTBOX: {(name,): depth.number for name, depth in backlog.outbox.items()},
        metrics.OUTBOX_AGE: {(name,): depth.oldest_seconds for name, depth in backlog.outbox.items()},
    }


# On the API's port ---------------------------------------------------------------------------------


def route(read: Read, token: str) -> Route:
    """The page for clients that send the token."""
    thread = BoundedThreads("metrics", 1)

    async def endpoint(request: Request) -> Response:
        given = request.headers.get("authorization")
        if given is None:
            raise CredentialsMissing
        if not is_good(given, token):
            raise TokenInvalid
        body, media_type = await thread.run(lambda: read(request.headers.get("accept", "")))
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})

    return Route(PATH, endpoint)


def is_good(authorization: str, token: str) -> bool:
    """Whether the header has the token, compared in constant time."""
    scheme, _, given = authorization.partition(" ")
    return hmac.compare_digest(given.strip().encode(), token.encode()) and scheme.lower() == "bearer"


# On a port of its own ------------------------------------------------------------------------------


class Exporter(ThreadingHTTPServer):
    """The page on a port of its own: it listens once made (`OSError`), and answers within the `with` block.

    Each connection has a thread. Beyond `MOST_CONNECTIONS` the oldest whose request has not come is closed,
    and if there is none, the new one.
    """

    daemon_threads = True
    # Beyond the library's backlog of five a client's TCP retries after a second, and then two.
    request_queue_size = 128

    def __init__(self, read: Read, host: str, port: int, token: str | None) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.read = read
        self.token = token
        self._lock = threading.Lock()
        # The open connections, the oldest first, and whether their request has come.
        self._open: dict[Any, bool] = {}
        super().__init__((host, port), MetricsHandler)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._has_room_for(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Log what a connection's thread raised, unless its client has gone; the library would print a traceback."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            log.error("metrics cannot be shown", exc_info=error)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def mark_received(self, request: Any) -> None:
        """Note that the request has come: its connection is no longer closed for another."""
        with self._lock:
            if request in self._open:
                self._open[request] = True

    def _has_room_for(self, request: Any) -> bool:
        with self._lock:
            if len(self._open) >= MOST_CONNECTIONS:
                silent = next((other for other, is_received in self._open.items() if not is_received), None)
                if silent is None:
                    return False
                del self._open[silent]
                with suppress(OSError):  # The client may have closed it.
                    silent.shutdown(SHUT_RDWR)  # Its thread reads end of file, and closes it.
            self._open[request] = False
            return True


class MetricsHandler(BaseHTTPRequestHandler):
    """Answers GET /metrics, and nothing else."""

    server: Exporter
    timeout = PATIENCE_SECONDS
    server_version, sys_version = "billing", ""

    def do_GET(self) -> None:
        self.server.mark_received(self.connection)
        token = self.server.token
        if self.path.partition("?")[0] != PATH:
            self._answer(HTTPStatus.NOT_FOUND, f"The metrics are at {PATH}.\n".encode())
        elif token is not None and not is_good(self.headers.get("authorization", ""), token):
            self._answer(HTTPStatus.UNAUTHORIZED, b"It takes the token of METRICS_TOKEN.\n")
        else:
            self._answer(HTTPStatus.OK, *self.server.read(self.headers.get("accept", "")))

    def _answer(self, status: HTTPStatus, body: bytes, media_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Bearer realm="billing"')
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: Prometheus comes every few seconds."""
