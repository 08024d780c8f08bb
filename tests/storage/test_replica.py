"""A real read replica: never read while behind what the caller has seen, and its failures do no harm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine

from app import create_app
from billing import tenants, tracing
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage import database, embedded, replica
from billing.storage.schema import SchemaError
from billing.storage.store import Store, TenantTx
from tests.clock import TurnedClock
from tests.conftest import STATE, Account, CheckedClient, TestDatabase, register
from tests.storage.standby import Standby, eventually, standby_of

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
SOON = 10
REST_SECONDS = 0.5


@pytest.fixture(scope="module")
def standby(cluster: embedded.Cluster, test_database: TestDatabase, worker_id: str) -> Iterator[Standby]:
    chosen = os.environ.get("BILLING_PG_BIN")
    with standby_of(cluster, STATE / "pg", Path(chosen) if chosen else None, f"r-{worker_id}") as running:
        yield running


@pytest.fixture
def replica_url(standby: Standby, cluster: embedded.Cluster, worker_id: str) -> str:
    app = database.url(cluster, database.APP, f"billing_{worker_id}")
    return app.replace(quoted(cluster), quoted(standby.cluster))


def quoted(cluster: embedded.Cluster) -> str:
    return cluster.url("-").partition("host=")[2].partition("&")[0]


@pytest.fixture
def spread(
    settings: Settings,
    test_database: TestDatabase,
    replica_url: str,
    clean: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Store]:
    """A store with a replica."""
    monkeypatch.setattr(replica, "STATEMENT_SECONDS", 0.5)
    monkeypatch.setattr(replica, "REST_SECONDS", REST_SECONDS)
    store = Store(Vault(settings.encryption_keys), connections=4)
    store.open(test_database.app_url, replica_url=replica_url)
    store.require_safe()
    yield store
    store.close()


@pytest.fixture
def events() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def acme(spread: Store, settings: Settings) -> UUID:
    details = {"company_name": "Acme", "email": "ada@acme.example"}
    with spread.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def is_replica(tx: TenantTx) -> bool:
    answer: bool = tx.tenants._connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one()
    return answer


def position(store: Store) -> str:
    """The position that a caller's look-up reports."""
    with store._engine.connect() as connection:
        found: str = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()::text").scalar_one()
    return found


def reads_replica(store: Store, tenant_id: UUID, since: str) -> bool:
    return store.read(tenant_id, is_replica, since=since)


def tier_of(tx: TenantTx) -> str:
    return tx.tenants.get().tier


# Freshness ---------------------------------------------------------------------------------------


def test_a_replica_that_has_caught_up_is_read(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine
) -> None:
    since = standby.catch_up(superuser)
    assert reads_replica(spread, acme, since)
    assert spread.read(acme, lambda tx: tx.tenants.get().id, since=since) == acme


def test_a_read_of_the_replica_is_a_span_even_when_it_lags(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    since = standby.catch_up(superuser)
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("billing"))
    assert reads_replica(spread, acme, since)
    assert not reads_replica(spread, acme, "FFFFFFFF/0")
    spans = kept.get_finished_spans()
    assert [s.name for s in spans] == ["database read", "database read", "database transaction"]
    assert all(s.status.is_unset for s in spans)


def test_an_immediate_read_always_shows_the_write(spread: Store, acme: UUID) -> None:
    for number in range(100):
        tier = ("pro", "free")[number % 2]
        with spread.tenant(acme) as tx:
            tx.tenants.set_tier(tier, NOW)
        assert spread.read(acme, tier_of, since=position(spread)) == tier


def test_while_replay_is_paused_the_primary_is_read(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine, events: list[Any]
) -> None:
    before = standby.catch_up(superuser)
    with standby.paused():
        with spread.tenant(acme) as tx:
            tx.tenants.set_tier("pro", NOW)
        assert spread.read(acme, tier_of, since=position(spread)) == "pro"
        # The position decides: for an earlier one the replica is good enough.
        assert spread.read(acme, tier_of, since=before) == "free"
    assert reads_replica(spread, acme, standby.catch_up(superuser))
    assert not events, "lagging is no failure"


def test_without_a_position_or_a_replica_the_primary_is_read(
    spread: Store, store: Store, acme: UUID, standby: Standby, superuser: Engine
) -> None:
    since = standby.catch_up(superuser)
    assert not spread.read(acme, is_replica, since=None)
    assert not store.read(acme, is_replica, since=since)


def test_row_security_applies_on_the_replica(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine
) -> None:
    since = standby.catch_up(superuser)

    def all_tenants(tx: TenantTx) -> list[UUID]:
        assert is_replica(tx)
        return list(tx.tenants._connection.exec_driver_sql("SELECT id FROM tenants").scalars())

    assert spread.read(acme, all_tenants, since=since) == [acme]
    assert spread.read(new_id(), all_tenants, since=since) == []


# Failures ----------------------------------------------------------------------------------------


