"""Events: numbered by tenant without gaps, and stored as the bytes that are signed and sent."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select

from billing import tenants
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import event_heads, events
from billing.webhooks.events import envelope
from tests.conftest import TestDatabase

NOW = datetime(2026, 1, 15, 9, 30, 0, 123456, tzinfo=UTC)
TYPE = "webhook.test"
THREADS = 20


@pytest.fixture
def acme(store: Store, settings: Settings) -> UUID:
    return register(store, settings, "Acme")


def register(store: Store, settings: Settings, name: str) -> UUID:
    details = {"company_name": name, "email": f"ada@{name}.example"}
    with store.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def record(store: Store, tenant_id: UUID, **data: object) -> None:
    with store.tenant(tenant_id) as tx:
        tx.events.record(TYPE, data, now=NOW)


def rows_of(superuser: Engine, tenant_id: UUID) -> list[dict[str, Any]]:
    query = select(events).where(events.c.tenant_id == tenant_id).order_by(events.c.sequence)
    with superuser.connect() as connection:
        return [{str(name): of for name, of in row.items()} for row in connection.execute(query).mappings()]


def head_of(superuser: Engine, tenant_id: UUID) -> int | None:
    query = select(event_heads.c.sequence).where(event_heads.c.tenant_id == tenant_id)
    with superuser.connect() as connection:
        return connection.scalar(query)


def has_no_gap(rows: list[dict[str, Any]]) -> bool:
    return [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))


def data_of(rows: list[dict[str, Any]]) -> list[Any]:
    return [json.loads(row["body"])["data"] for row in rows if row["type"] == TYPE]


@pytest.mark.parametrize("livemode", [True, False])
def test_the_stored_body_is_the_envelope(store: Store, superuser: Engine, acme: UUID, livemode: bool) -> None:
    data = {"account_id": "acct_1", "at": NOW, "name": "é😀\u2028", "none": None}
    with store.tenant(acme) as tx:
        tx.events.record(TYPE, data, livemode=livemode, now=NOW)

    row = rows_of(superuser, acme)[-1]
    assert (row["type"], row["created_at"]) == (TYPE, NOW)
    assert bytes(row["body"]) == envelope(
        id=row["id"],
        type=TYPE,
        created_at=NOW,
        tenant_id=acme,
        livemode=livemode,
        sequence=row["sequence"],
        data=data,
    )
    assert json.loads(row["body"]) == {
        "id": str(row["id"]),
        "type": TYPE,
        "api_version": "2026-01-15",
        "created_at": "2026-01-15T09:30:00.123456Z",
        "tenant_id": str(acme),
        "livemode": livemode,
        "sequence": row["sequence"],
        "data": {**data, "at": "2026-01-15T09:30:00.123456Z"},
    }


def test_events_of_one_transaction_are_numbered_consecutively(
    store: Store, superuser: Engine, acme: UUID
) -> None:
    with store.tenant(acme) as tx:
        for step in range(3):
            tx.events.record(TYPE, {"step": step}, now=NOW)

    rows = rows_of(superuser, acme)
    assert data_of(rows) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert has_no_gap(rows)


def test_each_tenant_has_its_own_sequence(
    store: Store, settings: Settings, superuser: Engine, acme: UUID
) -> None:
    globex = register(store, settings, "Globex")
    before = {tenant_id: head_of(superuser, tenant_id) or 0 for tenant_id in (acme, globex)}
    for tenant_id in (acme, globex, acme):
        record(store, tenant_id)

    assert [head_of(superuser, tenant_id) for tenant_id in (acme, globex)] == [
        before[acme] + 2,
        before[globex] + 1,
    ]
    assert has_no_gap(rows_of(superuser, acme)) and has_no_gap(rows_of(superuser, globex))


def test_a_rolled_back_event_leaves_no_gap(store: Store, superuser: Engine, acme: UUID) -> None:
    with pytest.raises(ZeroDivisionError), store.tenant(acme) as tx:
        tx.events.record(TYPE, {"done": False}, now=NOW)
        raise ZeroDivisionError
    record(store, acme, done=True)

    rows = rows_of(superuser, acme)
    assert data_of(rows) == [{"done": True}]
    assert has_no_gap(rows)


def test_concurrent_transactions_leave_no_gap_though_some_are_rolled_back(
    settings: Settings, test_database: TestDatabase, superuser: Engine, store: Store, acme: UUID
) -> None:
    wide = Store(Vault(settings.encryption_keys), connections=THREADS)
    wide.open(test_database.app_url)
    ready = threading.Barrier(THREADS)

    def write(writer: int) -> None:
        ready.wait(10)
        for step in range(3):
            with suppress(ZeroDivisionError), wide.tenant(acme) as tx:
                tx.events.record(TYPE, {"writer": writer, "step": step}, now=NOW)
                if is_rolled_back(writer, step):
                    raise ZeroDivisionError

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write, range(THREADS)))
    finally:
        wide.close()
    kept = [(w, s) for w in range(THREADS) for s in range(3) if not is_rolled_back(w, s)]
    rows = rows_of(superuser, acme)
    assert sorted((data["writer"], data["step"]) for data in data_of(rows)) == kept
    assert has_no_gap(rows)
    assert head_of(superuser, acme) == len(rows)
    assert all(json.loads(row["body"])["sequence"] == row["sequence"] for row in rows)


def is_rolled_back(writer: int, step: int) -> bool:
    return (writer + step) % 3 == 0
