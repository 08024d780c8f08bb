"""Deliveries in the database: which are begun, in which order, and which are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from billing import tenants
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage import shelf
from billing.storage.store import Store
from billing.webhooks.delivery import Begun
from billing.webhooks.replay import Choice

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
TYPE = "webhook.test"


@pytest.fixture
def acme(store: Store, settings: Settings, superuser: Engine) -> UUID:
    """A tenant with an endpoint and no deliveries to it."""
    url, digests = "https://hooks.acme.example/", KeyDigests(settings.key_peppers)
    details = {"company_name": "Acme", "email": "ada@acme.example", "webhook_url": url}
    with store.tenant(new_id()) as tx:
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)
    with superuser.begin() as connection:
        connection.execute(text("DELETE FROM deliveries"))
        connection.execute(text("DELETE FROM events"))
    return made.tenant.id


def record(store: Store, acme: UUID, *, at: datetime = NOW) -> None:
    with store.tenant(acme) as tx:
        tx.events.record(TYPE, {}, now=at)


def rows_of(superuser: Engine, query: str) -> list[Any]:
    with superuser.connect() as connection:
        return list(connection.execute(text(query)).all())


def events_in_order(superuser: Engine) -> list[UUID]:
    return [row.id for row in rows_of(superuser, "SELECT id FROM events ORDER BY sequence")]


def begin(store: Store, acme: UUID, now: datetime, *, most: int = 100) -> Sequence[Begun]:
    with store.tenant(acme) as tx:
        return tx.deliveries.begin(now, types=None, most=most)


def test_only_due_deliveries_are_begun(store: Store, superuser: Engine, acme: UUID) -> None:
    record(store, acme, at=NOW)
    record(store, acme, at=NOW + MINUTE)
    first, second = events_in_order(superuser)
    assert [begun.event_id for begun in begin(store, acme, NOW + MINUTE - timedelta(seconds=1))] == [first]
    assert [begun.event_id for begun in begin(store, acme, NOW + MINUTE)] == [first, second]


def test_deliveries_are_begun_by_due_time_then_by_order_of_events(
    store: Store, superuser: Engine, acme: UUID
) -> None:
    for _ in range(4):
        record(store, acme)
    a, b, c, d = events_in_order(superuser)
    with superuser.begin() as connection:
        # Rows that are rewritten in another order are found in that one.
        for minutes, event_id in ((2, c), (2, a), (1, d), (2, b)):
            values = {"due": NOW + minutes * MINUTE, "id": event_id}
            connection.execute(
                text("UPDATE deliveries SET next_attempt_at = :due WHERE event_id = :id"), values
            )
    assert [begun.event_id for begun in begin(store, acme, NOW + 3 * MINUTE)] == [d, a, b, c]
    assert [begun.event_id for begun in begin(store, acme, NOW + 3 * MINUTE, most=1)] == [d]


def test_a_replay_skips_a_delivery_that_is_being_begun(store: Store, superuser: Engine, acme: UUID) -> None:
    record(store, acme)
    record(store, acme)
    ids = events_in_order(superuser)
    with superuser.begin() as worker:
        worker.execute(text("SELECT FROM deliveries WHERE event_id = :id FOR UPDATE"), {"id": ids[0]})
        with store.tenant(acme) as tx:
            tx.deliveries.replay(ids, NOW - MINUTE)
    due = "SELECT event_id, next_attempt_at FROM deliveries ORDER BY event_id"
    assert [tuple(row) for row in rows_of(superuser, due)] == [(ids[0], NOW), (ids[1], NOW - MINUTE)]


def test_cancelling_reports_whether_more_may_remain(
    store: Store, superuser: Engine, acme: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "BATCH_ROWS", 2)
    for _ in range(3):
        record(store, acme)
    more = []
    for _ in range(3):
        with store.tenant(acme) as tx:
            more.append(tx.deliveries.cancel("removed", NOW))
    assert more == [True, True, False]
    ended = "SELECT DISTINCT status, error, settled_at FROM deliveries"
    assert [tuple(row) for row in rows_of(superuser, ended)] == [("failed", "removed", NOW)]


def test_a_choice_since_a_time_includes_events_at_that_time(
    store: Store, superuser: Engine, acme: UUID
) -> None:
    record(store, acme, at=NOW - timedelta(microseconds=1))
    record(store, acme, at=NOW)
    [_, at_that_moment] = events_in_order(superuser)
    with store.tenant(acme) as tx:
        chosen = tx.events.chosen(Choice(since=NOW), wanted=(), after=0, last=100, most=100)
    assert [one.id for one in chosen] == [at_that_moment]
