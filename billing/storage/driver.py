"""psycopg2 connections as we use them: settings, hosts, several statements in a message, and errors translated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, cast

import sqlalchemy
from psycopg2 import Error, InterfaceError, OperationalError, ProgrammingError, extensions
from sqlalchemy import Engine, event, exc, make_url
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from billing.errors import DatabaseUnavailable
from billing.storage.watchdog import Watchdog, WatchedSocket

T = TypeVar("T")

# Either kind of timeout alone hangs in a real partition: see docs/decisions.md.
CONNECT_ARGS = {
    "connect_timeout": 3,
    "tcp_user_timeout": 5000,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
APPLICATION_NAME = "billing"
OPTIONS = " ".join(
    f"-c {setting}"
    for setting in (
        "timezone=UTC",
        "statement_timeout=5000",
        "lock_timeout=2000",
        "idle_in_transaction_session_timeout=10000",
    )
)

# The SQLSTATE of a write to a primary that has become a replica.
READ_ONLY = "25006"


class StorageError(Exception):
    """PostgreSQL refused a statement of ours."""


def connect_args(url: str, watchdog: Watchdog | None = None, **more: Any) -> dict[str, Any]:
    """The arguments to connect with: the URL's, and ours, which win except over its `application_name`.

    With a watchdog they also make psycopg2 use our connections and cursors, which it watches.
    """
    given: dict[str, Any]
    _, given = PGDialect_psycopg2().create_connect_args(make_url(url))  # type: ignore[no-untyped-call]
    # Of a setting given twice PostgreSQL takes the last: ours.
    options = f"{given.get('options', '')} {OPTIONS}".strip()
    ours = CONNECT_ARGS | {"options": options} | more
    if watchdog is not None:
        ours |= {"connection_factory": partial(Connection, watch=watchdog.watch), "cursor_factory": Cursor}
    return {"application_name": APPLICATION_NAME} | given | ours


class Connection(extensions.connection):
    """Callers send BEGIN themselves, together with other statements: psycopg2's own BEGIN costs a round trip."""

    def __init__(self, dsn: str, watch: Callable[[int], WatchedSocket], **options: Any) -> None:
        super().__init__(dsn, **options)
        self.autocommit = True
        self.deferred: list[bytes] = []
        self.deadline = watch(self.fileno())

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open; a failed one is, until it is rolled back."""
        return bool(self.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE)

    def defer(self, query: str, vars: Any) -> None:
        """Keep a statement whose result nobody needs: it is sent with the next one, or with COMMIT."""
        if not self.is_in_transaction:
            raise ProgrammingError("Only a transaction has an end with which it would go.")
        with self.cursor() as cursor:
            self.deferred.append(cursor.mogrify(query, vars))

    def commit(self) -> None:
        try:
            self._end("COMMIT")
        except Error:
            # A deferred write may have failed. SQLAlchemy already takes the transaction for ended.
            if not self.closed:
                self.rollback()
            raise

    def rollback(self) -> None:
        self.deferred.clear()
        self._end("ROLLBACK")

    def _end(self, how: str) -> None:
        if self.is_in_transaction:
            with self.cursor() as cursor:
                cursor.execute(how)

    def close(self) -> None:
        self.deadline.close()
        super().close()


class Cursor(extensions.cursor):
    """Sends the deferred statements ahead of its own, in the same message."""

    connection: Connection

    def execute(self, query: Any, vars: Any = None) -> None:  # psycopg2's name for it
        if not self.connection.deferred:
            with self.connection.deadline:
                super().execute(query, vars)
            return
        statements = [*self.connection.deferred, self.mogrify(query, vars)]
        self.connection.deferred.clear()
        with self.connection.deadline:
            super().execute(b"; ".join(statements))


def driver_of(connection: sqlalchemy.Connection) -> Connection:
    """Our connection under one of SQLAlchemy's."""
    return cast("Connection", connection.connection.driver_connection)


# Errors --------------------------------------------------------------------------------------------


@contextmanager
def translated_errors() -> Iterator[None]:
    """Translate what SQLAlchemy raises in the block to storage's exceptions."""
    try:
        yield
    except exc.TimeoutError as error:  # Of the pool.
        raise DatabaseUnavailable from error
    except exc.DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseUnavailable from error
        raise translate(error.orig) from error


def translate(error: BaseException | None) -> DatabaseUnavailable | StorageError:
    """Translate an error of psycopg2's to storage's."""
    if isinstance(error, OperationalError | InterfaceError) or getattr(error, "pgcode", None) == READ_ONLY:
        return DatabaseUnavailable()
    return StorageError(type(error).__name__)


# One of several hosts ------------------------------------------------------------------------------


def dial_each_host(engine: Engine) -> None:
    """Make the engine connect to the first of its hosts that accepts."""

    @event.listens_for(engine, "do_connect")
    def _dial(dialect: Any, _record: object, arguments: Any, options: Any) -> Any:
        return first_host(options, lambda host: dialect.connect(*arguments, **host))


def first_host(options: Mapping[str, Any], dial: Callable[[dict[str, Any]], T]) -> T:
    """Return what `dial` returns for the first host that accepts; raises the last one's `OperationalError`.

    libpq would skip a host that refuses or does not answer in time; but where one accepts the connection and then
    closes it, as a proxy does whose server is gone, it gives up.
    """
    *others, last = each_host(options)
    for host in others:
        with suppress(OperationalError):
            return dial(host)
    return dial(last)


def each_host(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split the options into one set per host; libpq separates hosts, and their ports, by commas.

    With `hostaddr`, a list parallel to the hosts, the options stay whole, and libpq picks the host.
    """
    hosts = str(options.get("host", "")).split(",")
    if len(hosts) == 1 or "hostaddr" in options:
        return [dict(options)]
    ports = str(options.get("port", "," * (len(hosts) - 1))).split(",")
    ports = ports if len(ports) == len(hosts) else ports * len(hosts)
    return [{**options, "host": host, "port": port} for host, port in zip(hosts, ports, strict=True)]
