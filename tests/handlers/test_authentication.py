"""Operations 1–7 (registration, login, tokens, verification), by status."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import jwt
import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from billing import sessions, users
from billing.errors import InvalidCredentials, SessionEnded
from billing.passwords import Passwords, cost_of
from billing.settings import Settings
from billing.storage.shelf import BATCH_ROWS
from billing.storage.store import Store
from billing.storage.tables import metadata
from billing.tenants import Account as FoundAccount
from billing.tokens import Tokens
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, Account, bearer, log_in, register

NEW_PASSWORD = "NewSecurePassword456!"
SECRETS = ("api_key_public", "api_key_secret", "api_key_test_public", "api_key_test_secret", "webhook_secret")


def code_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# register ----------------------------------------------------------------------------------------


def test_register_returns_tenant_user_and_secrets(client: TestClient) -> None:
    answer = register(
        client, first_name="Ada", domain="acme.example", webhook_url="https://hooks.acme.example/"
    )
    assert answer.status_code == 201
    assert answer.json()["tenant"].keys() >= set(SECRETS)
    assert answer.json()["tenant"]["slug"] == "acme-inc"
    assert answer.json()["tenant"]["webhook_url"] == "https://hooks.acme.example/"
    assert answer.json()["user"]["role"] == "owner"
    assert answer.json()["user"]["last_name"] == ""
    assert answer.headers["cache-control"] == "no-store"


def test_no_other_operation_returns_a_secret(acme: Account) -> None:
    shown = [acme.get(path).text for path in ("/me/", "/details/", "/verify/", "/api-keys/")]
    shown.append(log_in(acme.client, acme.email).text)
    secrets = {acme.tenant[name] for name in SECRETS if "public" not in name}
    assert not [secret for secret in secrets for text in shown if secret in text]


def test_secrets_are_not_stored_as_plain_text(acme: Account, superuser: Engine) -> None:
    with superuser.connect() as connection:
        tables = ("tenants", "users", "sessions", "api_keys", "webhook_secrets", "directory", "audit_log")
        stored = "".join(str(connection.execute(text(f"SELECT * FROM {table}")).all()) for table in tables)
    secrets = [acme.tenant[name] for name in SECRETS if "public" not in name]
    assert acme.tenant["api_key_public"] in stored
    assert not [s for s in [*secrets, *acme.tokens.values(), PASSWORD] if s in stored]


def test_register_writes_audit_rows(acme: Account, superuser: Engine) -> None:
    with superuser.connect() as connection:
        actions = connection.scalars(text("SELECT action FROM audit_log ORDER BY sequence")).all()
    assert actions == ["tenant.registered", "user.added"]


def test_409_for_a_taken_email_in_other_capitals(acme: Account) -> None:
    answer = register(acme.client, "Other", email="ADA@Acme.Example")
    assert code_of(answer) == (409, "email-taken")


def test_slug_is_made_unique(acme: Account) -> None:
    other = register(acme.client, email="other@acme.example").json()["tenant"]
    assert other["slug"].startswith("acme-inc-")


def test_slug_of_a_company_name_without_latin_letters(client: TestClient) -> None:
    assert register(client, "北京", email="x@beijing.example").json()["tenant"]["slug"] == "bei-jing"
    assert register(client, "!!!", email="y@beijing.example").json()["tenant"]["slug"] == "tenant"


@pytest.mark.parametrize("name", ["\u3000", "\u00a0Acme\u00a0"])
def test_a_company_name_is_kept_as_it_was_sent(client: TestClient, name: str) -> None:
    answer = register(client, name, email="ada@acme.example").json()
    assert answer["tenant"]["company_name"] == answer["user"]["tenant_name"] == name


def test_fifty_registrations_of_one_email_make_one_tenant(flooded: TestClient, superuser: Engine) -> None:
    with ThreadPoolExecutor(25) as pool:
        statuses = Counter(pool.map(lambda _: register(flooded).status_code, range(50)))
    assert statuses == {201: 1, 409: 49}
    with superuser.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM tenants")) == 1


@pytest.mark.parametrize("password", [PASSWORD, "SecurePassword123!", NEW_PASSWORD])
def test_passwords_of_existing_clients_are_accepted(client: TestClient, password: str) -> None:
    assert register(client, password=password).status_code == 201


@pytest.mark.parametrize("password", ["password1234", "aaaaaaaaaaaa", "AcmeInc.AcmeInc.", "ada@acme.example"])
def test_422_for_a_password_easy_to_guess(client: TestClient, password: str) -> None:
    assert code_of(register(client, password=password)) == (422, "password-too-weak")


def test_422_for_a_password_too_short_once_composed(client: TestClient) -> None:
    decomposed = "e\u0301" * 6
    assert code_of(register(client, password=decomposed)) == (422, "password-too-weak")


@pytest.mark.parametrize("url", ["http://hooks.acme.example/", "https://127.0.0.1/", "https://localhost/"])
def test_422_for_a_webhook_url_that_is_not_public(client: TestClient, url: str) -> None:
    assert code_of(register(client, webhook_url=url)) == (422, "webhook-url-refused")


def test_400_lists_each_fault_without_echoing_values(client: TestClient) -> None:
    answer = register(client, password="hunter2", surprise="hunter2")
    assert code_of(answer) == (400, "invalid-request")
    assert {fault["pointer"] for fault in answer.json()["errors"]} == {"", "/password"}
    assert "hunter2" not in answer.text
    assert "surprise" not in answer.text


# login -------------------------------------------------------------------------------------------


def test_log_in_opens_a_session_and_sets_last_login(acme: Account) -> None:
    answer = log_in(acme.client, "ADA@acme.example")
    assert answer.status_code == 200
    assert answer.json()["user"]["last_login"] is not None
    assert acme.client.get(f"{API}/me/", headers=bearer(answer.json()["tokens"]["access"])).status_code == 200


def read_then_disabled(acme: Account, store: Store, clock: TurnedClock) -> FoundAccount:
    """The account as it was read before its user was disabled."""
    with store.platform() as platform:
        account = platform.find_account(acme.email)
    assert account is not None
    with store.tenant(account.tenant.id) as tx:
        tx.users.disable(account.user.id, clock())
    return account


def test_a_user_who_is_disabled_while_they_log_in_gets_no_session(
    acme: Account, store: Store, settings: Settings, superuser: Engine, clock: TurnedClock
) -> None:
    account = read_then_disabled(acme, store, clock)
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(account.tenant.id) as tx, pytest.raises(InvalidCredentials):
        sessions.log_in(tx, account, renewed_hash=None, tokens=tokens, now=clock())
    with superuser.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM sessions")) == 1


def test_log_in_rehashes_a_password_stored_at_another_cost(
    acme: Account, settings: Settings, superuser: Engine
) -> None:
    stored = Passwords(settings.password_peppers, settings.password_cost + 1).hash(PASSWORD)
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET password_hash = :stored"), {"stored": stored})
    assert [log_in(acme.client, acme.email).status_code for _ in range(2)] == [200, 200]
    with superuser.connect() as connection:
        renewed = connection.scalar(text("SELECT password_hash FROM users"))
    assert cost_of(renewed.split("$", 2)[2]) == settings.password_cost


def test_log_in_gives_the_same_refusal_for_every_reason(acme: Account, superuser: Engine) -> None:
    refusals = [log_in(acme.client, acme.email, "wrong"), log_in(acme.client, "nobody@acme.example")]
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET is_active = false"))
    refusals.append(log_in(acme.client, acme.email))
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET is_active = true"))
        connection.execute(text("UPDATE tenants SET is_active = false"))
    refusals.append(log_in(acme.client, acme.email))
    said = [r.json() | {"instance": "", "request_id": ""} for r in refusals]
    assert said == [said[0]] * 4
    assert code_of(refusals[0]) == (401, "invalid-credentials")
    assert refusals[0].headers["www-authenticate"] == 'Bearer realm="billing"'


def test_log_in_ignores_stale_credentials(acme: Account) -> None:
    stale = bearer("stale") | {"X-API-Key": "stale"}
    body = {"email": acme.email, "password": PASSWORD}
    assert acme.client.post(f"{API}/login/", json=body, headers=stale).status_code == 200


def test_passwords_are_compared_in_composed_unicode_form(client: TestClient) -> None:
    register(client, password="Cafe\u0301 Zu\u0308rich am See")
    assert log_in(client, "ada@acme.example", "Caf\u00e9 Z\u00fcrich am See").status_code == 200


def test_a_long_password_is_not_truncated(client: TestClient) -> None:
    password = "correct horse battery staple " * 4
    register(client, password=password)
    assert log_in(client, "ada@acme.example", password[:-2] + "!!").status_code == 401
    assert log_in(client, "ada@acme.example", password).status_code == 200


# token/refresh -----------------------------------------------------------------------------------


def refresh(client: TestClient, token: str) -> Any:
    return client.post(f"{API}/token/refresh/", json={"refresh": token})


def test_refresh_rotates_the_refresh_token(acme: Account) -> None:
    first = refresh(acme.client, acme.tokens["refresh"])
    assert first.status_code == 200
    assert first.json()["refresh"] != acme.tokens["refresh"]
    assert refresh(acme.client, first.json()["refresh"]).status_code == 200


def test_a_repeat_within_ten_seconds_gets_the_same_successor(acme: Account, clock: TurnedClock) -> None:
    first = refresh(acme.client, acme.tokens["refresh"]).json()
    clock.turn(seconds=10)
    second = refresh(acme.client, acme.tokens["refresh"])
    assert second.json()["refresh"] == first["refresh"]
    assert second.json()["access"] != first["access"]


def test_a_later_repeat_ends_the_session(acme: Account, clock: TurnedClock, superuser: Engine) -> None:
    successor = refresh(acme.client, acme.tokens["refresh"]).json()["refresh"]
    clock.turn(seconds=11)
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (401, "refresh-token-reused")
    assert code_of(refresh(acme.client, successor)) == (401, "session-ended")
    assert code_of(acme.get("/me/")) == (401, "session-ended")
    with superuser.connect() as connection:
        audit = connection.scalars(text("SELECT action FROM audit_log ORDER BY sequence DESC LIMIT 1")).one()
    assert audit == "session.refresh_token_reused"


@pytest.fixture
def bob(acme: Account, store: Store, settings: Settings, clock: TurnedClock) -> str:
    """The access token of a colleague."""
    tenant_id, email = UUID(acme.tenant["id"]), "bob@acme.example"
    user = users.new_user(tenant_id, {"email": email}, role="developer", now=clock())
    kept = Passwords(settings.password_peppers, settings.password_cost).hash(PASSWORD)
    with store.tenant(tenant_id) as tx:
        users.add(tx, user, password_hash=kept, now=clock())
    access: str = log_in(acme.client, email).json()["tokens"]["access"]
    return access


def test_a_reused_refresh_token_ends_only_its_own_session(
    acme: Account, bob: str, clock: TurnedClock
) -> None:
    elsewhere = log_in(acme.client, acme.email).json()["tokens"]["access"]
    refresh(acme.client, acme.tokens["refresh"])
    clock.turn(seconds=11)
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (401, "refresh-token-reused")
    assert code_of(acme.get("/me/")) == (401, "session-ended")
    for access in (elsewhere, bob):
        assert acme.client.get(f"{API}/me/", headers=bearer(access)).status_code == 200


def test_a_repeat_after_the_successor_was_used_ends_the_session(acme: Account) -> None:
    successor = refresh(acme.client, acme.tokens["refresh"]).json()["refresh"]
    refresh(acme.client, successor)
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (401, "refresh-token-reused")


def test_a_hundred_simultaneous_refreshes_get_one_successor(flooded: TestClient) -> None:
    acme = Account(flooded, register(flooded).json())
    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(lambda _: refresh(acme.client, acme.tokens["refresh"]), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    (successor,) = {answer.json()["refresh"] for answer in answers}
    assert refresh(acme.client, successor).status_code == 200


def test_refresh_expires_after_seven_idle_days_and_thirty_in_all(acme: Account, clock: TurnedClock) -> None:
    token = acme.tokens["refresh"]
    for _ in range(4):
        clock.turn(days=6.9)
        token = refresh(acme.client, token).json()["refresh"]
    clock.turn(days=6.9)
    assert code_of(refresh(acme.client, token)) == (401, "token-expired")
    idle = log_in(acme.client, acme.email).json()["tokens"]["refresh"]
    clock.turn(days=7.1)
    assert code_of(refresh(acme.client, idle)) == (401, "token-expired")


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "\U0001f511", "." * 16_000])
def test_401_for_a_malformed_refresh_token(client: TestClient, token: str) -> None:
    assert code_of(refresh(client, token)) == (401, "token-invalid")


def test_access_and_refresh_tokens_are_not_interchangeable(acme: Account) -> None:
    assert code_of(refresh(acme.client, acme.tokens["access"])) == (401, "token-invalid")
    answer = acme.client.get(f"{API}/me/", headers=bearer(acme.tokens["refresh"]))
    assert code_of(answer) == (401, "token-invalid")


def test_401_for_a_refresh_token_of_a_deleted_tenant(acme: Account, store: Store, superuser: Engine) -> None:
    with superuser.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (401, "session-ended")


def test_403_for_a_refresh_of_a_disabled_tenant(acme: Account, superuser: Engine) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE tenants SET is_active = false"))
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (403, "tenant-disabled")


@pytest.mark.parametrize("ending", ["is_active = false", "token_version = token_version + 1"])
def test_a_disabled_user_or_newer_token_version_ends_refresh_tokens(
    acme: Account, superuser: Engine, ending: str
) -> None:
    with superuser.begin() as connection:
        connection.execute(text(f"UPDATE users SET {ending}"))
    assert code_of(refresh(acme.client, acme.tokens["refresh"])) == (401, "session-ended")


# me, change-password -----------------------------------------------------------------------------


def test_me_returns_user_and_tenant(acme: Account) -> None:
    answer = acme.get("/me/").json()
    assert answer["user"]["tenant"] == answer["tenant"]["id"] == acme.tenant["id"]
    assert answer["user"]["tenant_name"] == "Acme Inc."


def test_an_access_token_lives_fifteen_minutes(acme: Account, clock: TurnedClock) -> None:
    clock.turn(minutes=14, seconds=58)
    assert acme.get("/me/").status_code == 200
    clock.turn(seconds=2)
    answer = acme.get("/me/")
    assert code_of(answer) == (401, "token-expired")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_401_without_credentials_has_no_error_attribute(client: TestClient) -> None:
    answer = client.get(f"{API}/me/")
    assert code_of(answer) == (401, "credentials-missing")
    assert answer.headers["www-authenticate"] == 'Bearer realm="billing"'


def test_401_for_a_forged_or_unsigned_token(acme: Account) -> None:
    claims = jwt.decode(acme.tokens["access"], options={"verify_signature": False})
    headers = {name: jwt.get_unverified_header(acme.tokens["access"])[name] for name in ("typ", "kid")}
    forged = jwt.encode(claims, "k" * 32, headers=headers)
    unsigned = jwt.encode(claims, None, algorithm="none", headers=headers)
    for token in (forged, unsigned):
        assert code_of(acme.client.get(f"{API}/me/", headers=bearer(token))) == (401, "token-invalid")


def test_401_for_a_disabled_user(acme: Account, superuser: Engine) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE users SET is_active = false"))
    assert code_of(acme.get("/me/")) == (401, "session-ended")


def test_403_for_a_disabled_tenant(acme: Account, superuser: Engine) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE tenants SET is_active = false"))
    assert code_of(acme.get("/me/")) == (403, "tenant-disabled")
    key = {"X-API-Key": acme.tenant["api_key_secret"]}
    assert code_of(acme.client.get(f"{API}/verify/", headers=key)) == (403, "tenant-disabled")


def change_password(acme: Account, old: str = PASSWORD, new: str = NEW_PASSWORD) -> Any:
    return acme.post("/change-password/", {"old_password": old, "new_password": new})


def test_change_password_ends_every_other_session(acme: Account) -> None:
    elsewhere = log_in(acme.client, acme.email).json()["tokens"]
    answer = change_password(acme)
    assert answer.status_code == 200
    assert code_of(acme.get("/me/")) == (401, "session-ended")
    assert code_of(refresh(acme.client, elsewhere["refresh"])) == (401, "session-ended")
    new = answer.json()["tokens"]
    assert acme.client.get(f"{API}/me/", headers=bearer(new["access"])).status_code == 200
    assert refresh(acme.client, new["refresh"]).status_code == 200


def test_change_password_ends_more_sessions_than_a_batch(acme: Account, superuser: Engine) -> None:
    others = [log_in(acme.client, acme.email).json()["tokens"] for _ in range(2)]
    many = (
        "INSERT INTO sessions SELECT tenant_id, gen_random_uuid(), user_id, current_jti, NULL, created_at, "
        "rotated_at, expires_at, NULL FROM (SELECT * FROM sessions LIMIT 1), generate_series(1, :number)"
    )
    with superuser.begin() as connection:
        connection.execute(text(many), {"number": BATCH_ROWS})
    assert change_password(acme).status_code == 200
    with superuser.connect() as connection:
        living = connection.scalar(text("SELECT count(*) FROM sessions WHERE ended_at IS NULL"))
    assert living > 1  # Beyond a batch they are not marked; their tokens are of an older version.
    for tokens in others:
        assert code_of(refresh(acme.client, tokens["refresh"])) == (401, "session-ended")
        answer = acme.client.get(f"{API}/me/", headers=bearer(tokens["access"]))
        assert code_of(answer) == (401, "session-ended")


def test_change_password_keeps_the_sessions_of_other_users(acme: Account, bob: str) -> None:
    assert change_password(acme).status_code == 200
    assert acme.client.get(f"{API}/me/", headers=bearer(bob)).status_code == 200


def test_change_password_leaves_one_active_session(acme: Account, superuser: Engine) -> None:
    # The ended sessions' tokens are of an older version, and would be refused anyway.
    log_in(acme.client, acme.email)
    change_password(acme)
    with superuser.connect() as connection:
        living = connection.scalar(text("SELECT count(*) FROM sessions WHERE ended_at IS NULL"))
    assert living == 1


def test_login_and_password_change_are_audited_in_order(acme: Account, superuser: Engine) -> None:
    log_in(acme.client, acme.email)
    change_password(acme)
    with superuser.connect() as connection:
        actions = list(connection.scalars(text("SELECT action FROM audit_log ORDER BY sequence")))
    assert actions[0] == "tenant.registered"
    assert actions[-2:] == ["user.logged_in", "user.password_changed"]


def test_change_password_changes_the_password(acme: Account) -> None:
    change_password(acme)
    assert log_in(acme.client, acme.email).status_code == 401
    assert log_in(acme.client, acme.email, NEW_PASSWORD).status_code == 200


def test_403_for_a_wrong_old_password(acme: Account) -> None:
    answer = change_password(acme, old="wrong")
    assert code_of(answer) == (403, "wrong-password")


def test_422_for_a_new_password_made_of_account_data(acme: Account) -> None:
    assert code_of(change_password(acme, new="acme.example1")) == (422, "password-too-weak")


def test_a_user_who_is_disabled_while_they_change_their_password_gets_no_session(
    acme: Account, store: Store, settings: Settings, superuser: Engine, clock: TurnedClock
) -> None:
    account = read_then_disabled(acme, store, clock)
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(account.tenant.id) as tx, pytest.raises(SessionEnded):
        sessions.change_password(tx, account.user, "-", tokens=tokens, now=clock())
    with superuser.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM sessions")) == 1
        assert connection.scalar(text("SELECT password_hash FROM users")) == account.password_hash


def test_of_two_simultaneous_password_changes_one_succeeds(acme: Account) -> None:
    both = threading.Barrier(2)

    def change(new: str) -> int:
        both.wait()
        return change_password(acme, new=new).status_code

    with ThreadPoolExecutor(2) as pool:
        statuses = sorted(pool.map(change, [NEW_PASSWORD, NEW_PASSWORD + "2"]))
    assert statuses[0] == 200
    assert statuses[1] in (401, 403)


# verify, details ---------------------------------------------------------------------------------

KEYS = {
    "api_key_public": ("live_public", "live"),
    "api_key_secret": ("live_secret", "live"),
    "api_key_test_public": ("test_public", "test"),
    "api_key_test_secret": ("test_secret", "test"),
}
PUBLIC_MEMBERS = {"id", "company_name", "slug", "is_active", "created_at"}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
def test_verify_accepts_every_key_in_both_headers(acme: Account, name: str, header: str) -> None:
    key = acme.tenant[name]
    sent = {header: f"Bearer {key}" if header == "Authorization" else key}
    answer = acme.client.get(f"{API}/verify/", headers=sent).json()
    assert answer["valid"] is True
    assert (answer["key"]["type"], answer["mode"]) == KEYS[name]
    assert answer["key"]["last4"] == key[-4:]
    assert (answer["tenant"].keys() == PUBLIC_MEMBERS) == ("public" in name)


def test_details_by_key_and_by_user(acme: Account) -> None:
    by_key = acme.client.get(
        f"{API}/details/", headers={"X-API-Key": acme.tenant["api_key_test_public"]}
    ).json()
    assert by_key["mode"] == "test"
    assert by_key["tenant"].keys() == PUBLIC_MEMBERS
    by_user = acme.get("/details/").json()
    assert "mode" not in by_user
    assert by_user["tenant"]["email"] == acme.email


def test_verify_by_user_returns_no_key(acme: Account) -> None:
    assert acme.get("/verify/").json().keys() == {"valid", "tenant"}


def test_401_distinguishes_malformed_and_unknown_keys(acme: Account) -> None:
    def code(key: str) -> tuple[int, str]:
        return code_of(acme.client.get(f"{API}/verify/", headers={"X-API-Key": key}))

    good = acme.tenant["api_key_secret"]
    swapped = good[:-1] + ("0" if good[-1] != "0" else "1")
    assert code(swapped) == (401, "key-malformed")
    assert code("sk_live_short") == (401, "key-malformed")
    assert code("") == (401, "key-malformed")
    assert code(unknown_key()) == (401, "key-unknown")


def unknown_key() -> str:
    from billing.keys import mint

    return mint("live_secret")


def test_401_for_a_bad_authorization_header_despite_a_good_key(acme: Account) -> None:
    for authorization in (
        "Bearer nonsense",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        f"Bearer {unknown_key()}",
        "garbage",
    ):
        headers = {"Authorization": authorization, "X-API-Key": acme.tenant["api_key_secret"]}
        answer = acme.client.get(f"{API}/verify/", headers=headers)
        assert answer.status_code == 401
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_401_for_a_key_in_the_query_string(acme: Account) -> None:
    answer = acme.client.get(f"{API}/verify/", params={"X-API-Key": acme.tenant["api_key_secret"]})
    assert answer.status_code == 401


def test_a_key_is_refused_where_a_user_is_required(acme: Account) -> None:
    key = acme.tenant["api_key_secret"]
    for path, roles in (("/me/", "developer or admin or owner"), ("/api-keys/", "admin or owner")):
        answer = acme.client.get(f"{API}{path}", headers=bearer(key))
        assert code_of(answer) == (403, "insufficient-scope")
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
        assert answer.json()["detail"] == f"This operation takes a user with the role {roles}."
        assert acme.client.get(f"{API}{path}", headers={"X-API-Key": key}).status_code == 401
