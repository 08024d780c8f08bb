"""Operations 15–18 (webhooks), by status."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from app import create_app
from billing import deliveries, logs
from billing.counters import InProcess
from billing.ids import new_id
from billing.settings import Settings
from billing.storage.store import Store
from billing.webhooks.delivery import Delivery
from billing.webhooks.egress import Egress
from billing.webhooks.endpoints import Endpoint, disable
from tests.clock import TurnedClock
from tests.conftest import API, Account, CheckedClient, bearer, register
from tests.receivers import Names, Receiver, Visit, answers, hangs, head, receiving, resets
from tests.test_logs import restored

__all__ = ["restored"]

CONFIG, TEST = f"{API}/webhooks/config/", f"{API}/webhooks/test/"
URL = "https://hooks.acme.example/billing"
FORM = "application/x-www-form-urlencoded"
DAY = 86400
# The timeout of a delivery in these tests: ample for a responsive receiver on a busy machine.
PATIENCE_SECONDS = 3.0


# An app that may call loopback -------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_app(
    settings: Settings, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    loopback = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    opened = replace(settings, webhook_allow_cidrs=loopback, webhook_allow_http=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deliveries, "Egress", partial(Egress, total_seconds=PATIENCE_SECONDS))
        app = create_app(opened, clock=shared_clock, counters=shared_counters)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def local(open_app: TestClient, clock: TurnedClock, uncounted: None, clean: None) -> Account:
    """A tenant of a server that calls loopback by the name `localhost`."""
    open_app.cookies.clear()
    return Account(open_app, register(open_app).json())


def url_of(receiver: Receiver) -> str:
    return f"http://localhost:{receiver.port}/in"


# An admin's actions ------------------------------------------------------------------------------


def configure(account: Account, url: str = URL, **more: Any) -> dict[str, Any]:
    answer = account.post("/webhooks/config/", {"webhook_url": url, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def config(account: Account) -> dict[str, Any]:
    answer = account.get("/webhooks/config/")
    assert answer.status_code == 200
    return answer.json()


def remove(account: Account) -> httpx.Response:
    return account.client.delete(CONFIG, headers=bearer(account.tokens["access"]))


def send_test(account: Account, **asked: Any) -> dict[str, Any]:
    given = {"json": asked} if asked else {}
    answer = account.client.post(TEST, headers=bearer(account.tokens["access"]), **given)
    assert answer.status_code == 200, answer.text
    return answer.json()


def secret_of(account: Account) -> str:
    """The secret shown at registration."""
    return str(account.tenant["webhook_secret"])


def masked(secret: str) -> str:
    return f"whsec_****...{secret[-4:]}"


# What is stored ----------------------------------------------------------------------------------


def rows_of(superuser: Engine, query: str, **values: Any) -> list[Any]:
    with superuser.connect() as connection:
        return list(connection.execute(text(query), values).all())


def audited(superuser: Engine) -> list[str]:
    query = "SELECT action FROM audit_log WHERE action LIKE 'webhook.%' ORDER BY sequence"
    return [row.action for row in rows_of(superuser, query)]


def stored_rows(superuser: Engine) -> list[list[Any]]:
    tables = ("tenants", "webhook_endpoints", "webhook_secrets", "deliveries", "tasks", "audit_log")
    return [rows_of(superuser, f"SELECT t::text FROM {table} t ORDER BY 1") for table in tables]


def at(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# configure ---------------------------------------------------------------------------------------


def test_configure_sets_the_url_without_showing_the_existing_secret(
    acme: Account, superuser: Engine, clock: TurnedClock
) -> None:
    clock.turn(minutes=1)
    answer = configure(acme)
    assert answer == {
        "message": answer["message"],
        "webhook_url": URL,
        "event_types": [],
        "status": "active",
        "previous_secret_expires_at": None,
        "test_url": f"http://testserver{TEST}",
    }
    tenant = acme.get("/details/").json()["tenant"]
    assert (tenant["webhook_url"], tenant["updated_at"]) == (URL, at(clock.now))
    assert audited(superuser) == ["webhook.configured"]
    [row] = rows_of(superuser, "SELECT * FROM audit_log WHERE action = 'webhook.configured'")
    assert str(row.actor_id) == acme.registered["user"]["id"]


def test_configuring_the_same_again_changes_nothing(
    acme: Account, superuser: Engine, clock: TurnedClock
) -> None:
    body = {"event_types": ["api_key.revoked"], "regenerate_secret": False}
    first = configure(acme, **body)
    before = stored_rows(superuser)
    clock.turn(minutes=1)
    assert configure(acme, **body) == first
    assert configure(acme) == first
    assert stored_rows(superuser) == before


def test_another_url_replaces_the_first(acme: Account, superuser: Engine) -> None:
    configure(acme)
    assert configure(acme, f"{URL}/2")["webhook_url"] == f"{URL}/2"
    assert config(acme)["webhook_url"] == f"{URL}/2"
    assert audited(superuser) == ["webhook.configured"] * 2


def test_omitted_event_types_are_kept_and_an_empty_list_means_all(acme: Account) -> None:
    some = ["api_key.regenerated", "api_key.revoked"]
    assert configure(acme)["event_types"] == []
    assert configure(acme, event_types=some)["event_types"] == some
    assert configure(acme, f"{URL}/2")["event_types"] == some
    remove(acme)
    assert config(acme)["event_types"] == some
    assert configure(acme)["event_types"] == some
    assert configure(acme, event_types=[])["event_types"] == []
    assert config(acme)["event_types"] == []


def test_a_new_secret_is_shown_once_and_the_old_one_stays_valid_a_day(
    acme: Account, clock: TurnedClock, superuser: Engine
) -> None:
    answer = configure(acme, regenerate_secret=True)
    new = answer["webhook_secret"]
    assert new != secret_of(acme)
    assert answer["warning"]
    end = at(clock.now + timedelta(seconds=DAY))
    assert answer["previous_secret_expires_at"] == end
    shown = config(acme)
    assert (shown["webhook_secret"], shown["previous_secret_expires_at"]) == (masked(new), end)
    assert "webhook_secret" not in configure(acme)
    assert "warning" not in configure(acme)
    [row] = rows_of(superuser, "SELECT details FROM audit_log WHERE action = 'webhook.configured'")
    assert row.details == {"new_secret": True}


@pytest.mark.parametrize("seconds", [0, 1, 604800])
def test_the_grace_period_is_as_requested(acme: Account, clock: TurnedClock, seconds: int) -> None:
    answer = configure(acme, regenerate_secret=True, secret_grace_seconds=seconds)
    end = at(clock.now + timedelta(seconds=seconds)) if seconds else None
    assert answer["previous_secret_expires_at"] == end
    assert config(acme)["previous_secret_expires_at"] == end


def test_at_most_two_secrets_are_valid_at_a_time(
    acme: Account, clock: TurnedClock, superuser: Engine
) -> None:
    for _ in range(3):
        clock.turn(minutes=1)
        last = configure(acme, regenerate_secret=True)
    assert config(acme)["previous_secret_expires_at"] == at(clock.now + timedelta(seconds=DAY))
    living = "SELECT 1 FROM webhook_secrets WHERE expires_at IS NULL OR expires_at > :now"
    assert len(rows_of(superuser, living, now=clock.now)) == 2
    assert config(acme)["webhook_secret"] == masked(last["webhook_secret"])


def test_configuring_enables_a_disabled_webhook_and_keeps_pending_deliveries(
    acme: Account, store: Store, clock: TurnedClock, superuser: Engine
) -> None:
    configure(acme)
    acme.revoke("test")
    with store.tenant(acme.tenant["id"]) as tx:
        failing = replace(tx.webhooks.find(lock=True), failing_since=clock.now, failed_events=10)
        disable(tx, failing, "failing", now=clock.now)
    shown = config(acme)
    assert (shown["status"], shown["disabled_reason"]) == ("disabled", "failing")
    assert shown["failing_since"] == at(clock.now)
    assert shown["stats"]["pending"] == 2
    rows_before = rows_of(superuser, "SELECT id, status FROM deliveries ORDER BY id")

    assert configure(acme)["status"] == "active"
    shown = config(acme)
    assert (shown["status"], shown["disabled_reason"], shown["failing_since"]) == ("active", None, None)
    assert rows_of(superuser, "SELECT id, status FROM deliveries ORDER BY id") == rows_before
    assert rows_of(superuser, "SELECT 1 FROM tasks WHERE kind = 'webhook.deliver'")


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.acme.example/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://[::1]/",
        "https://localhost/",
        "https://vault.internal/",
        "https://printer.local/",
        "https://intranet/",
        "https://hooks.acme.example:8080/",
        "https://ada:hunter2@hooks.acme.example/",
        "https://hooks.acme.example/#top",
        "https://hooks.acme.example\\@127.0.0.1/",
    ],
)
def test_422_for_a_url_that_is_not_allowed(acme: Account, superuser: Engine, url: str) -> None:
    configure(acme)
    before = stored_rows(superuser)
    answer = acme.post("/webhooks/config/", {"webhook_url": url, "regenerate_secret": True})
    assert (answer.status_code, answer.json()["code"]) == (422, "webhook-url-refused")
    assert url not in answer.text
    assert "hunter2" not in answer.text
    assert stored_rows(superuser) == before


def test_configure_accepts_an_unknown_host_without_resolving_it(
    acme: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names({})
    monkeypatch.setattr(socket, "getaddrinfo", names)
    assert configure(acme, "https://not-yet.acme.example/")["status"] == "active"
    assert names.looked_up == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"webhook_url": None},
        {"webhook_url": ""},
        {"webhook_url": "hooks.acme.example"},
        {"webhook_url": "ftp://hooks.acme.example/"},
        {"webhook_url": "https://hooks.acme.example/ x"},
        {"webhook_url": "https://hooks.acme.example/\0"},
        {"webhook_url": f"{URL}/{'x' * 2048}"},
        {"webhook_url": URL, "regenerate_secret": "yes"},
        {"webhook_url": URL, "secret_grace_seconds": -1},
        {"webhook_url": URL, "secret_grace_seconds": 604801},
        {"webhook_url": URL, "event_types": ["invoice.paid"]},
        {"webhook_url": URL, "event_types": ["webhook.test", "webhook.test"]},
        {"webhook_url": URL, "event_types": None},
        {"webhook_url": URL, "webhook_secret": "whsec_mine"},
        [],
    ],
)
def test_configure_400_for_an_invalid_body(acme: Account, superuser: Engine, body: Any) -> None:
    before = stored_rows(superuser)
    assert acme.post("/webhooks/config/", body).status_code == 400
    assert stored_rows(superuser) == before


# roles and tenants -------------------------------------------------------------------------------


def statuses(account: Account, headers: dict[str, str]) -> list[int]:
    request = account.client.request
    return [
        request("GET", CONFIG, headers=headers).status_code,
        request("POST", CONFIG, headers=headers, json={"webhook_url": URL}).status_code,
        request("DELETE", CONFIG, headers=headers).status_code,
        request("POST", TEST, headers=headers).status_code,
    ]


def test_401_without_a_session_and_403_for_keys(acme: Account) -> None:
    assert statuses(acme, {}) == [401] * 4
    assert statuses(acme, bearer("not.a.token")) == [401] * 4
    for name in ("api_key_secret", "api_key_test_secret", "api_key_public"):
        assert statuses(acme, {"X-API-Key": acme.tenant[name]}) == [401] * 4
        assert statuses(acme, bearer(acme.tenant[name])) == [403] * 4


@pytest.mark.parametrize(
    ("role", "expected"),
    [("owner", [200, 200, 200, 409]), ("admin", [200, 200, 200, 409]), ("developer", [403] * 4)],
)
def test_allowed_operations_by_role(
    acme: Account, superuser: Engine, role: str, expected: Sequence[int]
) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET role = :role"), {"role": role})
    assert statuses(acme, bearer(acme.tokens["access"])) == expected


def test_each_tenant_has_its_own_webhook(acme: Account, globex: Account) -> None:
    configure(acme, regenerate_secret=True, event_types=["api_key.revoked"])
    acme.revoke("test")
    shown = config(globex)
    assert (shown["webhook_url"], shown["event_types"], shown["recent_deliveries"]) == (None, [], [])
    assert shown["webhook_secret"] == masked(secret_of(globex))
    remove(globex)
    assert config(acme)["webhook_url"] == URL
    assert config(acme)["stats"]["pending"] == 1


# get ---------------------------------------------------------------------------------------------


def test_get_without_a_url_returns_every_member(acme: Account) -> None:
    shown = config(acme)
    assert shown == {
        "webhook_url": None,
        "webhook_secret": masked(secret_of(acme)),
        "configured": False,
        "event_types": [],
        "status": "disabled",
        "disabled_reason": None,
        "failing_since": None,
        "previous_secret_expires_at": None,
        "stats": {"delivered_24h": 0, "failed_24h": 0, "pending": 0},
        "recent_deliveries": [],
        "instructions": shown["instructions"],
    }
    assert shown["instructions"]["signature_header"] == "webhook-signature"
    assert shown["instructions"]["documentation"] == "http://testserver/docs/"


def test_a_url_given_at_registration_is_configured(client: TestClient) -> None:
    acme = Account(client, register(client, webhook_url=URL).json())
    shown = config(acme)
    assert (shown["configured"], shown["webhook_url"], shown["status"]) == (True, URL, "active")
    [delivery] = shown["recent_deliveries"]
    assert (delivery["event_type"], delivery["status"]) == ("tenant.registered", "pending")


def add_deliveries(store: Store, account: Account, clock: TurnedClock, number: int = 1, **given: Any) -> None:
    """Store deliveries of one event each, with this outcome."""
    with store.tenant(account.tenant["id"]) as tx:
        for _ in range(number):
            event = tx.events.keep_test("webhook.test", {}, now=clock.now)
            values = {"status": "delivered", "attempts": 1, "next_attempt_at": None, "http_status": 204}
            values |= {"error": None, "duration_ms": 87, "settled_at": clock.now} | given
            tx.deliveries.add(Delivery(new_id(), event.id, event.type, created_at=event.created_at, **values))


def test_get_shows_at_most_20_deliveries_newest_first(
    acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    configure(acme)
    add_deliveries(store, acme, clock, 25)
    ids = [str(row.id) for row in rows_of(superuser, "SELECT id FROM deliveries ORDER BY id DESC")]
    shown = config(acme)["recent_deliveries"]
    assert [one["id"] for one in shown] == ids[:20]
    assert shown[0] == {
        "id": ids[0],
        "event_type": "webhook.test",
        "status": "delivered",
        "attempts": 1,
        "http_status": 204,
        "error": None,
        "duration_ms": 87,
        "next_attempt_at": None,
        "created_at": at(clock.now),
    }


def test_get_counts_deliveries_settled_within_a_day_and_pending_ones(
    acme: Account, store: Store, clock: TurnedClock
) -> None:
    configure(acme)
    waiting = {"status": "pending", "next_attempt_at": clock.now, "settled_at": None}
    add_deliveries(store, acme, clock, 3)
    add_deliveries(store, acme, clock, 2, status="failed", http_status=None, error="timeout")
    add_deliveries(store, acme, clock, 4, **waiting)
    day = timedelta(days=1)
    add_deliveries(store, acme, clock, settled_at=clock.now - day)
    add_deliveries(store, acme, clock, settled_at=clock.now - day + timedelta(seconds=1))
    assert config(acme)["stats"] == {"delivered_24h": 4, "failed_24h": 2, "pending": 4}


def test_get_shows_failing_since(acme: Account, store: Store, clock: TurnedClock) -> None:
    configure(acme)
    since = clock.now - timedelta(hours=2)
    with store.tenant(acme.tenant["id"]) as tx:
        tx.webhooks.keep(Endpoint(URL, failing_since=since, failed_events=3), clock.now)
    shown = config(acme)
    assert (shown["failing_since"], shown["status"], shown["disabled_reason"]) == (at(since), "active", None)


# remove ------------------------------------------------------------------------------------------


def test_remove_cancels_pending_deliveries_and_keeps_the_secret(
    acme: Account, superuser: Engine, clock: TurnedClock
) -> None:
    configure(acme)
    acme.revoke("test")
    clock.turn(minutes=1)
    answer = remove(acme)
    assert answer.status_code == 200
    assert answer.json().keys() == {"message", "note"}
    shown = config(acme)
    assert (shown["webhook_url"], shown["configured"], shown["status"]) == (None, False, "disabled")
    assert shown["webhook_secret"] == masked(secret_of(acme))
    assert shown["stats"] == {"delivered_24h": 0, "failed_24h": 1, "pending": 0}
    [delivery] = shown["recent_deliveries"]
    assert (delivery["status"], delivery["error"], delivery["next_attempt_at"]) == (
        "failed",
        "cancelled",
        None,
    )
    tenant = acme.get("/details/").json()["tenant"]
    assert (tenant["webhook_url"], tenant["updated_at"]) == (None, at(clock.now))
    assert audited(superuser) == ["webhook.configured", "webhook.removed"]
    assert "webhook_secret" not in configure(acme)


def test_removing_again_changes_nothing(acme: Account, superuser: Engine, clock: TurnedClock) -> None:
    before = stored_rows(superuser)
    clock.turn(minutes=1)
    assert remove(acme).status_code == 200
    assert stored_rows(superuser) == before
    configure(acme)
    first = remove(acme).json()
    before = stored_rows(superuser)
    clock.turn(minutes=1)
    assert remove(acme).json() == first
    assert stored_rows(superuser) == before


def test_removing_a_disabled_webhook_clears_its_disabled_reason(
    acme: Account, store: Store, clock: TurnedClock
) -> None:
    configure(acme)
    with store.tenant(acme.tenant["id"]) as tx:
        disable(tx, tx.webhooks.find(lock=True), "gone", now=clock.now)
    assert config(acme)["disabled_reason"] == "gone"
    remove(acme)
    assert config(acme)["disabled_reason"] is None


# test --------------------------------------------------------------------------------------------


def test_send_test_409_without_a_url(acme: Account, superuser: Engine) -> None:
    answer = acme.post("/webhooks/test/", {})
    assert (answer.status_code, answer.json()["code"]) == (409, "webhook-not-configured")
    assert rows_of(superuser, "SELECT 1 FROM events WHERE type = 'webhook.test'") == []
    configure(acme)
    remove(acme)
    assert acme.post("/webhooks/test/", {}).status_code == 409


def test_a_test_is_delivered_and_reported(local: Account, superuser: Engine, clock: TurnedClock) -> None:
    with receiving(answers(200, b"thank you")) as receiver:
        configure(local, url_of(receiver))
        answer = local.post("/webhooks/test/", {})
    report = answer.json()
    assert report == {
        "message": "The receiver answered 200.",
        "success": True,
        "webhook_url": url_of(receiver),
        "status_code": 200,
        "response_time_ms": report["response_time_ms"],
        "response_body": "thank you",
        "error": None,
        "event_sent": "webhook.test",
    }
    [received] = receiver.received
    event = Webhook(secret_of(local)).verify(received.body, dict(received.headers))
    assert event == {
        "id": received.headers["webhook-id"],
        "type": "webhook.test",
        "api_version": event["api_version"],
        "created_at": at(clock.now),
        "tenant_id": local.tenant["id"],
        "livemode": False,
        "sequence": 2,
        "data": {},
    }
    [delivery] = config(local)["recent_deliveries"]
    assert (delivery["event_type"], delivery["status"], delivery["attempts"]) == (
        "webhook.test",
        "delivered",
        1,
    )
    assert (delivery["http_status"], delivery["duration_ms"]) == (200, report["response_time_ms"])
    assert config(local)["stats"] == {"delivered_24h": 1, "failed_24h": 0, "pending": 0}
    [row] = rows_of(superuser, "SELECT id, body, request_id FROM events WHERE is_test")
    assert (str(row.id), bytes(row.body)) == (event["id"], b"")
    assert row.request_id == answer.headers["x-request-id"]


def test_a_test_is_signed_with_both_secrets_during_a_rotation(local: Account) -> None:
    with receiving(answers()) as receiver:
        new = configure(local, url_of(receiver), regenerate_secret=True)["webhook_secret"]
        send_test(local)
    for secret in (new, secret_of(local)):
        assert Webhook(secret).verify(receiver.last.body, dict(receiver.last.headers))


@pytest.mark.parametrize(
    ("status", "success"), [(200, True), (204, True), (299, True), (302, False), (404, False), (500, False)]
)
def test_only_a_2xx_status_is_a_success(local: Account, status: int, success: bool) -> None:
    with receiving(answers()) as elsewhere:
        behave = answers(status, b"", Location=url_of(elsewhere))
        with receiving(behave) as receiver:
            configure(local, url_of(receiver))
            report = send_test(local)
    assert (report["success"], report["status_code"]) == (success, status)
    assert report["error"] == (None if success else "bad_status")
    assert elsewhere.received == []
    [delivery] = config(local)["recent_deliveries"]
    assert (delivery["status"], delivery["next_attempt_at"]) == ("delivered" if success else "failed", None)


def test_a_failed_test_is_not_retried_and_does_not_count_as_failing(
    local: Account, superuser: Engine
) -> None:
    with receiving(answers(410)) as receiver:
        configure(local, url_of(receiver))
        with superuser.begin() as connection:
            connection.execute(text("DELETE FROM tasks"))
        send_test(local)
    shown = config(local)
    assert (shown["status"], shown["failing_since"], shown["stats"]["failed_24h"]) == ("active", None, 1)
    assert rows_of(superuser, "SELECT 1 FROM tasks") == []
    assert len(receiver.received) == 1


def reads_without_answering(visit: Visit) -> None:
    visit.receive()
    visit.receiver.stopped.wait()


def test_a_hanging_receiver_is_reported_as_a_timeout(local: Account) -> None:
    with receiving(reads_without_answering) as receiver:
        configure(local, url_of(receiver))
        report = send_test(local)
    assert (report["success"], report["status_code"], report["error"]) == (False, None, "timeout")
    assert (report["message"], report["response_body"]) == ("The receiver did not answer in time.", "")
    assert report["response_time_ms"] >= PATIENCE_SECONDS * 1000 - 50


def test_a_reset_connection_is_reported_as_broken(local: Account) -> None:
    with receiving(resets) as receiver:
        configure(local, url_of(receiver))
        report = send_test(local)
    assert (report["status_code"], report["error"]) == (None, "connection_broken")


def test_an_invalid_http_status_is_reported_as_a_broken_connection(local: Account) -> None:
    with receiving(answers(999)) as receiver:
        configure(local, url_of(receiver))
        report = send_test(local)
    assert (report["status_code"], report["error"]) == (None, "connection_broken")
    assert config(local)["recent_deliveries"][0]["http_status"] is None


@pytest.mark.parametrize(
    "addresses",
    [[], ["10.0.0.1"], ["169.254.169.254"], ["93.184.216.34", "10.0.0.1"], ["::ffff:127.0.0.1"]],
    ids=["unknown", "private", "metadata", "one of two", "mapped"],
)
def test_a_refused_address_is_reported_as_a_failed_connection(
    acme: Account, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    configure(acme)
    monkeypatch.setattr(socket, "getaddrinfo", Names({"hooks.acme.example": addresses or ["unknown"]}))
    report = send_test(acme)
    assert (report["success"], report["status_code"], report["error"]) == (False, None, "connection_failed")
    assert (report["message"], report["response_body"]) == ("The receiver could not be reached.", "")


def test_a_closed_port_is_reported_as_a_failed_connection(local: Account) -> None:
    with receiving(answers()) as receiver:
        pass
    configure(local, url_of(receiver))
    assert send_test(local)["error"] == "connection_failed"


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"", ""),
        (b"x" * 501, "x" * 500),
        ("é".encode() * 600, "é" * 500),
        ("😀".encode() * 2000, "😀" * 500),
        (b"a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2),
        (b"\xed\xa0\x80", "\N{REPLACEMENT CHARACTER}" * 3),
    ],
)
def test_the_response_body_is_shown_as_text_cut_at_500_characters(
    local: Account, body: bytes, shown: str
) -> None:
    with receiving(answers(200, body)) as receiver:
        configure(local, url_of(receiver))
        assert send_test(local)["response_body"] == shown


@pytest.mark.parametrize("content_type", [None, FORM, "application/json", "text/plain"])
def test_send_test_accepts_an_empty_body_of_any_content_type(
    local: Account, content_type: str | None
) -> None:
    headers = bearer(local.tokens["access"]) | {"content-length": "0"}
    headers |= {"content-type": content_type} if content_type else {}
    with receiving(answers()) as receiver:
        configure(local, url_of(receiver))
        answer = local.client.post(TEST, headers=headers, content=b"")
    assert (answer.status_code, answer.json()["event_sent"]) == (200, "webhook.test")


def test_a_test_may_have_any_dotted_event_type_and_any_data(local: Account) -> None:
    data = {"invoice": {"lines": [1, 2.5, None, True]}, "name": "Zoë 🦉", "empty": {}}
    with receiving(answers()) as receiver:
        configure(local, url_of(receiver), event_types=["api_key.revoked"])
        assert send_test(local, event_type="invoice.paid_v2", test_data=data)["success"]
    event = json.loads(receiver.last.body)
    assert (event["type"], event["data"], event["livemode"]) == ("invoice.paid_v2", data, False)
    assert config(local)["recent_deliveries"][0]["event_type"] == "invoice.paid_v2"


@pytest.mark.parametrize(
    "body",
    [
        {"event_type": "webhook"},
        {"event_type": "Webhook.Test"},
        {"event_type": "webhook..test"},
        {"event_type": "a." + "b" * 100},
        {"event_type": None},
        {"test_data": []},
        {"test_data": "x"},
        {"webhook_url": URL},
    ],
)
def test_send_test_400_for_an_invalid_body(acme: Account, superuser: Engine, body: dict[str, Any]) -> None:
    configure(acme)
    assert acme.post("/webhooks/test/", body).status_code == 400
    assert rows_of(superuser, "SELECT 1 FROM deliveries") == []


def test_send_test_415_for_a_form(acme: Account) -> None:
    headers = bearer(acme.tokens["access"]) | {"content-type": FORM}
    answer = acme.client.post(TEST, headers=headers, content=b"event_type=webhook.test")
    assert answer.status_code == 415


def test_tests_share_the_sequence_of_other_events(local: Account, superuser: Engine) -> None:
    with receiving(answers()) as receiver:
        configure(local, url_of(receiver))
        send_test(local)
        local.revoke("test")
        send_test(local)
    assert [json.loads(received.body)["sequence"] for received in receiver.received] == [2, 4]
    rows = rows_of(superuser, "SELECT sequence FROM events ORDER BY sequence")
    assert [row.sequence for row in rows] == [1, 2, 3, 4]


def test_a_disabled_webhook_can_be_tested(local: Account, store: Store, clock: TurnedClock) -> None:
    with receiving(answers()) as receiver:
        configure(local, url_of(receiver))
        with store.tenant(local.tenant["id"]) as tx:
            disable(tx, tx.webhooks.find(lock=True), "gone", now=clock.now)
        assert send_test(local)["success"]
    assert config(local)["status"] == "disabled"


def test_a_url_no_longer_allowed_is_reported(acme: Account, store: Store, clock: TurnedClock) -> None:
    with store.tenant(acme.tenant["id"]) as tx:
        tx.webhooks.keep(Endpoint("http://hooks.acme.example/"), clock.now)
    report = send_test(acme)
    assert (report["status_code"], report["error"]) == (None, "refused_url")


# Secrets -----------------------------------------------------------------------------------------


def test_a_secret_appears_only_in_the_answer_that_created_it(
    local: Account, superuser: Engine, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(tty=False, level="DEBUG")

    def echo(visit: Visit) -> None:
        """Our request, sent back, must not reveal the secret either."""
        received = visit.receive()
        assert received is not None
        echoed = json.dumps(dict(received.headers)).encode() + received.body
        visit.send(head(200, {"Content-Length": str(len(echoed)), "Connection": "close"}) + echoed)

    with receiving(echo) as receiver:
        new = configure(local, url_of(receiver), regenerate_secret=True)["webhook_secret"]
        answers_since = [
            configure(local, url_of(receiver)),
            config(local),
            send_test(local),
            config(local),
            remove(local).json(),
            local.get("/details/").json(),
            local.get("/me/").json(),
        ]
    everything = json.dumps(answers_since) + capsys.readouterr().err
    everything += str([bytes(row.body) for row in rows_of(superuser, "SELECT body FROM events")])
    everything += str(stored_rows(superuser))
    for secret in (new, secret_of(local)):
        assert secret not in everything
        assert secret.removeprefix("whsec_") not in everything


# Rate limits -------------------------------------------------------------------------------------


def test_429_after_ten_tests_within_a_minute(local: Account, clock: TurnedClock) -> None:
    with receiving(answers()) as receiver:
        configure(local, url_of(receiver))
        for _ in range(10):
            assert send_test(local)["success"]
        refused = local.post("/webhooks/test/", {})
        assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        clock.turn(seconds=int(refused.headers["retry-after"]))
        assert send_test(local)["success"]
    assert len(receiver.received) == 11


def test_429_while_another_test_is_in_progress(local: Account) -> None:
    with receiving(hangs) as receiver, ThreadPoolExecutor(1) as pool:
        configure(local, url_of(receiver))
        first = pool.submit(local.post, "/webhooks/test/", {})
        until = time.monotonic() + 10
        while not receiver.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert local.post("/webhooks/test/", {}).status_code == 429
        assert first.result().json()["error"] == "timeout"
