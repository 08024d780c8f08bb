"""Tenants with endpoints, workers in processes of their own, and checks that reveal any lost event."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Engine, Row, Table, create_engine, func, select, text, update
from standardwebhooks.webhooks import Webhook

from billing import tenants
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import deliveries, tasks, webhook_endpoints
from billing.webhooks import endpoints
from tests.receivers import Received, Receiver

# A busy machine must not fail a test.
PATIENCE_SECONDS = 40
END_SECONDS = 20
TYPE = "webhook.test"
NUMBERS = count()
IS_PENDING = deliveries.c.status == "pending"
# Receivers are on loopback, and speak http.
LOOPBACK = {"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128", "WEBHOOK_ALLOW_HTTP": "on"}
CUT = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND usename = 'billing_app'"
)
IS_WAITING = (
    "FROM pg_stat_activity WHERE datname = current_database() "
    "AND usename = 'billing_app' AND wait_event_type = 'Lock'"
)
WAITING = text(f"SELECT pid {IS_WAITING}")
CUT_WAITING = text(f"SELECT pg_terminate_backend(pid) {IS_WAITING}")
PRODUCTION = {"WEBHOOK_ALLOW_CIDRS": "", "WEBHOOK_ALLOW_HTTP": ""}


@dataclass(frozen=True)
class Tenant:
    """A tenant, and the secret that signs its deliveries."""

    id: UUID
    secret: str = field(repr=False)


class Worker:
    """A `billing worker` process, and its log."""

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "billing.cli", "worker"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environ}, stderr=output, stdin=subprocess.DEVNULL
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def await_running(self) -> None:
        eventually(lambda: "is running" in self.output or self.process.poll() is not None)
        assert self.process.poll() is None, self.output

    def kill(self) -> None:
        """kill -9: on return the process and its sockets are gone."""
        self.process.kill()
        self.process.wait(END_SECONDS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP for the block, as if it were started after it."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM; it must finish what is in flight, and have logged no error."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(END_SECONDS) == 0, self.output
        assert "Traceback" not in self.output and '"level":"error"' not in self.output, self.output

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024


class Place:
    """A database, and a directory for its workers' logs."""

    def __init__(self, settings: Settings, app_url: str, superuser_url: str, directory: Path) -> None:
        self.settings = settings
        self.environ = {"DATABASE_URL": app_url, "BILLING_STATE_DIR": str(settings.state_dir)}
        self._directory = directory
        self.store = Store(Vault(settings.encryption_keys), connections=8)
        self.store.open(app_url)
        self.superuser: Engine = create_engine(superuser_url, pool_pre_ping=True)

    def close(self) -> None:
        self.store.close()
        self.superuser.dispose()

    @contextmanager
    def working(self, environ: Mapping[str, str] = LOOPBACK) -> Iterator[Worker]:
        """A worker that is running; it is killed at the end, if it has not ended."""
        with self.starting(environ) as worker:
            worker.await_running()
            yield worker

    @contextmanager
    def starting(self, environ: Mapping[str, str]) -> Iterator[Worker]:
        """The same, without waiting until it runs."""
        log = self._directory / f"worker-{next(NUMBERS)}.log"
        worker = Worker({**self.environ, **environ}, log)
        try:
            yield worker
        finally:
            if worker.process.poll() is None:
                worker.kill()


