"""Recorded events: as documented, numbered without a gap, atomic with their change, and free of secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from jsonschema_rs import Draft202012Validator
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from billing import keys, sessions, stripe_connect, tenants
from billing.housekeeping import Housekeeping
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store, TenantTx
from billing.stripe_connect import Account as StripeAccount
from billing.stripe_connect import Connected, Connection, Grant
from billing.tenants import Registered
from billing.tokens import Tokens
from billing.webhooks import endpoints
from billing.webhooks.events import EventType
from tests.answers import COMPONENTS
from tests.clock import TurnedClock
from tests.conftest import PASSWORD, Account, register
from tests.webhooks.test_events import content

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
URL = "https://hooks.acme.example/billing"
# The patterns of all credentials: keys, webhook secrets, tokens, and hashes of passwords.
SECRET = re.compile(r"[sp]k_(live|test)_[0-9A-Za-z]{38}|whsec_|eyJ[A-Za-z0-9_-]{10}|\$2[aby]\$")


def rows_of(superuser: Engine, table: str, tenant_id: object) -> list[Any]:
    order = {"events": "sequence", "tasks": "kind, id"}.get(table, "id")
    query = text(f"SELECT * FROM {table} WHERE tenant_id = :id ORDER BY {order}")
    with superuser.connect() as connection:
        return list(connection.execute(query, {"id": tenant_id}).all())


def recorded(superuser: Engine, tenant_id: object) -> list[dict[str, Any]]:
    """The tenant's events in order, each checked against the document; their sequence has no gap."""
    rows = rows_of(superuser, "events", tenant_id)
    bodies = [read(row.type, bytes(row.body)) for row in rows]
    for row, body in zip(rows, bodies, strict=True):
        assert (body["id"], body["type"], body["sequence"]) == (str(row.id), row.type, row.sequence)
        assert body["tenant_id"] == str(tenant_id)
        assert datetime.fromisoformat(body["created_at"]) == row.created_at
        assert not SECRET.search(json.dumps(body))
    assert [body["sequence"] for body in bodies] == list(range(1, len(bodies) + 1))
    return bodies


def read(type: str, body: bytes) -> dict[str, Any]:
    """An event's body, checked against the document."""
    said: dict[str, Any] = json.loads(body)
    schema = {**content(type)["schema"], "components": COMPONENTS}
    Draft202012Validator(schema, validate_formats=True).validate(said)
    return said


