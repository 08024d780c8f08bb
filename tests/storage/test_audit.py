"""The audit log: a chain without gaps that can be recomputed, and that no role of the server can rewrite."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, exc, select, text

from billing import tenants
from billing.actors import Actor
from billing.audit import GENESIS, canonical
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import audit_heads, audit_log
from tests.conftest import TestDatabase

NOW = datetime(2026, 1, 15, 9, 30, 0, 123456, tzinfo=UTC)
THREADS = 20


@pytest.fixture
def acme(store: Store, settings: Settings) -> UUID:
    return register(store, settings, "Acme")


def register(store: Store, settings: Settings, name: str) -> UUID:
    details = {"company_name": name, "email": f"ada@{name}.example"}
    with store.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def rows_of(superuser: Engine, tenant_id: UUID) -> list[dict[str, Any]]:
    query = select(audit_log).where(audit_log.c.tenant_id == tenant_id).order_by(audit_log.c.sequence)
    with superuser.connect() as connection:
        return [
            {str(name): value for name, value in row.items()} for row in connection.execute(query).mappings()
        ]


def broken_at(rows: list[dict[str, Any]]) -> list[int]:
    """The sequence numbers of rows out of sequence, or whose hash does not follow from the previous one."""
    broken, previous = [], GENESIS
    for place, row in enumerate(rows, start=1):
        content = {name: value for name, value in row.items() if name != "hash"}
        if row["sequence"] != place or hashlib.sha256(previous + canonical(content)).digest() != row["hash"]:
            broken.append(row["sequence"])
        previous = row["hash"]
    return broken


def head_of(superuser: Engine, tenant_id: UUID) -> tuple[int, bytes]:
    with superuser.connect() as connection:
        row = connection.execute(select(audit_heads).where(audit_heads.c.tenant_id == tenant_id)).one()
    return row.sequence, row.hash


# The chain ---------------------------------------------------------------------------------------

DETAILS: list[dict[str, Any]] = [
    {},
    {"b": 1, "a": {"d": [1, 2.5, -0.125, True, None], "c": 'é😀"\\\n\u2028'}},
    {"grace_seconds": 604800, "large": 2**53 - 1, "negative": -1},
    {"": "", "ключ": ["x", {"y": []}, {}]},
    {"z": 1, "Z": 2, "aa": 3, "a": 4, "ab": 5},
]


def test_stored_rows_reproduce_their_stored_hashes(store: Store, superuser: Engine, acme: UUID) -> None:
    actors = [Actor("user", new_id(), "2001:db8::1", "request-1"), Actor("anonymous", None, None, None)]
    for at, details in enumerate(DETAILS):
        with store.tenant(acme, actors[at % 2]) as tx:
            tx.audit.record("test.done", now=NOW, subject="é", reason="because\n", details=details)
    rows = rows_of(superuser, acme)
    assert [row["details"] for row in rows[2:]] == DETAILS
    assert broken_at(rows) == []
    assert head_of(superuser, acme) == (len(rows), rows[-1]["hash"])


@pytest.mark.parametrize(
    "now",
    [
        NOW,
        NOW.replace(microsecond=0),
        NOW.replace(microsecond=100000),
        NOW.astimezone(timezone(timedelta(hours=5, minutes=30))),
        datetime(1, 1, 1, tzinfo=UTC),
    ],
)
def test_times_are_hashed_as_they_are_stored(
    store: Store, superuser: Engine, acme: UUID, now: datetime
) -> None:
    with store.tenant(acme) as tx:
        tx.audit.record("test.done", now=now)
    assert rows_of(superuser, acme)[-1]["at"] == now
    assert broken_at(rows_of(superuser, acme)) == []


def test_the_canonical_form_can_be_reproduced_with_plain_json(superuser: Engine, acme: UUID) -> None:
    row = rows_of(superuser, acme)[0]
    written = {
        **{name: value for name, value in row.items() if name != "hash"},
        "tenant_id": str(row["tenant_id"]),
        "at": "2026-01-15T09:30:00.123456Z",
    }
    assert row["actor_id"] is None
    by_hand = json.dumps(written, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert hashlib.sha256(bytes(32) + by_hand).digest() == row["hash"]


CHANGES = [
    "at = at + interval '1 microsecond'",
    "action = 'other'",
    "actor_kind = 'operator'",
    "actor_id = gen_random_uuid()",
    "subject = 'other'",
    "reason = ''",
    "details = '{\"x\": 1}'",
    "address = '192.0.2.1'",
    "request_id = 'other'",
    "hash = sha256('x')",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_row_breaks_the_chain(superuser: Engine, acme: UUID, change: str) -> None:
    with superuser.begin() as connection:
        connection.execute(text(f"UPDATE audit_log SET {change} WHERE sequence = 1"))
    assert broken_at(rows_of(superuser, acme))[:1] == [1]


def test_a_missing_row_breaks_the_chain(superuser: Engine, acme: UUID) -> None:
    with superuser.begin() as connection:
        connection.execute(text("DELETE FROM audit_log WHERE sequence = 1"))
    assert broken_at(rows_of(superuser, acme)) == [2]


def test_the_head_reveals_a_missing_last_row(superuser: Engine, acme: UUID) -> None:
    with superuser.begin() as connection:
        connection.execute(text("DELETE FROM audit_log WHERE sequence = 2"))
    rows = rows_of(superuser, acme)
    assert broken_at(rows) == []
    assert head_of(superuser, acme) != (len(rows), rows[-1]["hash"])


def test_each_tenant_has_a_chain_of_its_own(
    store: Store, settings: Settings, superuser: Engine, acme: UUID
) -> None:
    globex = register(store, settings, "Globex")
    for tenant_id in (acme, globex, acme):
        with store.tenant(tenant_id) as tx:
            tx.audit.record("test.done", now=NOW)
    assert [len(rows_of(superuser, tenant_id)) for tenant_id in (acme, globex)] == [4, 3]
    assert broken_at(rows_of(superuser, acme)) == broken_at(rows_of(superuser, globex)) == []


def test_a_rolled_back_record_leaves_no_gap(store: Store, superuser: Engine, acme: UUID) -> None:
    with pytest.raises(ZeroDivisionError), store.tenant(acme) as tx:
        tx.audit.record("test.undone", now=NOW)
        raise ZeroDivisionError
    with store.tenant(acme) as tx:
        tx.audit.record("test.done", now=NOW)
        tx.audit.record("test.done_again", now=NOW)
    rows = rows_of(superuser, acme)
    assert [row["action"] for row in rows[2:]] == ["test.done", "test.done_again"]
    assert broken_at(rows) == []


def test_twenty_concurrent_writers_make_one_chain(
    settings: Settings, test_database: TestDatabase, superuser: Engine, store: Store, acme: UUID
) -> None:
    wide = Store(Vault(settings.encryption_keys), connections=THREADS)
    wide.open(test_database.app_url)
    ready = threading.Barrier(THREADS)

    def write(number: int) -> None:
        ready.wait(10)
        for _ in range(3):
            with wide.tenant(acme, Actor("user", new_id())) as tx:
                tx.audit.record("test.done", now=NOW, details={"writer": number})

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write, range(THREADS)))
    finally:
        wide.close()
    rows = rows_of(superuser, acme)
    assert [row["sequence"] for row in rows] == list(range(1, 2 + 3 * THREADS + 1))
    assert broken_at(rows) == []
    assert head_of(superuser, acme) == (len(rows), rows[-1]["hash"])


# Privileges --------------------------------------------------------------------------------------


@pytest.fixture
def application(test_database: TestDatabase) -> Iterator[Engine]:
    engine = create_engine(test_database.app_url)
    yield engine
    engine.dispose()


REFUSED = "permission denied|must be owner"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_log SET reason = 'another'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "TRUNCATE tenants CASCADE",
        "INSERT INTO audit_heads SELECT * FROM audit_heads",
        "UPDATE audit_heads SET sequence = 1",
        "SELECT * FROM audit_heads FOR UPDATE",
        "DELETE FROM audit_heads",
        "TRUNCATE audit_heads",
        "DROP TABLE audit_log",
        "ALTER TABLE audit_log DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE audit_log DISABLE TRIGGER ALL",
        "INSERT INTO audit_log SELECT * FROM audit_log ON CONFLICT (tenant_id, sequence) DO UPDATE SET reason = 'x'",
    ],
)
def test_the_application_may_only_insert_and_read(
    application: Engine, acme: UUID, superuser: Engine, statement: str
) -> None:
    with (
        pytest.raises(exc.ProgrammingError, match=REFUSED),
        application.begin() as connection,
    ):
        connection.execute(text("SELECT set_config('app.tenant_id', :id, true)"), {"id": str(acme)})
        assert connection.scalar(text("SELECT count(*) FROM audit_log")) == 2
        connection.execute(text(statement))
    assert broken_at(rows_of(superuser, acme)) == []


def test_the_head_does_not_advance_without_a_new_row(
    application: Engine, acme: UUID, superuser: Engine
) -> None:
    before = head_of(superuser, acme)
    with application.begin() as connection:
        connection.execute(text("SELECT set_config('app.tenant_id', :id, true)"), {"id": str(acme)})
        locked = connection.execute(text("SELECT * FROM app.lock_audit_head()")).one()
        assert (locked.sequence, bytes(locked.hash)) == before
        assert connection.scalar(text("SELECT app.advance_audit_head()")) is None
    assert head_of(superuser, acme) == before


def test_no_role_of_the_server_may_change_or_remove_a_row(superuser: Engine) -> None:
    roles = "SELECT rolname FROM pg_roles WHERE rolname IN ('billing_app', 'billing_lookup')"
    query = f"SELECT role, has_table_privilege(role, 'audit_log', :what) FROM ({roles}) AS r (role)"
    with superuser.connect() as connection:
        for what in ("UPDATE", "DELETE", "TRUNCATE", "TRIGGER"):
            rows = connection.execute(text(query), {"what": what})
            assert {row.role: row.has_table_privilege for row in rows} == {
                "billing_app": False,
                "billing_lookup": False,
            }


def test_a_tenant_cannot_write_into_the_log_of_another(
    application: Engine, store: Store, settings: Settings, acme: UUID
) -> None:
    globex = register(store, settings, "Globex")
    values = {
        "tenant_id": acme,
        "sequence": 3,
        "at": NOW,
        "action": "forged",
        "actor_kind": "system",
        "details": {},
        "hash": b"",
    }
    with pytest.raises(exc.ProgrammingError, match="row-level security"), application.begin() as connection:
        connection.execute(text("SELECT set_config('app.tenant_id', :id, true)"), {"id": str(globex)})
        connection.execute(audit_log.insert().values(values))
