"""COMMITs that wait for a synchronous standby: clients are answered in time, and each write is there once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, create_engine, text

from app import create_app
from billing.idempotency import LEASE
from billing.settings import Settings
from billing.storage import database, embedded
from billing.storage.watchdog import STATEMENT_SECONDS
from tests.clock import TurnedClock
from tests.conftest import API, STATE, Account, CheckedClient, bearer, clone, register
from tests.storage.standby import Standby, eventually, standby_of

# What a busy machine may add to what would wait for ever, or for a request's own 30 seconds.
SLACK_SECONDS = 15
# And to a deadline, which is sooner than any other limit of a request.
LITTLE_SLACK_SECONDS = 5
HURRY_SECONDS = 2
LOCK_SECONDS = 2  # lock_timeout


@dataclass
class Primary:
    """A database each of whose commits waits for the standby."""

    settings: Settings
    superuser: Engine
    standby: Standby

    def ask(self, question: str, **values: object) -> Any:
        with self.superuser.connect() as connection:
            return connection.execute(text(question), values).scalar_one()

    def changes_of(self, account: Account) -> int:
        """How many regenerations of its keys others can see."""
        question = "SELECT count(*) FROM audit_log WHERE tenant_id = :id AND action = 'api_key.regenerated'"
        return int(self.ask(question, id=account.tenant["id"]))

    def await_session(self, wait: str) -> None:
        """Wait until one of the server's connections has this wait event."""
        question = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'billing' AND wait_event = :wait"
        )
        eventually(lambda: self.ask(question, wait=wait) > 0, self.standby.log)

    @contextmanager
    def holding_the_tenants(self) -> Iterator[None]:
        with self.superuser.connect() as connection:
            connection.execute(text("SELECT id FROM tenants FOR UPDATE"))
            yield
            connection.rollback()


@pytest.fixture(scope="module")
def primary(cluster: embedded.Cluster, settings: Settings, worker_id: str) -> Iterator[Primary]:
    chosen = os.environ.get("BILLING_PG_BIN")
    name = f"sync-{worker_id}"
    with standby_of(cluster, STATE / "pg", Path(chosen) if chosen else None, name) as standby:
        base = f"billing_sync_{worker_id}"
        clone(cluster, base)
        superuser = create_engine(cluster.url(base), isolation_level="READ COMMITTED")
        with waited_for(superuser, standby, name, base):
            yield Primary(
                replace(settings, database_url=database.url(cluster, database.APP, base)), superuser, standby
            )
        superuser.dispose()


@contextmanager
def waited_for(superuser: Engine, standby: Standby, name: str, base: str) -> Iterator[None]:
    """Commits of this database wait for the standby, and those of no other."""
    with superuser.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        # It is a setting of the whole cluster, which the tests' processes share: one at a time.
        connection.exec_driver_sql("SELECT pg_advisory_lock(2)")
        connection.exec_driver_sql(f"ALTER SYSTEM SET synchronous_standby_names = '\"{name}\"'")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
        state = text("SELECT max(sync_state) FROM pg_stat_replication WHERE application_name = :name")
        try:
            eventually(lambda: connection.execute(state, {"name": name}).scalar() == "sync", standby.log)
            connection.exec_driver_sql(f'ALTER DATABASE "{base}" SET synchronous_commit = on')
            yield
        finally:
            connection.exec_driver_sql("ALTER SYSTEM RESET synchronous_standby_names")
            connection.exec_driver_sql("SELECT pg_reload_conf()")


@contextmanager
def served(primary: Primary, clock: TurnedClock, company: str, seconds: int) -> Iterator[Account]:
    """A tenant of a server with this request timeout."""
    built = replace(primary.settings, request_timeout_seconds=seconds, rate_limits=False)
    with CheckedClient(create_app(built, clock=clock), raise_server_exceptions=False) as client:
        yield Account(client, register(client, company).json())


def regenerate(account: Account) -> httpx.Response:
    headers = bearer(account.tokens["access"]) | {"Idempotency-Key": "first"}
    body = {"key_type": "test", "confirm": True}
    return account.client.post(f"{API}/api-keys/regenerate/", json=body, headers=headers)


def repeated(primary: Primary, account: Account) -> httpx.Response:
    """The answer to the repeated request, once the database is back."""
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        answers.append(regenerate(account))
        return answers[-1].status_code != 503

    eventually(is_answered, primary.standby.log)
    return answers[-1]


# The client is answered by the deadline; or, when the connection is cut, after an attempt to release the claim, which
# takes as long as one waits for a lock.
@pytest.mark.parametrize(
    ("company", "seconds", "code", "within"),
    [
        ("Hurried Ltd.", HURRY_SECONDS, "deadline-exceeded", HURRY_SECONDS + LITTLE_SLACK_SECONDS),
        ("Patient Ltd.", 30, "database-unavailable", STATEMENT_SECONDS + LOCK_SECONDS + SLACK_SECONDS),
    ],
)
def test_a_change_whose_commit_waits_is_made_once_when_the_standby_returns(
    primary: Primary, clock: TurnedClock, company: str, seconds: int, code: str, within: float
) -> None:
    with served(primary, clock, company, seconds) as account, ThreadPoolExecutor(1) as pool:
        with ExitStack() as standing_still:
            with primary.holding_the_tenants():
                asked = pool.submit(regenerate, account)
                primary.await_session("transactionid")
                standing_still.enter_context(primary.standby.stopped())
            began = perf_counter()
            primary.await_session("SyncRep")
            late = asked.result()
            assert perf_counter() - began < within
            assert (late.status_code, late.json()["code"]) == (503, code)
            # Reads continue, and do not see it. A repeated request waits for the same rows.
            assert account.get("/api-keys/").status_code == 200
            assert primary.changes_of(account) == 0
            assert regenerate(account).status_code == 503
            # Even if the connection is cut, PostgreSQL keeps waiting.
            primary.await_session("SyncRep")
        again = repeated(primary, account)
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert primary.changes_of(account) == 1


def test_a_change_whose_claim_waits_is_not_made_until_the_claim_expires(
    primary: Primary, clock: TurnedClock
) -> None:
    with served(primary, clock, "Unlucky Ltd.", 30) as account:
        with primary.standby.stopped():
            began = perf_counter()
            late = regenerate(account)
            assert perf_counter() - began < STATEMENT_SECONDS + SLACK_SECONDS
            assert (late.status_code, late.json()["code"]) == (503, "database-unavailable")
        assert repeated(primary, account).json()["code"] == "idempotency-in-progress"
        assert primary.changes_of(account) == 0
        clock.turn(seconds=LEASE.total_seconds())
        again = repeated(primary, account)
        assert (again.status_code, again.headers.get("idempotent-replayed")) == (200, None)
        assert primary.changes_of(account) == 1
