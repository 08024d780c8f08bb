"""Housekeeping: deleting old rows, resealing secrets, and announcing the expiry of keys in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, get_args
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from billing import keys, sessions, tenants
from billing.encryption import Unreadable, Vault
from billing.housekeeping import KEPT, Housekeeping
from billing.ids import new_id
from billing.keyrings import Keyring, new_keyring
from billing.keys import EXPIRING, KeyDigests
from billing.settings import Settings
from billing.storage.shelf import BATCH_ROWS
from billing.storage.store import Store
from billing.tasks import LEASE, Task
from billing.tenants import HOUSEKEEPING, TIDIED_EVERY, Registered
from billing.tokens import Tokens
from billing.webhooks.delivery import Delivery, Status
from tests.clock import TurnedClock
from tests.conftest import TestDatabase, waits_for_a_lock

TEST = "webhook.test"
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
URL = "https://hooks.acme.example/"
STATUSES: tuple[Status, ...] = get_args(Status)


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def digests(settings: Settings) -> KeyDigests:
    return KeyDigests(settings.key_peppers)


@pytest.fixture
def acme(store: Store, digests: KeyDigests, clock: TurnedClock) -> Registered:
    return register(store, digests, clock, "Acme", webhook_url=URL)


def register(store: Store, digests: KeyDigests, clock: TurnedClock, name: str, **more: str) -> Registered:
    details = {"company_name": name, "email": f"ada@{name}.example", **more}
    with store.tenant(new_id()) as tx:
        return tenants.register(tx, details, password_hash="-", digests=digests, now=clock())


def due(store: Store, clock: TurnedClock, kind: str) -> list[Task]:
    return [task for task in store.take_due("general", clock(), most=100) if task.kind == kind]


def rows_of(superuser: Engine, query: str, **values: Any) -> list[Any]:
    with superuser.connect() as connection:
        return list(connection.execute(text(query), values).all())


# Tidying -----------------------------------------------------------------------------------------


def tidy(store: Store, clock: TurnedClock) -> None:
    for task in due(store, clock, HOUSEKEEPING):
        Housekeeping(store, clock).tidy(task)


def test_each_tenant_is_tidied_once_a_day(store: Store, clock: TurnedClock, acme: Registered) -> None:
    assert due(store, clock, HOUSEKEEPING) == []
    for _ in range(3):
        clock.now += TIDIED_EVERY - timedelta(seconds=1)
        assert due(store, clock, HOUSEKEEPING) == []
        clock.turn(seconds=1)
        [task] = due(store, clock, HOUSEKEEPING)
        assert task.tenant_id == acme.tenant.id
        Housekeeping(store, clock).tidy(task)


def test_tidying_is_repeated_at_once_until_nothing_is_left_to_delete(
    store: Store, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    deliver(store, acme, clock, age=KEPT + HOUR, status="delivered")
    tidy(store, clock)
    [again] = due(store, clock, HOUSEKEEPING)
    Housekeeping(store, clock).tidy(again)
    assert due(store, clock, HOUSEKEEPING) == []


def deliver(store: Store, acme: Registered, clock: TurnedClock, *, age: timedelta, status: Status) -> UUID:
    """An event with a delivery of this age: settled then, or pending since."""
    then = clock() - age
    with store.tenant(acme.tenant.id) as tx:
        event = tx.events.keep_test(TEST, {}, now=then)
        is_pending = status == "pending"
        delivery = Delivery(
            new_id(), event.id, TEST, status, 1, then if is_pending else None, 200, None, 5, then
        )
        tx.deliveries.add(replace(delivery, settled_at=None if is_pending else then))
    return event.id


def test_only_deliveries_settled_or_pending_for_a_month_are_deleted(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    moment = timedelta(seconds=1)
    for status in STATUSES:
        deliver(store, acme, clock, age=KEPT + moment, status=status)
    kept = {deliver(store, acme, clock, age=KEPT - moment, status=status) for status in STATUSES}
    tidy(store, clock)

    query = "SELECT event_id FROM deliveries WHERE event_type = :type"
    assert {row.event_id for row in rows_of(superuser, query, type=TEST)} == kept
    assert {
        row.id for row in rows_of(superuser, "SELECT id FROM events WHERE type = :type", type=TEST)
    } == kept


def test_an_old_event_is_kept_as_long_as_its_delivery(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    event_id = deliver(store, acme, clock, age=10 * KEPT, status="delivered")
    with superuser.begin() as connection:
        late = {"then": clock() - KEPT + timedelta(seconds=1), "id": event_id}
        connection.execute(text("UPDATE deliveries SET settled_at = :then WHERE event_id = :id"), late)
    tidy(store, clock)

    assert rows_of(superuser, "SELECT 1 FROM events WHERE id = :id", id=event_id)


def test_a_delivery_being_replayed_is_not_deleted(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    event_id = deliver(store, acme, clock, age=10 * KEPT, status="failed")
    with store.tenant(acme.tenant.id) as replaying:
        replaying.deliveries.replay([event_id], clock())
        with store.tenant(acme.tenant.id) as tidying:
            assert not tidying.deliveries.prune(clock() - KEPT)
    query = "SELECT status FROM deliveries WHERE event_id = :id"
    assert [row.status for row in rows_of(superuser, query, id=event_id)] == ["pending"]
    assert rows_of(superuser, "SELECT 1 FROM events WHERE id = :id", id=event_id)


def test_old_events_without_an_endpoint_are_deleted_and_numbering_continues(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock
) -> None:
    without_endpoint = register(store, digests, clock, "Globex").tenant.id
    clock.now += KEPT + timedelta(seconds=1)
    tidy(store, clock)
    with store.tenant(without_endpoint) as tx:
        tx.events.record(TEST, {}, now=clock())

    rows = rows_of(superuser, "SELECT sequence FROM events WHERE tenant_id = :id", id=without_endpoint)
    assert [row.sequence for row in rows] == [2]


def test_events_without_an_endpoint_are_kept_for_a_month(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock
) -> None:
    without_endpoint = register(store, digests, clock, "Globex").tenant.id
    clock.now += KEPT - timedelta(seconds=1)
    tidy(store, clock)
    kept = rows_of(superuser, "SELECT type FROM events WHERE tenant_id = :id", id=without_endpoint)
    assert [row.type for row in kept] == ["tenant.registered"]


def test_tidying_one_tenant_leaves_the_data_of_others(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    globex = register(store, digests, clock, "Globex", webhook_url=URL)
    theirs = deliver(store, globex, clock, age=10 * KEPT, status="delivered")
    tidy(store, clock)

    assert rows_of(superuser, "SELECT 1 FROM events WHERE id = :id", id=theirs)


def test_sessions_are_deleted_a_month_after_they_end(
    store: Store, superuser: Engine, settings: Settings, clock: TurnedClock, acme: Registered
) -> None:
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(acme.tenant.id) as tx:
        sessions.start(tx, acme.owner, tokens=tokens, now=clock())
        tx.sessions.end_all(acme.owner.id, clock())
        sessions.start(tx, acme.owner, tokens=tokens, now=clock())
    clock.now += KEPT
    tidy(store, clock)
    assert len(rows_of(superuser, "SELECT 1 FROM sessions")) == 2
    clock.now += DAY
    tidy(store, clock)
    [left] = rows_of(superuser, "SELECT ended_at FROM sessions")
    assert left.ended_at is None


def test_many_old_sessions_are_deleted_in_batches(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    query = (
        "INSERT INTO sessions SELECT :tenant, gen_random_uuid(), :user, decode(repeat('00', 32), 'hex'), NULL, "
        "CAST(:then AS timestamptz) - interval '1 day', :then, :then, NULL FROM generate_series(1, :number)"
    )
    values = {"tenant": acme.tenant.id, "user": acme.owner.id, "then": clock() - 2 * KEPT}
    with superuser.begin() as connection:
        connection.execute(text(query), values | {"number": BATCH_ROWS + 1})
    clock.now += TIDIED_EVERY
    for left in (1, 0):
        tidy(store, clock)
        assert len(rows_of(superuser, "SELECT 1 FROM sessions")) == left


def test_sessions_are_deleted_a_month_after_they_expire(
    store: Store, superuser: Engine, settings: Settings, clock: TurnedClock, acme: Registered
) -> None:
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(acme.tenant.id) as tx:
        sessions.start(tx, acme.owner, tokens=tokens, now=clock())
    clock.now += sessions.FAMILY_LIFETIME + KEPT
    tidy(store, clock)
    assert len(rows_of(superuser, "SELECT 1 FROM sessions")) == 1
    clock.now += DAY
    tidy(store, clock)
    assert rows_of(superuser, "SELECT 1 FROM sessions") == []


# Secrets -----------------------------------------------------------------------------------------


def sealed(superuser: Engine) -> list[tuple[str, str]]:
    query = "SELECT last4, sealed FROM webhook_secrets ORDER BY expires_at DESC NULLS FIRST"
    return [(row.last4, row.sealed) for row in rows_of(superuser, query)]


@pytest.fixture
def rotated(settings: Settings, test_database: TestDatabase, store: Store) -> Iterator[Store]:
    """The store after a new encryption key was put before the old one."""
    new = Keyring.parse(new_keyring("new"))
    store_with_both = Store(Vault(Keyring({**new.keys, **settings.encryption_keys.keys})), connections=2)
    store_with_both.open(test_database.app_url)
    yield store_with_both
    store_with_both.close()


def test_secrets_under_an_old_encryption_key_are_resealed_and_still_open(
    store: Store, rotated: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    with store.tenant(acme.tenant.id) as tx:
        tx.webhooks.retire_secrets(clock(), expires_at=clock() + HOUR)
        tx.webhooks.add_secret("whsec_" + "AAAA" * 8, clock())
        before = tx.webhooks.signing_secrets(clock())
    was_sealed = sealed(superuser)
    tidy(rotated, clock)

    assert before[1] == acme.webhook_secret
    now_sealed = sealed(superuser)
    assert [last4 for last4, _ in now_sealed] == [last4 for last4, _ in was_sealed]
    assert all(text.startswith("new:") for _, text in now_sealed)
    with rotated.tenant(acme.tenant.id) as tx:
        assert tx.webhooks.signing_secrets(clock()) == before
    with store.tenant(acme.tenant.id) as tx, pytest.raises(Unreadable):
        tx.webhooks.signing_secrets(clock())


def test_a_new_secret_signs_although_the_previous_one_is_unreadable(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    new = "whsec_" + "AAAA" * 8
    with superuser.begin() as connection:
        connection.execute(text("UPDATE webhook_secrets SET sealed = 'gone:' || sealed"))
    with store.tenant(acme.tenant.id) as tx:
        tx.webhooks.retire_secrets(clock(), expires_at=clock() + HOUR)
        tx.webhooks.add_secret(new, clock())
        assert tx.webhooks.signing_secrets(clock()) == [new]


def test_an_unreadable_secret_does_not_keep_other_old_data(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    old = deliver(store, acme, clock, age=KEPT + HOUR, status="delivered")
    with superuser.begin() as connection:
        connection.execute(text("UPDATE webhook_secrets SET sealed = 'gone:' || sealed"))
    clock.now += TIDIED_EVERY
    with pytest.raises(Unreadable):
        tidy(store, clock)
    assert rows_of(superuser, "SELECT FROM deliveries WHERE event_id = :id", id=old) == []


def test_secrets_under_the_current_key_are_left_alone(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    before = sealed(superuser)
    clock.now += TIDIED_EVERY
    tidy(store, clock)
    assert sealed(superuser) == before


def test_an_expired_secret_is_deleted(
    store: Store, superuser: Engine, clock: TurnedClock, acme: Registered
) -> None:
    clock.now += TIDIED_EVERY
    with store.tenant(acme.tenant.id) as tx:
        tx.webhooks.retire_secrets(clock(), expires_at=clock() + DAY)
        tx.webhooks.add_secret("whsec_" + "AAAA" * 8, clock())
    tidy(store, clock)
    assert len(sealed(superuser)) == 2
    clock.now += DAY
    tidy(store, clock)
    assert [last4 for last4, _ in sealed(superuser)] == ["AAAA"]


# Keys about to expire ----------------------------------------------------------------------------


def regenerate(
    store: Store, acme: Registered, digests: KeyDigests, clock: TurnedClock, grace: timedelta
) -> None:
    with store.tenant(acme.tenant.id, exclusive=True) as tx:
        keys.regenerate(tx, "live", grace=grace, digests=digests, now=clock())


def announce(store: Store, clock: TurnedClock) -> int:
    tasks = due(store, clock, EXPIRING)
    for task in tasks:
        Housekeeping(store, clock).announce_expiry(task)
    return len(tasks)


def announced(superuser: Engine) -> int:
    return len(rows_of(superuser, "SELECT 1 FROM events WHERE type = 'api_key.expiring'"))


def test_a_worker_that_lost_its_task_announces_nothing(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, HOUR)
    clock.now += HOUR / 2
    late = due(store, clock, EXPIRING)
    clock.now += LEASE
    assert announce(store, clock) == 2
    for task in late:
        Housekeeping(store, clock).announce_expiry(task)
    assert announced(superuser) == 2


@pytest.mark.parametrize(
    ("grace", "before"),
    [
        (timedelta(days=7), timedelta(hours=24)),
        (timedelta(hours=48), timedelta(hours=24)),
        (timedelta(hours=1), timedelta(minutes=30)),
        (timedelta(seconds=2), timedelta(seconds=1)),
    ],
)
def test_key_expiry_is_announced_once_and_in_time(
    store: Store,
    superuser: Engine,
    digests: KeyDigests,
    clock: TurnedClock,
    acme: Registered,
    grace: timedelta,
    before: timedelta,
) -> None:
    regenerate(store, acme, digests, clock, grace)
    clock.now += grace - before - timedelta(milliseconds=1)
    assert announce(store, clock) == 0
    clock.turn(milliseconds=1)
    assert announce(store, clock) == 2
    assert announced(superuser) == 2
    clock.now += DAY
    assert announce(store, clock) == 0
    assert announced(superuser) == 2


def test_no_expiry_event_without_a_grace_period(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, timedelta())
    clock.now += 30 * DAY
    assert announce(store, clock) == 0


def test_no_expiry_event_for_a_revoked_key(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, 2 * DAY)
    with store.tenant(acme.tenant.id, exclusive=True) as tx:
        keys.revoke(tx, "live", reason=None, now=clock())
    clock.now += DAY
    assert announce(store, clock) == 2
    assert announced(superuser) == 0


def test_no_expiry_event_for_a_key_being_revoked(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, 2 * DAY)
    clock.now += DAY
    tasks = due(store, clock, EXPIRING)
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(acme.tenant.id, exclusive=True) as tx:
            keys.revoke(tx, "live", reason=None, now=clock())
            announcing = pool.submit(Housekeeping(store, clock).announce_expiry, tasks[0])
            while not announcing.done() and not waits_for_a_lock(superuser):
                time.sleep(0.005)
        announcing.result(10)
    assert announced(superuser) == 0


def test_no_expiry_event_for_a_key_that_expired_early(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, 2 * DAY)
    regenerate(store, acme, digests, clock, timedelta())
    clock.now += DAY
    assert announce(store, clock) == 2
    assert announced(superuser) == 0


def test_no_expiry_event_once_the_key_has_expired(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock, acme: Registered
) -> None:
    regenerate(store, acme, digests, clock, 2 * DAY)
    clock.now += 2 * DAY
    assert announce(store, clock) == 2
    assert announced(superuser) == 0