class Bench:
    """The tenants of one test, and what is stored of them: other tests may have left theirs."""

    def __init__(self, place: Place) -> None:
        self.store = place.store
        self.superuser = place.superuser
        self._digests = KeyDigests(place.settings.key_peppers)
        self._tenants: list[UUID] = []

    def tenant(self, url: str | None) -> Tenant:
        """A tenant whose first event, its registration, is already recorded."""
        details = {"company_name": "Acme", "email": f"ada{next(NUMBERS)}@acme.example"}
        if url is not None:
            details["webhook_url"] = url
        with self.store.tenant(new_id()) as tx:
            made = tenants.register(tx, details, password_hash="-", digests=self._digests, now=now())
        self._tenants.append(made.tenant.id)
        return Tenant(made.tenant.id, made.webhook_secret)

    def record(self, tenant: Tenant, number: int = 1) -> None:
        """That many events in one transaction."""
        with self.store.tenant(tenant.id) as tx:
            for step in range(number):
                tx.events.record(TYPE, {"step": step}, now=now())

    def configure(self, tenant: Tenant, url: str) -> None:
        """As the tenant's owner would."""
        with self.store.tenant(tenant.id, exclusive=True) as tx:
            endpoints.configure(
                tx, url=url, event_types=None, regenerate_secret=False, grace=timedelta(0), now=now()
            )

    def end_leases(self, *, of: Collection[UUID] | None = None) -> None:
        """End the leases, or those of some tenants' endpoints, instead of waiting until they end.

        It moves no clock, so that due times and timestamps stay as they are, and runs no product code.
        """
        held = update(tasks).where(tasks.c.tenant_id.in_(self._tenants if of is None else of))
        with self.superuser.begin() as connection:
            connection.execute(held.where(tasks.c.leased_until > now()).values(leased_until=now()))

    # What is stored --------------------------------------------------------------------------------

    def begun(self) -> set[str]:
        """The ids of events whose delivery has begun and is not settled."""
        query = select(deliveries.c.event_id).where(
            deliveries.c.tenant_id.in_(self._tenants), IS_PENDING, deliveries.c.attempts > 0
        )
        with self.superuser.connect() as connection:
            return set(map(str, connection.scalars(query)))

    def rows(self, tenant: Tenant) -> list[Row[Any]]:
        """The tenant's deliveries, in the order of their events."""
        query = select(deliveries).where(deliveries.c.tenant_id == tenant.id).order_by(deliveries.c.id)
        with self.superuser.connect() as connection:
            return list(connection.execute(query))

    def endpoint(self, tenant: Tenant) -> Row[Any]:
        query = select(webhook_endpoints).where(webhook_endpoints.c.tenant_id == tenant.id)
        with self.superuser.connect() as connection:
            return connection.execute(query).one()

    def leases(self) -> int:
        """How many of the tenants' endpoints are leased by a worker."""
        return self._count(tasks, tasks.c.leased_until > now())

    def pending(self) -> int:
        """How many deliveries have not ended."""
        return self._count(deliveries, IS_PENDING)

    def _count(self, table: Table, condition: ColumnElement[bool]) -> int:
        query = select(func.count()).where(table.c.tenant_id.in_(self._tenants), condition)
        with self.superuser.connect() as connection:
            return connection.scalar(query) or 0

    def await_settled(self) -> None:
        """Wait until all is delivered or given up, and the endpoints are released."""
        eventually(lambda: self.pending() == 0 and self.leases() == 0)

    def waiting(self) -> int:
        """How many connections of the application wait for a lock."""
        with self.superuser.connect() as connection:
            return len(connection.execute(WAITING).all())

    def cut_waiting(self) -> None:
        """Terminate those: PostgreSQL would carry out what a client has sent even if the client is gone."""
        with self.superuser.connect() as connection:
            connection.execute(CUT_WAITING)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The application's connections are cut, and new ones refused."""
        with self.superuser.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            name = connection.scalar(text("SELECT current_database()"))
            # The limit is for all but superusers.
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
            try:
                connection.execute(CUT)
                yield
            finally:
                connection.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')

    @contextmanager
    def holding(self, table: str, tenant: Tenant) -> Iterator[None]:
        """Lock the tenant's rows, as another writer would."""
        with self.superuser.begin() as connection:
            connection.execute(
                text(f"SELECT FROM {table} WHERE tenant_id = :id FOR UPDATE"), {"id": tenant.id}
            )
            yield


def now() -> datetime:
    return datetime.now(UTC)


def url_of(receiver: Receiver, path: str = "in") -> str:
    return f"http://localhost:{receiver.port}/{path}"


def eventually(holds: Callable[[], object], *, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "It never came about."
        time.sleep(0.02)


def ids(received: Iterable[Received]) -> list[str]:
    return [one.headers["webhook-id"] for one in received]


def duplicated(received: Iterable[Received]) -> set[str]:
    return {event_id for event_id, times in Counter(ids(received)).items() if times > 1}


def sequences(received: Iterable[Received]) -> list[int]:
    """The distinct sequence numbers of the events that came, in order."""
    return sorted({json.loads(one.body)["sequence"] for one in received})


def assert_consistent(received: Iterable[Received], tenant: Tenant) -> None:
    """Each event's bytes are the same every time, belong to that event, and have a valid signature."""
    bodies: dict[str, bytes] = {}
    for one in received:
        event_id = one.headers["webhook-id"]
        assert bodies.setdefault(event_id, one.body) == one.body
        assert Webhook(tenant.secret).verify(one.body, dict(one.headers))["id"] == event_id


def assert_complete(received: Collection[Received], tenant: Tenant, number: int) -> None:
    """All of that many events came."""
    assert sequences(received) == list(range(1, number + 1))
    assert_consistent(received, tenant)
