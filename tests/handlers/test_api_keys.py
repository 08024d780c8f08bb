"""Operations 12–14 (API keys), by status."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, text

from billing.storage.store import Store
from tests.clock import TurnedClock
from tests.conftest import API, Account, bearer, log_in

HOUR = 3600


def verify(acme: Account, key: str) -> Any:
    return acme.client.get(f"{API}/verify/", headers={"X-API-Key": key})


def outcome(acme: Account, key: str) -> int | str:
    answer = verify(acme, key)
    return 200 if answer.status_code == 200 else answer.json()["code"]


def listed(acme: Account) -> list[tuple[str, str]]:
    return [(key["type"], key["status"]) for key in acme.get("/api-keys/").json()["keys"]]


# list --------------------------------------------------------------------------------------------


def test_list_shows_public_keys_whole_and_masks_secret_ones(acme: Account) -> None:
    keys = {key["type"]: key for key in acme.get("/api-keys/").json()["keys"]}
    assert keys["live_public"]["key"] == acme.tenant["api_key_public"]
    assert keys["live_public"]["masked"] is False
    last4 = acme.tenant["api_key_secret"][-4:]
    assert keys["live_secret"]["key"] == f"sk_live_****...{last4}"
    assert keys["live_secret"]["masked"] is True
    assert [key["status"] for key in keys.values()] == ["active"] * 4


def test_list_shows_the_current_key_then_the_one_in_grace(acme: Account) -> None:
    acme.regenerate("live", grace_period_seconds=HOUR)
    assert listed(acme) == [
        ("live_public", "active"),
        ("live_public", "expiring"),
        ("live_secret", "active"),
        ("live_secret", "expiring"),
        ("test_public", "active"),
        ("test_secret", "active"),
    ]


def test_list_shows_the_last_key_of_a_type_with_no_working_one(acme: Account, clock: TurnedClock) -> None:
    acme.regenerate("test")
    acme.revoke("test")
    assert listed(acme)[2:] == [("test_public", "revoked"), ("test_secret", "revoked")]


def test_last_use_is_recorded_after_the_request(acme: Account, clock: TurnedClock) -> None:
    def last_used() -> str | None:
        keys = acme.get("/api-keys/").json()["keys"]
        return next(key["last_used_at"] for key in keys if key["type"] == "live_secret")

    assert last_used() is None
    verify(acme, acme.tenant["api_key_secret"])
    first = await_change(last_used, None)
    assert first is not None
    clock.turn(minutes=4)
    verify(acme, acme.tenant["api_key_secret"])
    clock.turn(minutes=2)
    verify(acme, acme.tenant["api_key_secret"])
    assert await_change(last_used, first) > first


def test_a_refused_key_does_not_record_a_use(
    acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    refused, good = acme.tenant["api_key_secret"], acme.tenant["api_key_test_secret"]
    acme.revoke("live")
    assert outcome(acme, refused) == "key-revoked"
    assert outcome(acme, good) == 200

    def used() -> list[str]:
        with superuser.connect() as connection:
            return list(connection.scalars(text("SELECT type FROM api_keys WHERE last_used_at IS NOT NULL")))

    assert await_change(used, []) == ["test_secret"]


def await_change(read: Any, before: Any) -> Any:
    import time

    for _ in range(100):
        if (value := read()) != before:
            return value
        time.sleep(0.05)
    raise AssertionError("nothing was written down in five seconds")


# regenerate --------------------------------------------------------------------------------------


def test_regenerate_expires_the_old_keys_at_once(acme: Account) -> None:
    answer = acme.regenerate("live")
    assert answer["keys"].keys() == {"live_public", "live_secret"}
    assert outcome(acme, acme.tenant["api_key_secret"]) == "key-expired"
    assert outcome(acme, acme.tenant["api_key_test_secret"]) == 200
    assert outcome(acme, answer["keys"]["live_secret"]["key"]) == 200
    assert {key["last4"] for key in answer["previous"]} == {
        acme.tenant["api_key_secret"][-4:],
        acme.tenant["api_key_public"][-4:],
    }


def test_a_key_in_its_grace_period_works_and_reports_its_expiry(acme: Account, clock: TurnedClock) -> None:
    previous = acme.regenerate("all", grace_period_seconds=HOUR)["previous"]
    answer = verify(acme, acme.tenant["api_key_secret"])
    assert answer.status_code == 200
    assert answer.headers["x-key-expires-at"] == answer.json()["key"]["expires_at"][:19] + "Z"
    assert answer.json()["key"]["expires_at"] in {key["expires_at"] for key in previous}
    clock.turn(seconds=HOUR - 1)
    assert outcome(acme, acme.tenant["api_key_secret"]) == 200
    clock.turn(seconds=1)
    assert outcome(acme, acme.tenant["api_key_secret"]) == "key-expired"


def test_a_current_key_sends_no_expiry_header(acme: Account) -> None:
    assert "x-key-expires-at" not in verify(acme, acme.tenant["api_key_secret"]).headers


def test_at_most_one_old_key_of_a_type_stays_in_grace(acme: Account) -> None:
    second = acme.regenerate("live", grace_period_seconds=HOUR)["keys"]["live_secret"]["key"]
    third = acme.regenerate("live", grace_period_seconds=HOUR)["keys"]["live_secret"]["key"]
    keys = (acme.tenant["api_key_secret"], second, third)
    assert [outcome(acme, key) for key in keys] == ["key-expired", 200, 200]


def test_simultaneous_regenerations_leave_one_current_key_per_type(acme: Account, superuser: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: acme.regenerate("all"), range(16)))
    assert all("keys" in answer for answer in answers)
    with superuser.connect() as connection:
        current = "SELECT type FROM api_keys WHERE expires_at IS NULL AND revoked_at IS NULL ORDER BY type"
        assert connection.scalars(text(current)).all() == [
            "live_public",
            "live_secret",
            "test_public",
            "test_secret",
        ]


@pytest.mark.parametrize(
    "body",
    [
        {"key_type": "live"},
        {"key_type": "live", "confirm": False},
        {"key_type": "live_secret", "confirm": True},
        {"key_type": "live", "confirm": True, "grace_period_seconds": -1},
        {"key_type": "live", "confirm": True, "grace_period_seconds": 604801},
        {"key_type": "live", "confirm": True, "grace_period_seconds": 1.5},
        {"key_type": "live", "confirm": True, "grace_period_seconds": "60"},
    ],
)
def test_regenerate_400_for_an_invalid_body(acme: Account, body: dict[str, Any]) -> None:
    assert acme.post("/api-keys/regenerate/", body).status_code == 400
    assert outcome(acme, acme.tenant["api_key_secret"]) == 200


# revoke ------------------------------------------------------------------------------------------


def test_revoke_takes_effect_on_the_next_request_also_in_grace(acme: Account, superuser: Engine) -> None:
    new = acme.regenerate("all", grace_period_seconds=HOUR)["keys"]["live_secret"]["key"]
    answer = acme.revoke("live", reason="leaked in a screenshot")
    assert answer["revoked_keys"] == ["live_public", "live_secret"]
    assert answer["reason"] == "leaked in a screenshot"
    assert outcome(acme, new) == "key-revoked"
    assert outcome(acme, acme.tenant["api_key_secret"]) == "key-revoked"
    assert outcome(acme, acme.tenant["api_key_test_secret"]) == 200
    with superuser.connect() as connection:
        row = connection.execute(text("SELECT * FROM audit_log ORDER BY sequence DESC LIMIT 1")).one()
    assert (row.action, row.subject, row.reason) == ("api_key.revoked", "live", "leaked in a screenshot")
    assert str(row.actor_id) == acme.registered["user"]["id"]
    assert (row.actor_kind, row.address) == ("user", "testclient")


@pytest.mark.parametrize("change", ["regenerated", "revoked"])
def test_the_audit_log_names_keys_by_their_last_four_characters(
    acme: Account, superuser: Engine, change: str
) -> None:
    before = {kind: acme.tenant[f"api_key_test_{kind}"][-4:] for kind in ("public", "secret")}
    old = [{"type": f"test_{kind}", "last4": last4} for kind, last4 in before.items()]
    expected: dict[str, Any] = {"revoked": old}
    if change == "revoked":
        acme.revoke("test")
    else:
        made = acme.regenerate("test", grace_period_seconds=HOUR)["keys"]
        new = [{"type": name, "last4": key["key"][-4:]} for name, key in made.items()]
        expected = {"grace_seconds": HOUR, "new": new, "previous": old}
    with superuser.connect() as connection:
        row = connection.execute(text("SELECT * FROM audit_log ORDER BY sequence DESC LIMIT 1")).one()
    assert (row.action, row.details) == (f"api_key.{change}", expected)


def test_revoke_and_regenerate_are_audited_even_if_no_key_ends(acme: Account, superuser: Engine) -> None:
    acme.revoke("live")
    acme.revoke("live")
    acme.regenerate("live")
    with superuser.connect() as connection:
        actions = connection.scalars(
            text("SELECT action FROM audit_log WHERE action LIKE 'api_key.%' ORDER BY sequence")
        )
        assert list(actions) == ["api_key.revoked", "api_key.revoked", "api_key.regenerated"]


def test_revoke_includes_just_expired_keys_in_case_a_clock_is_behind(
    acme: Account, clock: TurnedClock, superuser: Engine
) -> None:
    old = acme.tenant["api_key_secret"]
    acme.regenerate("live", grace_period_seconds=60)
    acme.revoke("test")
    clock.turn(seconds=61)
    assert outcome(acme, old) == "key-expired"
    assert acme.revoke("live")["revoked_keys"] == ["live_public", "live_secret"]
    assert acme.revoke("live")["revoked_keys"] == []
    with superuser.connect() as connection:
        query = "SELECT details FROM audit_log WHERE action = 'api_key.revoked' ORDER BY sequence"
        logged = [details["revoked"] for details in connection.scalars(text(query))]
    assert [len(keys) for keys in logged] == [2, 4, 0]
    clock.turn(seconds=-30)
    assert outcome(acme, old) == "key-revoked"


def test_revoking_twice_is_not_an_error(acme: Account) -> None:
    acme.revoke("all")
    assert acme.revoke("all")["revoked_keys"] == []


def test_regenerate_works_after_revoke(acme: Account) -> None:
    acme.revoke("all")
    answer = acme.regenerate("all")
    assert answer["previous"] == []
    assert outcome(acme, answer["keys"]["test_secret"]["key"]) == 200


# roles and tenants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("owner", {"list", "regenerate", "revoke"}), ("admin", {"list"}), ("developer", set())],
)
def test_allowed_operations_by_role(acme: Account, superuser: Engine, role: str, allowed: set[str]) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET role = :role"), {"role": role})
    body = {"key_type": "test", "confirm": True}
    statuses = {
        "list": acme.get("/api-keys/").status_code,
        "regenerate": acme.post("/api-keys/regenerate/", body).status_code,
        "revoke": acme.post("/api-keys/revoke/", body).status_code,
    }
    assert statuses == {name: 200 if name in allowed else 403 for name in statuses}
    assert acme.get("/me/").status_code == 200


def test_403_takes_precedence_over_400(acme: Account, superuser: Engine) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET role = 'developer'"))
    assert acme.post("/api-keys/revoke/", {"nonsense": True}).status_code == 403


def test_each_tenant_lists_and_revokes_only_its_own_keys(acme: Account, globex: Account) -> None:
    theirs = {key["id"] for key in globex.get("/api-keys/").json()["keys"]}
    assert not theirs & {key["id"] for key in acme.get("/api-keys/").json()["keys"]}
    acme.revoke("all")
    assert outcome(globex, globex.tenant["api_key_secret"]) == 200
    session = log_in(globex.client, globex.email).json()["tokens"]["access"]
    assert globex.client.get(f"{API}/me/", headers=bearer(session)).status_code == 200