def short(bodies: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [(body["type"], body["livemode"]) for body in bodies]


# Through the API ---------------------------------------------------------------------------------


@pytest.fixture
def acme(client: TestClient) -> Account:
    """A tenant registered with a webhook."""
    return Account(client, register(client, webhook_url=URL).json())


def test_registering_records_an_event(acme: Account, superuser: Engine) -> None:
    [event] = recorded(superuser, acme.tenant["id"])
    assert (event["type"], event["livemode"]) == ("tenant.registered", True)
    public = ("id", "company_name", "slug", "is_active", "created_at")
    assert event["data"] == {"tenant": {name: acme.tenant[name] for name in public}}
    [delivery] = rows_of(superuser, "deliveries", acme.tenant["id"])
    assert (str(delivery.event_id), delivery.status, delivery.attempts) == (event["id"], "pending", 0)


def test_changing_the_password_records_an_event(acme: Account, superuser: Engine) -> None:
    body = {"old_password": PASSWORD, "new_password": "NewSecurePassword456!"}
    assert acme.post("/change-password/", body).status_code == 200
    event = recorded(superuser, acme.tenant["id"])[-1]
    assert (event["type"], event["livemode"]) == ("user.password_changed", True)
    assert event["data"] == {"user_id": acme.registered["user"]["id"], "email": acme.email}
    assert not {PASSWORD, body["new_password"]} & set(json.dumps(event).split('"'))


@pytest.mark.parametrize(("selection", "livemode"), [("live", True), ("test", False), ("all", True)])
def test_regenerating_keys_records_an_event(
    acme: Account, superuser: Engine, selection: str, livemode: bool
) -> None:
    answer = acme.regenerate(selection, grace_period_seconds=60)
    event = recorded(superuser, acme.tenant["id"])[-1]
    assert (event["type"], event["livemode"]) == ("api_key.regenerated", livemode)
    assert event["data"]["key_type"] == selection
    assert {key["last4"]: key["expires_at"] for key in event["data"]["previous"]} == {
        key["last4"]: key["expires_at"] for key in answer["previous"]
    }


@pytest.mark.parametrize(("selection", "livemode"), [("live", True), ("test", False), ("all", True)])
@pytest.mark.parametrize("reason", ["leaked", None])
def test_revoking_keys_records_an_event(
    acme: Account, superuser: Engine, selection: str, livemode: bool, reason: str | None
) -> None:
    answer = acme.revoke(selection, **({"reason": reason} if reason else {}))
    event = recorded(superuser, acme.tenant["id"])[-1]
    assert (event["type"], event["livemode"]) == ("api_key.revoked", livemode)
    assert event["data"] == {
        "key_type": selection,
        "revoked_keys": answer["revoked_keys"],
        "reason": reason,
    }


def test_revoking_revoked_keys_records_no_event(acme: Account, superuser: Engine) -> None:
    acme.revoke("all")
    before = recorded(superuser, acme.tenant["id"])
    acme.revoke("all")
    assert recorded(superuser, acme.tenant["id"]) == before


def test_refused_requests_record_no_event(acme: Account, superuser: Engine) -> None:
    before = recorded(superuser, acme.tenant["id"])
    acme.post("/change-password/", {"old_password": "wrong", "new_password": "NewSecurePassword456!"})
    acme.post("/api-keys/regenerate/", {"key_type": "live", "confirm": False})
    acme.post("/webhooks/config/", {"webhook_url": "https://127.0.0.1/"})
    acme.post("/webhooks/config/", {"webhook_url": f"{URL}/2", "regenerate_secret": True})
    assert recorded(superuser, acme.tenant["id"]) == before


# Every type, atomically --------------------------------------------------------------------------


@dataclass
class Bench:
    """A tenant, and what it takes to trigger each of its events."""

    store: Store
    tokens: Tokens
    digests: KeyDigests
    made: Registered
    connection: Connection

    @property
    def tenant_id(self) -> Any:
        return self.made.tenant.id

    @property
    def account(self) -> StripeAccount:
        return self.connection.account


@pytest.fixture
def bench(store: Store, settings: Settings) -> Bench:
    tokens, digests = Tokens(settings.jwt_keys, settings.public_base_url), KeyDigests(settings.key_peppers)
    details = {"company_name": "Acme", "email": "ada@acme.example", "webhook_url": URL}
    with store.tenant(new_id()) as tx:
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)
    with store.tenant(made.tenant.id) as tx:
        keys.regenerate(tx, "test", grace=timedelta(days=7), digests=digests, now=NOW)
        account = StripeAccount("acct_1AcmeExample")
        grant = Grant(account.id, "read_write", livemode=False)
        connected = stripe_connect.connect(tx, grant, account, livemode=False, now=NOW)
    assert isinstance(connected, Connected)
    return Bench(store, tokens, digests, made, connected.connection)


def reconnect(tx: TenantTx, b: Bench) -> None:
    stripe_connect.disconnect(tx, now=NOW)
    grant = Grant(b.account.id, "read_write", livemode=False)
    stripe_connect.connect(tx, grant, b.account, livemode=False, now=NOW)


def update_account(tx: TenantTx, b: Bench) -> None:
    better = StripeAccount(b.account.id, charges_enabled=True, payouts_enabled=True, details_submitted=True)
    stripe_connect.note(tx, b.connection, better, asked_at=NOW + timedelta(1), now=NOW + timedelta(1))


def announce_expiry(tx: TenantTx, _: Bench) -> None:
    [key, *_rest] = [key for key in tx.api_keys.living(NOW, keys.TYPES) if key.expires_at is not None]
    keys.announce_expiry(tx, key.id, now=NOW)


def change_password(tx: TenantTx, b: Bench) -> None:
    sessions.change_password(tx, b.made.owner, "new", tokens=b.tokens, now=NOW)


# The type of the event that each act records last, with its livemode.
Act = Callable[[TenantTx, Bench], object]
ACTS: dict[str, tuple[Act, bool]] = {
    "user.password_changed": (change_password, True),
    "api_key.regenerated": (
        lambda tx, b: keys.regenerate(tx, "live", grace=timedelta(1), digests=b.digests, now=NOW),
        True,
    ),
    "api_key.revoked": (lambda tx, _: keys.revoke(tx, "test", reason=None, now=NOW), False),
    "api_key.expiring": (announce_expiry, False),
    "stripe.account.connected": (reconnect, False),
    "stripe.account.updated": (update_account, False),
    "stripe.account.disconnected": (lambda tx, _: stripe_connect.disconnect(tx, now=NOW), False),
    "webhook.disabled": (
        lambda tx, _: endpoints.disable(tx, tx.webhooks.find(lock=True), "gone", now=NOW),
        True,
    ),
}


