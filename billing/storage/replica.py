"""A read replica: used if it has all that the primary had when the request came, and skipped while it fails.

The position of the primary's log comes with the look-up of the caller, which always queries the primary. A replica
that has replayed the log up to it has every write acknowledged by then, through whichever process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection, create_engine, exc

from billing.storage import schema
from billing.storage.driver import connect_args
from billing.storage.shelf import SET_TENANT
from billing.storage.watchdog import Watchdog

T = TypeVar("T")

# Short, so that the request has time left to query the primary instead.
CONNECTING_SECONDS = 2
STATEMENT_SECONDS = 2.0
REST_SECONDS = 5.0

# NULL, and so false, on a server that replays nothing.
OPEN = f"BEGIN; {SET_TENANT}, pg_last_wal_replay_lsn() >= %s::pg_lsn"
IDENTITY = "SELECT system_identifier FROM pg_control_system()"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.storage")


class NotOnReplica(Exception):
    """The replica cannot answer this: it lags, or it fails, or it is skipped for a while."""


class Replica:
    """Reads of one tenant at a time."""

    def __init__(self, url: str, *, connections: int, primary: Callable[[], int]) -> None:
        self._primary = primary
        self._breaker = _CircuitBreaker()
        self._is_known = False
        self._watchdog = Watchdog(STATEMENT_SECONDS)
        self._engine = create_engine(
            url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=STATEMENT_SECONDS,
            hide_parameters=True,
            connect_args=connect_args(url, self._watchdog, connect_timeout=CONNECTING_SECONDS),
        )

    def require_usable(self) -> None:
        """Raise `schema.SchemaError` unless it replays our primary, and row security binds our role.

        One that does not answer may come back: it is checked then, before anything is read from it.
        """
        try:
            with self._engine.connect() as connection:
                self._examine(connection)
        except exc.DBAPIError as error:
            self._breaker.open_for_a_while(error)

    def read(self, tenant_id: UUID, since: str, query: Callable[[Connection], T]) -> T:
        """Run `query` with everything written up to the position `since` visible; raises `NotOnReplica`."""
        if self._breaker.is_open():
            raise NotOnReplica
        try:
            answer = self._ask(tenant_id, since, query)
        except (exc.DBAPIError, exc.TimeoutError, schema.SchemaError) as error:
            self._is_known = False
            self._breaker.open_for_a_while(error)
            raise NotOnReplica from error
        self._breaker.close_again()
        return answer

    def _ask(self, tenant_id: UUID, since: str, query: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            if not self._is_known:
                self._examine(connection)
            _, has_it_all = connection.exec_driver_sql(OPEN, (str(tenant_id), since)).one()
            if not has_it_all:
                self._breaker.close_again()
                raise NotOnReplica
            return query(connection)

    def _examine(self, connection: Connection) -> None:
        if not connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
            raise schema.SchemaError("DATABASE_REPLICA_URL is no replica: it replays nothing.")
        if connection.exec_driver_sql(IDENTITY).scalar_one() != self._primary():
            raise schema.SchemaError("DATABASE_REPLICA_URL is no replica of DATABASE_URL.")
        schema.require_safe(connection)
        self._is_known = True

    def close(self) -> None:
        self._engine.dispose()
        self._watchdog.close()


class _CircuitBreaker:
    """Skips the replica for some seconds after a failure, and then for all readers but one, which tries it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open_until: float | None = None

    def is_open(self) -> bool:
        return self._open_until is not None and not self._may_try()

    def _may_try(self) -> bool:
        """Whether the rest is over, or the breaker was closed meanwhile; the first to ask begins a new rest."""
        with self._lock:
            if self._open_until is None:
                return True
            now = time.monotonic()
            has_rested = now >= self._open_until
            if has_rested:
                self._open_until = now + REST_SECONDS
            return has_rested

    def open_for_a_while(self, cause: Exception) -> None:
        with self._lock:
            if self._open_until is None:
                log.warning("the replica fails, and is left out", cause=_why(cause))
            self._open_until = time.monotonic() + REST_SECONDS

    def close_again(self) -> None:
        if self._open_until is None:
            return
        with self._lock:
            self._open_until = None
        log.info("the replica answers again")


def _why(cause: Exception) -> str:
    # A driver's message may contain values; ours are written for the operator.
    return str(cause) if isinstance(cause, schema.SchemaError) else type(cause).__name__
