"""The store: transactions of one tenant, and queries across tenants, for logins, the worker and the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection, Engine, create_engine, exc

from billing import metrics, tracing
from billing.actors import SYSTEM, Actor
from billing.clock import Clock
from billing.encryption import Vault
from billing.errors import DatabaseUnavailable
from billing.storage import schema
from billing.storage.api_keys import ApiKeys
from billing.storage.audit import AuditLog
from billing.storage.backlog import read_backlog
from billing.storage.deliveries import Deliveries
from billing.storage.directory import Directory
from billing.storage.driver import connect_args, dial_each_host, driver_of, translated_errors
from billing.storage.events import Events
from billing.storage.idempotency import IdempotencyKeys, forget_answers
from billing.storage.keyring_uses import KeyringUses
from billing.storage.platform import Platform
from billing.storage.pool import Pool
from billing.storage.replica import IDENTITY, NotOnReplica, Replica
from billing.storage.sessions import Sessions
from billing.storage.shelf import SET_TENANT
from billing.storage.stripe_connect import StripeConnect
from billing.storage.tasks import Tasks, take_due
from billing.storage.tenants import Tenants, all_tenants
from billing.storage.users import Users
from billing.storage.watchdog import STATEMENT_SECONDS, Watchdog
from billing.storage.webhooks import Webhooks
from billing.tasks import Backlog, Queue, Task
from billing.tenants import TenantSummary

T = TypeVar("T")

POOL_WAIT_SECONDS = 3

OPEN = f"BEGIN; {SET_TENANT}"
# The tenant's lock: of two transactions that take it, the second waits for the end of the first.
OPEN_LOCKED = f"{OPEN}; SELECT FROM tenants WHERE id = app.current_tenant() FOR NO KEY UPDATE"
# For rows of many tenants: one that is locked elsewhere must not keep the others locked for long. In ms.
OPEN_SHORTLY = "BEGIN; SET LOCAL lock_timeout = 100"
PING = "SELECT"


class TenantTx:
    """One transaction of one tenant, with a shelf for each entity."""

    def __init__(self, connection: Connection, tenant_id: UUID, actor: Actor, vault: Vault) -> None:
        self.tenant_id = tenant_id
        self.tenants = Tenants(connection, tenant_id)
        self.users = Users(connection, tenant_id)
        self.sessions = Sessions(connection, tenant_id)
        self.api_keys = ApiKeys(connection, tenant_id)
        self.stripe = StripeConnect(connection, tenant_id)
        self.webhooks = Webhooks(connection, tenant_id, vault)
        self.events = Events(connection, tenant_id, actor)
        self.deliveries = Deliveries(connection, tenant_id)
        self.tasks = Tasks(connection, tenant_id)
        self.directory = Directory(connection, tenant_id)
        self.idempotency = IdempotencyKeys(connection, tenant_id, vault)
        self.keyring_uses = KeyringUses(connection, tenant_id)
        self.audit = AuditLog(connection, tenant_id, actor)


class Store:
    """Opens transactions on PostgreSQL. Every failure to reach it is `DatabaseUnavailable`."""

    def __init__(
        self,
        vault: Vault,
        *,
        connections: int,
        pool_wait_seconds: float = POOL_WAIT_SECONDS,
        statement_seconds: float = STATEMENT_SECONDS,
    ) -> None:
        self._vault = vault
        self._connections = connections
        self._pool_wait_seconds = pool_wait_seconds
        self._statement_seconds = statement_seconds
        self._watchdog: Watchdog | None = None
        self._opened: Engine | None = None
        self._replica: Replica | None = None

    def open(self, url: str, *, replica_url: str | None = None) -> None:
        """Set the URLs of the database and of its replica; connections are opened on demand."""
        self._watchdog = Watchdog(self._statement_seconds)
        self._opened = create_engine(
            url,
            poolclass=Pool,
            pool_size=self._connections,
            max_overflow=0,
            pool_timeout=self._pool_wait_seconds,
            # The connection used last is taken first: after a failover each new connection may have to wait until a
            # hanging host times out, and replacing every lost connection would cost that wait again.
            pool_use_lifo=True,
            hide_parameters=True,
            connect_args=connect_args(url, self._watchdog),
        )
        dial_each_host(self._opened)
        if replica_url is not None:
            self._replica = Replica(replica_url, connections=self._connections, primary=self._identity)

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise DatabaseUnavailable
        return self._opened

    @contextmanager
    def tenant(
        self, tenant_id: UUID, actor: Actor = SYSTEM, *, exclusive: bool = False
    ) -> Iterator[TenantTx]:
        """A transaction that reaches this tenant's rows alone. Leaving the block commits, raising rolls back.

        An exclusive one holds the tenant's lock from its beginning.
        """
        opening = OPEN_LOCKED if exclusive else OPEN
        opened = self._connect(opening, (str(tenant_id),))
        with translated_errors(), _span("transaction"), opened as connection:
            yield TenantTx(connection, tenant_id, actor, self._vault)
            connection.commit()

    @contextmanager
    def _connect(
        self, opening: str = PING, parameters: tuple[str, ...] | None = None
    ) -> Iterator[Connection]:
        """A connection that has run its opening statement, which also detects one lost since it was last used."""
        with ExitStack() as stack:
            connection = stack.enter_context(self._engine.connect())
            try:
                connection.exec_driver_sql(opening, parameters)
            except exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                # The pool has invalidated all its other connections too: this one is new.
                connection = stack.enter_context(self._engine.connect())
                connection.exec_driver_sql(opening, parameters)
            yield connection

    def read(self, tenant_id: UUID, query: Callable[[TenantTx], T], *, since: str | None) -> T:
        """Run `query`, which changes nothing: on the replica, if there is one that has replayed the log up to `since`.

        `since` is a caller's `position`. If the replica cannot answer, `query` runs again on the primary.
        """
        if self._replica is not None and since is not None:
            # Lag does not fail this span: that of the primary's transaction follows beside it.
            with _span("read"), suppress(NotOnReplica):
                return self._replica.read(
                    tenant_id, since, lambda c: query(TenantTx(c, tenant_id, SYSTEM, self._vault))
                )
        with self.tenant(tenant_id) as tx:
            return query(tx)

    @contextmanager
    def platform(self) -> Iterator[Platform]:
        """The queries made before the tenant is known, each one message to the database."""
        with translated_errors(), _span("question"), self._connect() as connection:
            yield Platform(connection)

    def take_due(self, queue: Queue, now: datetime, *, most: int) -> list[Task]:
        """Lease due tasks of any tenant, those that have been due longest first."""
        with translated_errors(), self._connect() as connection:
            return take_due(connection, queue, now, most=most)

    def forget_answers(self, now: datetime) -> None:
        """Delete the expired idempotency keys, of tenants and of unauthenticated callers."""
        is_more = True
        while is_more:
            with translated_errors(), self._connect() as connection:
                is_more = forget_answers(connection, now)

    def note_uses(self, uses: Mapping[UUID, tuple[UUID, datetime]]) -> None:
        """Store when a key of each of these tenants was last used, all in one message.

        Only one key per tenant: a revocation locks several in an order of its own, and the two could deadlock.
        """
        with translated_errors(), _span("transaction"), self._connect(OPEN_SHORTLY) as connection:
            for tenant_id, (key_id, at) in sorted(uses.items()):
                driver_of(connection).defer(SET_TENANT, (str(tenant_id),))
                ApiKeys(connection, tenant_id).note_use(key_id, at)
            connection.commit()

    def backlog(self, now: datetime) -> Backlog:
        """The backlog of all tenants together, for monitoring."""
        with translated_errors(), self._connect() as connection:
            return read_backlog(connection, now)

    def clock_offset(self, clock: Clock) -> timedelta:
        """How far `clock` is ahead of the database's; exact to half of a round trip."""
        with translated_errors(), self._connect() as connection:
            sent = clock()
            database: datetime = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
            return sent + (clock() - sent) / 2 - database

    def all_tenants(self) -> list[TenantSummary]:
        """Every tenant, the oldest first, for the operator; needs a store opened with the owner's URL."""
        with translated_errors(), self._connect() as connection:
            return all_tenants(connection)

    def sample(self, component: str) -> None:
        """Set the gauges of the pool's size and of the connections in use."""
        pool = self._opened.pool if self._opened is not None else None
        metrics.POOL_SIZE.set(self._connections, component)
        metrics.POOL_IN_USE.set(pool.checkedout() if isinstance(pool, Pool) else 0, component)

    def require_ready(self) -> None:
        """Raises `DatabaseUnavailable`, or `schema.SchemaError` when the tables are not this version's."""
        with translated_errors(), self._connect() as connection:
            schema.require_current(connection)

    def require_safe(self) -> None:
        """Raises `schema.SchemaError` unless row security binds the role that we are, on the replica too."""
        with translated_errors(), self._connect() as connection:
            schema.require_safe(connection)
        if self._replica is not None:
            self._replica.require_usable()

    def _identity(self) -> int:
        """The system identifier of the PostgreSQL cluster: a replica has the same."""
        with self._connect() as connection:
            return int(connection.exec_driver_sql(IDENTITY).scalar_one())

    def close(self) -> None:
        if self._replica is not None:
            self._replica.close()
            self._replica = None
        if self._opened is not None:
            self._opened.dispose()
            self._opened = None
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None


def _span(name: str) -> AbstractContextManager[object]:
    return tracing.span(f"database {name}", "client", {"db.system.name": "postgresql"})