def test_every_event_type_has_an_act() -> None:
    assert ACTS.keys() | {"tenant.registered", "webhook.test"} == {*get_args(EventType)}


@pytest.mark.parametrize("type", ACTS)
def test_each_act_records_its_event_as_documented(bench: Bench, superuser: Engine, type: str) -> None:
    act, livemode = ACTS[type]
    before = recorded(superuser, bench.tenant_id)
    with bench.store.tenant(bench.tenant_id) as tx:
        act(tx, bench)
    events = recorded(superuser, bench.tenant_id)
    assert events[: len(before)] == before
    assert short(events)[-1] == (type, livemode)


def test_a_test_event_is_stored_without_its_body(bench: Bench, superuser: Engine) -> None:
    with bench.store.tenant(bench.tenant_id) as tx:
        event = tx.events.keep_test("invoice.paid", {"paid": 7}, now=NOW)
    assert read("webhook.test", event.body)["data"] == {"paid": 7}
    row = rows_of(superuser, "events", bench.tenant_id)[-1]
    assert (row.id, row.sequence, row.type, row.is_test) == (event.id, event.sequence, "invoice.paid", True)
    assert bytes(row.body) == b""


@pytest.mark.parametrize("type", ACTS)
def test_a_rolled_back_act_records_nothing(bench: Bench, superuser: Engine, type: str) -> None:
    tables = ("events", "deliveries", "tasks")
    before = [rows_of(superuser, table, bench.tenant_id) for table in tables]
    with pytest.raises(ZeroDivisionError), bench.store.tenant(bench.tenant_id) as tx:
        ACTS[type][0](tx, bench)
        raise ZeroDivisionError
    assert [rows_of(superuser, table, bench.tenant_id) for table in tables] == before


def test_a_rolled_back_registration_records_nothing(bench: Bench, superuser: Engine) -> None:
    details = {"company_name": "Globex", "email": "ada@globex.example", "webhook_url": URL}
    tenant_id = new_id()
    with pytest.raises(ZeroDivisionError), bench.store.tenant(tenant_id) as tx:
        tenants.register(tx, details, password_hash="-", digests=bench.digests, now=NOW)
        raise ZeroDivisionError
    assert [rows_of(superuser, table, tenant_id) for table in ("events", "deliveries", "tasks")] == [
        [],
        [],
        [],
    ]


def test_every_event_but_a_test_has_one_delivery(bench: Bench, superuser: Engine) -> None:
    # Disabling comes last: after it no event has a delivery.
    for act, _ in sorted(ACTS.values(), key=lambda one: one is ACTS["webhook.disabled"]):
        with bench.store.tenant(bench.tenant_id) as tx:
            act(tx, bench)
    with bench.store.tenant(bench.tenant_id) as tx:
        tx.events.keep_test("webhook.test", {}, now=NOW)
    events = rows_of(superuser, "events", bench.tenant_id)
    listened = {event.id for event in events if event.type != "webhook.test"}
    deliveries = rows_of(superuser, "deliveries", bench.tenant_id)
    assert {delivery.event_id for delivery in deliveries} == listened
    assert len(deliveries) == len(listened)
    assert {(one.status, one.next_attempt_at - one.created_at) for one in deliveries} == {
        ("pending", timedelta(0))
    }


def test_an_expiring_keys_event_has_the_keys_livemode(bench: Bench, superuser: Engine) -> None:
    clock = TurnedClock()
    clock.now = NOW + timedelta(days=6)
    house = Housekeeping(bench.store, clock)
    due = [one for one in bench.store.take_due("general", clock.now, most=100) if one.kind == keys.EXPIRING]
    for task in due:
        house.announce_expiry(task)
    expiring = [
        event for event in recorded(superuser, bench.tenant_id) if event["type"] == "api_key.expiring"
    ]
    assert {(event["data"]["type"], event["livemode"]) for event in expiring} == {
        ("test_public", False),
        ("test_secret", False),
    }