def test_a_stopped_replica_is_left_out_and_taken_back(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine, events: list[Any]
) -> None:
    since = standby.catch_up(superuser)
    assert reads_replica(spread, acme, since)
    with standby.stopped():
        assert not reads_replica(spread, acme, since)
        started = perf_counter()
        for _ in range(20):
            assert spread.read(acme, tier_of, since=position(spread)) == "free"
        assert perf_counter() - started < SOON
    assert replica_events(events).count("the replica fails, and is left out") == 1
    eventually_reads_replica(spread, acme, standby, superuser)
    assert replica_events(events).count("the replica answers again") == 1


def test_a_killed_replica_is_left_out_and_taken_back(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine, events: list[Any]
) -> None:
    since = standby.catch_up(superuser)
    assert reads_replica(spread, acme, since)
    standby.kill()
    for _ in range(20):
        assert not reads_replica(spread, acme, since)
    assert replica_events(events) == ["the replica fails, and is left out"]
    standby.start()
    eventually_reads_replica(spread, acme, standby, superuser)


def test_a_read_that_fails_on_the_replica_is_repeated_on_the_primary(
    spread: Store, acme: UUID, standby: Standby, superuser: Engine
) -> None:
    since = standby.catch_up(superuser)
    asked: list[bool] = []

    def look(tx: TenantTx) -> str:
        asked.append(is_replica(tx))
        if asked[-1]:
            standby.ask(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'billing'"
            )
        return tier_of(tx)

    assert spread.read(acme, look, since=since) == "free"
    assert asked == [True, False]


def replica_events(events: list[Any]) -> list[str]:
    return [event["event"] for event in events if event["event"].startswith("the replica")]


def eventually_reads_replica(store: Store, tenant_id: UUID, standby: Standby, superuser: Engine) -> None:
    until = perf_counter() + 3 * SOON
    while not reads_replica(store, tenant_id, standby.catch_up(superuser)):
        assert perf_counter() < until, "the replica was not taken back"


# Refused at the start ----------------------------------------------------------------------------


def opened(settings: Settings, primary: str, replica_url: str) -> Store:
    store = Store(Vault(settings.encryption_keys), connections=1)
    store.open(primary, replica_url=replica_url)
    return store


def test_a_primary_is_refused_as_a_replica(settings: Settings, test_database: TestDatabase) -> None:
    store = opened(settings, test_database.app_url, test_database.app_url)
    with pytest.raises(SchemaError, match="DATABASE_REPLICA_URL is no replica"):
        store.require_safe()
    store.close()


def test_a_role_that_bypasses_row_security_is_refused(
    settings: Settings, test_database: TestDatabase, standby: Standby, worker_id: str
) -> None:
    store = opened(settings, test_database.app_url, standby.cluster.url(f"billing_{worker_id}"))
    with pytest.raises(SchemaError, match="passes over row-level security"):
        store.require_safe()
    store.close()


def test_an_unreachable_replica_does_not_prevent_the_start(
    settings: Settings, test_database: TestDatabase, events: list[Any], tmp_path: Path
) -> None:
    away = test_database.app_url.partition("host=")[0] + f"host={tmp_path}"
    store = opened(settings, test_database.app_url, away)
    store.require_safe()
    assert replica_events(events) == ["the replica fails, and is left out"]
    store.close()


# The whole application ---------------------------------------------------------------------------


@pytest.fixture
def account(settings: Settings, replica_url: str, clock: TurnedClock, clean: None) -> Iterator[Account]:
    """Acme at an application with a replica."""
    spread = replace(settings, database_replica_url=replica_url)
    with CheckedClient(create_app(spread, clock=clock), raise_server_exceptions=False) as client:
        yield Account(client, register(client).json())


def keys_of(account: Account) -> set[str]:
    answer = account.get("/api-keys/")
    assert answer.status_code == 200
    return {key["id"] for key in answer.json()["keys"] if key["status"] == "active"}


def lists_from(standby: Standby, account: Account, superuser: Engine) -> bool:
    standby.catch_up(superuser)
    keys_of(account)
    return last_query_on(standby) == "COMMIT"


def last_query_on(standby: Standby) -> object:
    """COMMIT when the replica answered the read, ROLLBACK when it lagged."""
    return standby.ask("SELECT query FROM pg_stat_activity WHERE application_name = 'billing'")


def test_key_changes_take_effect_at_once_while_the_replica_lags(
    account: Account, standby: Standby, superuser: Engine
) -> None:
    before = keys_of(account)
    eventually(lambda: lists_from(standby, account, superuser), standby.log)
    with standby.paused():
        account.regenerate()
        assert not before & keys_of(account)
        assert last_query_on(standby) == "ROLLBACK"
        secret = account.tenant["api_key_secret"]
        assert (
            account.client.get("/api/v1/auth/tenants/verify/", headers={"X-API-Key": secret}).status_code
            == 401
        )
    assert account.get("/webhooks/config/").status_code == 200
