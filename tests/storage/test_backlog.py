"""The backlog of all tenants together: counts and ages for monitoring, and no tenant's rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, exc, text

from billing import tenants
from billing.actors import Actor
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.tasks import LEASE, Depth

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
SOON = NOW + timedelta(seconds=90)
NOTHING = Depth(0, 0.0)


def register(store: Store, settings: Settings, name: str, *, actor: Actor | None = None) -> UUID:
    """A tenant with an endpoint, to which the event of its registration is due now."""
    details = {
        "company_name": name,
        "email": f"ada@{name}.example",
        "webhook_url": f"https://hooks.{name}.example/",
    }
    with store.tenant(new_id(), actor or Actor("anonymous")) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def test_an_empty_backlog_has_zero_depths(store: Store) -> None:
    backlog = store.backlog(NOW)
    assert backlog.queues == dict.fromkeys(("general", "checks", "webhooks", "slow_webhooks"), NOTHING)
    assert backlog.outbox == dict.fromkeys(("working", "failing", "disabled"), NOTHING)


def test_due_tasks_are_counted_over_all_tenants(store: Store, settings: Settings) -> None:
    for name in ("acme", "globex"):
        register(store, settings, name)
    assert store.backlog(SOON).queues["webhooks"] == Depth(2, 90.0)
    store.take_due("webhooks", SOON, most=1)
    assert store.backlog(SOON).queues["webhooks"].number == 1, "one is held"
    assert store.backlog(SOON + LEASE).queues["webhooks"].number == 2, "the lease has ended"


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("url = url", "working"),
        ("failing_since = now()", "failing"),
        ("disabled_reason = 'failing'", "disabled"),
        ("url = NULL", "disabled"),
    ],
)
def test_the_outbox_is_grouped_by_the_endpoints_state(
    store: Store, settings: Settings, superuser: Engine, change: str, state: str
) -> None:
    register(store, settings, "acme")
    with superuser.begin() as connection:
        connection.execute(text(f"UPDATE webhook_endpoints SET {change}"))
    outbox = store.backlog(SOON).outbox
    assert outbox[state] == Depth(1, 90.0)
    assert [depth for name, depth in outbox.items() if name != state] == [NOTHING, NOTHING]


def test_a_delivery_not_yet_due_is_counted_with_age_zero(store: Store, settings: Settings) -> None:
    register(store, settings, "acme")
    assert store.backlog(NOW - timedelta(seconds=1)).outbox["working"] == Depth(1, 0.0)


def test_another_role_may_not_query_the_backlog(superuser: Engine) -> None:
    role = f"somebody_{new_id().hex}"
    with superuser.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA app TO {role}")
        connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
        with pytest.raises(exc.ProgrammingError, match="permission denied for function backlog"):
            connection.exec_driver_sql("SELECT * FROM app.backlog(now(), ARRAY['general'])")
        connection.rollback()


def test_a_delivery_keeps_the_id_of_the_request_that_caused_it(store: Store, settings: Settings) -> None:
    actor = Actor("anonymous", request_id="of-acme-who-registers")
    with store.tenant(register(store, settings, "acme", actor=actor)) as tx:
        [begun] = tx.deliveries.begin(NOW, types=None, most=1)
    assert begun.request_id == "of-acme-who-registers"
