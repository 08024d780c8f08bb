"""Idempotency-Key: operations that take it are executed once, and a repeat gets the same answer again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from app import create_app
from billing.counters import InProcess
from billing.http.document import operations
from billing.http.wiring import takes_key
from billing.idempotency import KEPT, LEASE
from billing.keyrings import Keyring, new_keyring
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import metadata
from sandbox.faults import Fault
from sandbox.stripe import Sandbox
from tests.answers import DOCUMENT
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, Account, CheckedClient, bearer, log_in
from tests.receivers import Receiver, answers, receiving

MOMENT = timedelta(milliseconds=1)
NEW_PASSWORD = "NewSecurePassword456!"
REGENERATE = {"key_type": "all", "confirm": True}

# What is sent to each operation that takes a key.
BODIES: dict[str, Any] = {
    "register_tenant": {"company_name": "Initech", "email": "bill@initech.example", "password": PASSWORD},
    "change_password": {"old_password": PASSWORD, "new_password": NEW_PASSWORD},
    "start_stripe_connect": {"flow": "account_link"},
    "disconnect_stripe": None,
    "regenerate_api_keys": REGENERATE,
    "revoke_api_keys": {"key_type": "live", "confirm": True, "reason": "Lost."},
    "configure_webhook": {"webhook_url": "https://hooks.acme.example/", "regenerate_secret": True},
    "remove_webhook": None,
    "send_test_webhook": {"test_data": {"a": 1}},
}
KEYED = {o.operation_id: o for o in operations(DOCUMENT) if takes_key(o)}
# change_password ends its caller's token: a repeat is refused for that first.
STAYS_SIGNED_IN = [name for name in BODIES if name != "change_password"]


@pytest.fixture(scope="module")
def whole_app(
    settings: Settings, running_stripe: Sandbox, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    """An app with Stripe configured, whose webhooks may go to loopback."""
    opened = replace(
        settings,
        stripe_secret_key=running_stripe.secret_key,
        stripe_connect_client_id=running_stripe.client_id,
        stripe_api_base=running_stripe.url,
        stripe_connect_base=running_stripe.url,
        webhook_allow_cidrs=(ip_network("127.0.0.0/8"), ip_network("::1/128")),
        webhook_allow_http=True,
    )
    app = create_app(opened, clock=shared_clock, counters=shared_counters)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(
    whole_app: TestClient, stripe: Sandbox, clock: TurnedClock, uncounted: None, clean: None
) -> TestClient:
    whole_app.cookies.clear()
    return whole_app


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(answers(200, b"thanks")) as running:
        yield running


def call(
    account: Account, operation_id: str, *, key: str | None = "one", body: Any = "usual", **headers: str
) -> httpx.Response:
    """Call an operation, as the owner unless it is public."""
    operation = KEYED[operation_id]
    if operation.schemes:
        headers = {**bearer(account.tokens["access"]), **headers}
    if key is not None:
        headers["Idempotency-Key"] = key
    body = BODIES[operation_id] if body == "usual" else body
    return account.client.request(operation.method, operation.path, json=body, headers=headers)


def is_replayed(answer: httpx.Response) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def all_rows(superuser: Engine) -> dict[str, list[str]]:
    """All rows of all tables."""
    with superuser.connect() as connection:
        return {
            table: sorted(connection.scalars(text(f"SELECT to_jsonb(t)::text FROM {table} t")))
            for table in metadata.tables
        }


def count(superuser: Engine, table: str) -> int:
    with superuser.connect() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


# Executed once -----------------------------------------------------------------------------------


def test_every_operation_that_takes_a_key_is_tested() -> None:
    assert KEYED.keys() == BODIES.keys()


@pytest.fixture
def listening(acme: Account, receiver: Receiver) -> Account:
    """Acme, with a webhook whose receiver is running."""
    url = f"http://localhost:{receiver.port}/in"
    assert acme.post("/webhooks/config/", {"webhook_url": url}).is_success
    return acme


@pytest.mark.parametrize("operation_id", STAYS_SIGNED_IN)
def test_a_repeat_replays_the_answer_and_changes_nothing(
    listening: Account, superuser: Engine, operation_id: str
) -> None:
    first = call(listening, operation_id)
    before = all_rows(superuser)
    again = call(listening, operation_id)

    assert first.is_success, first.text
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert (is_replayed(first), is_replayed(again)) == (False, True)
    assert all_rows(superuser) == before
    own = {"x-request-id", "idempotent-replayed", "ratelimit"}
    assert {k: v for k, v in again.headers.items() if k not in own} == {
        k: v for k, v in first.headers.items() if k not in own
    }
    assert again.headers["x-request-id"] != first.headers["x-request-id"]


def test_a_password_change_is_replayed_after_a_login_with_the_new_password(acme: Account) -> None:
    first = call(acme, "change_password")
    assert problem(call(acme, "change_password")) == (401, "session-ended")
    renewed = Account(acme.client, log_in(acme.client, acme.email, NEW_PASSWORD).json())
    again = call(renewed, "change_password")
    assert (is_replayed(again), again.content) == (True, first.content)


def test_a_repeated_test_webhook_is_sent_once(listening: Account, receiver: Receiver) -> None:
    for _ in range(3):
        assert call(listening, "send_test_webhook").json()["success"]
    assert len(receiver.received) == 1


@pytest.mark.parametrize("operation_id", ["regenerate_api_keys", "configure_webhook"])
def test_a_repeat_without_a_key_is_executed_again(acme: Account, operation_id: str) -> None:
    first, second = (call(acme, operation_id, key=None) for _ in range(2))
    assert first.content != second.content
    assert not is_replayed(second)


def test_a_replay_includes_the_cookie(acme: Account) -> None:
    ours = {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}
    first, again = (call(acme, "start_stripe_connect", **ours) for _ in range(2))
    assert first.headers["set-cookie"] == again.headers["set-cookie"]
    assert is_replayed(again)


def test_equivalent_json_is_the_same_request(acme: Account) -> None:
    first = call(acme, "regenerate_api_keys")
    headers = {
        **bearer(acme.tokens["access"]),
        "Idempotency-Key": "one",
        "Content-Type": "Application/JSON; charset=utf-8",
    }
    backwards = json.dumps(dict(reversed(REGENERATE.items())), indent=4)
    again = acme.client.post(f"{API}/api-keys/regenerate/", content=backwards, headers=headers)
    assert (is_replayed(again), again.content) == (True, first.content)


def test_quoted_and_unquoted_keys_are_equal(acme: Account) -> None:
    call(acme, "regenerate_api_keys", key='"one"')
    assert is_replayed(call(acme, "regenerate_api_keys", key="one"))


def test_a_replay_is_unchanged_by_later_events(acme: Account) -> None:
    first = call(acme, "regenerate_api_keys")
    acme.revoke()
    again = call(acme, "regenerate_api_keys")
    assert again.content == first.content
    secret = again.json()["keys"]["live_secret"]["key"]
    assert acme.client.get(f"{API}/verify/", headers=bearer(secret)).json()["code"] == "key-revoked"


def test_twenty_simultaneous_repeats_are_executed_once(acme: Account, superuser: Engine) -> None:
    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(lambda _: call(acme, "regenerate_api_keys"), range(20)))
    done = [answer for answer in got if answer.is_success]
    assert len([answer for answer in done if not is_replayed(answer)]) == 1
    assert len({answer.content for answer in done}) == 1
    assert {problem(answer) for answer in got if not answer.is_success} <= {(409, "idempotency-in-progress")}
    # Four from the registration, and four new ones.
    assert count(superuser, "api_keys") == 8


def test_twenty_simultaneous_registrations_create_one_tenant(client: TestClient, superuser: Engine) -> None:
    anonymous = Account(client, {})
    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(lambda _: call(anonymous, "register_tenant"), range(20)))
    assert {answer.status_code for answer in got} <= {201, 409}
    assert len({answer.content for answer in got if answer.is_success}) == 1
    assert "email-taken" not in {answer.json().get("code") for answer in got}
    assert count(superuser, "tenants") == 1


# 400, 422 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    # Of letters that do not occur in an answer's ids.
    ["", '""', "z y", '"z', 'z"', 'z"y', '"z"y"', "z\\y", "z\ty", "\xe9", "z" * 256, '"' + "z" * 254 + '"'],
)
def test_400_for_a_malformed_key(acme: Account, key: str) -> None:
    answer = call(acme, "regenerate_api_keys", key=key.encode("latin-1"))  # type: ignore[arg-type]
    assert problem(answer) == (400, "invalid-request")
    assert {fault["pointer"] for fault in answer.json()["errors"]} == {"/header/Idempotency-Key"}
    assert not key or key not in answer.text


@pytest.mark.parametrize(
    "key", ["a", "a" * 255, '"' + "a" * 253 + '"', '"a b"', "~!#$%&'()*+,-./:;<=>?@[]^_`{|}"]
)
def test_well_formed_keys_are_accepted(acme: Account, key: str) -> None:
    assert not is_replayed(call(acme, "regenerate_api_keys", key=key))
    assert is_replayed(call(acme, "regenerate_api_keys", key=key))


def test_400_for_two_keys(acme: Account) -> None:
    headers = [("Authorization", f"Bearer {acme.tokens['access']}"), *[("Idempotency-Key", "one")] * 2]
    answer = acme.client.post(f"{API}/api-keys/regenerate/", json=REGENERATE, headers=headers)
    assert problem(answer) == (400, "invalid-request")


def test_operations_that_change_nothing_ignore_the_header(acme: Account) -> None:
    headers = {**bearer(acme.tokens["access"]), "Idempotency-Key": "no key"}
    assert acme.client.get(f"{API}/me/", headers=headers).status_code == 200


def test_422_for_the_same_key_with_another_body(acme: Account, superuser: Engine) -> None:
    call(acme, "regenerate_api_keys")
    before = all_rows(superuser)
    answer = call(acme, "regenerate_api_keys", body={**REGENERATE, "grace_period_seconds": 1})
    assert problem(answer) == (422, "idempotency-key-reused")
    assert all_rows(superuser) == before


def test_422_for_the_same_key_with_another_operation(acme: Account) -> None:
    call(acme, "regenerate_api_keys")
    assert problem(call(acme, "revoke_api_keys", body=REGENERATE)) == (422, "idempotency-key-reused")


def test_an_invalid_body_does_not_claim_the_key(acme: Account) -> None:
    assert call(acme, "regenerate_api_keys", body={}).status_code == 400
    assert call(acme, "regenerate_api_keys").status_code == 200


# Scope of a key ----------------------------------------------------------------------------------


def test_another_tenant_may_use_the_same_key(acme: Account, globex: Account) -> None:
    first, second = call(acme, "regenerate_api_keys"), call(globex, "regenerate_api_keys")
    assert second.is_success
    assert not is_replayed(second)
    assert first.json()["keys"].keys() == second.json()["keys"].keys()
    assert first.content != second.content


def test_another_user_of_the_tenant_may_use_the_same_key(
    acme: Account, store: Store, superuser: Engine
) -> None:
    with superuser.begin() as connection:
        # A second owner, who has Ada's password.
        connection.execute(
            text(
                "INSERT INTO users SELECT tenant_id, gen_random_uuid(), 'bob@acme.example', 'Bob', '', role, true,"
                " password_hash, 1, NULL, created_at, updated_at FROM users"
            )
        )
        connection.execute(
            text(
                "INSERT INTO directory SELECT 'email', email, tenant_id, id FROM users WHERE email = 'bob@acme.example'"
            )
        )
    bob = Account(acme.client, log_in(acme.client, "bob@acme.example").json())
    first, second = call(acme, "regenerate_api_keys"), call(bob, "regenerate_api_keys")
    assert not is_replayed(second)
    assert first.content != second.content


def test_keys_of_registrations_are_scoped_by_address(client: TestClient) -> None:
    body = BODIES["register_tenant"]
    first = call(Account(client, {}), "register_tenant")
    elsewhere = TestClient(client.app, client=("192.0.2.7", 50000))
    headers = {"Idempotency-Key": "one"}
    answer = elsewhere.post(f"{API}/register/", json=body, headers=headers)
    assert first.status_code == 201
    assert problem(answer) == (409, "email-taken")


def test_a_replay_requires_valid_credentials(acme: Account, clock: TurnedClock) -> None:
    call(acme, "regenerate_api_keys")
    clock.turn(minutes=16)
    assert problem(call(acme, "regenerate_api_keys")) == (401, "token-expired")
    renewed = Account(acme.client, log_in(acme.client, acme.email).json())
    assert is_replayed(call(renewed, "regenerate_api_keys"))


# Refusals and failures ---------------------------------------------------------------------------


def test_a_409_refusal_is_replayed(acme: Account, superuser: Engine) -> None:
    body = {**BODIES["register_tenant"], "email": acme.email}
    first = call(acme, "register_tenant", body=body)
    before = all_rows(superuser)
    again = call(acme, "register_tenant", body=body)
    assert problem(first) == (409, "email-taken")
    assert (is_replayed(again), again.status_code, again.content) == (True, 409, first.content)
    assert all_rows(superuser) == before


def test_a_422_refusal_is_replayed_and_logged_each_time(acme: Account) -> None:
    body = {"webhook_url": "https://127.0.0.1/"}
    with structlog.testing.capture_logs() as events:
        first, again = (call(acme, "configure_webhook", body=body) for _ in range(2))
    assert problem(first) == (422, "webhook-url-refused")
    assert (is_replayed(again), again.content) == (True, first.content)
    logged = [event["problem"] for event in events if event["event"] == "request"]
    assert logged == ["webhook-url-refused"] * 2


def test_a_wrong_password_refusal_is_not_replayed(acme: Account) -> None:
    wrong = {**BODIES["change_password"], "old_password": "not this one"}
    for _ in range(2):
        answer = call(acme, "change_password", body=wrong)
        assert problem(answer) == (403, "wrong-password")
        assert not is_replayed(answer)
    assert call(acme, "change_password").status_code == 200


def test_a_502_failure_is_not_replayed(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    stripe.faults.once("create_account_link", Fault.SERVER_ERROR)
    assert call(acme, "start_stripe_connect").status_code == 502
    assert count(superuser, "idempotency_keys") == 0
    answer = call(acme, "start_stripe_connect")
    assert answer.status_code == 200
    assert not is_replayed(answer)


# In progress -------------------------------------------------------------------------------------


def lose_answer(superuser: Engine) -> None:
    """As if the answer had been lost before it was stored."""
    with superuser.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET answer = NULL"))


def set_expiry(superuser: Engine, at: object) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET expires_at = :at"), {"at": at})


def test_409_while_the_first_request_is_in_progress(
    acme: Account, superuser: Engine, clock: TurnedClock
) -> None:
    call(acme, "regenerate_api_keys")
    lose_answer(superuser)
    set_expiry(superuser, clock() + LEASE)
    answer = call(acme, "regenerate_api_keys")
    assert problem(answer) == (409, "idempotency-in-progress")
    assert answer.headers["retry-after"] == "1"
    other = call(acme, "regenerate_api_keys", body={**REGENERATE, "grace_period_seconds": 1})
    assert problem(other) == (422, "idempotency-key-reused")

    clock.now += LEASE - MOMENT
    assert call(acme, "regenerate_api_keys").status_code == 409
    clock.now += MOMENT
    answer = call(acme, "regenerate_api_keys")
    assert answer.status_code == 200
    assert not is_replayed(answer)


def test_a_key_can_be_reused_after_a_day(acme: Account, clock: TurnedClock) -> None:
    call(acme, "regenerate_api_keys")
    clock.now += KEPT - MOMENT
    acme = Account(acme.client, log_in(acme.client, acme.email).json())
    assert is_replayed(call(acme, "regenerate_api_keys"))
    clock.now += MOMENT
    assert not is_replayed(call(acme, "regenerate_api_keys"))
    assert is_replayed(call(acme, "regenerate_api_keys"))


# At rest -----------------------------------------------------------------------------------------


def test_stored_requests_and_answers_are_not_readable(client: TestClient, superuser: Engine) -> None:
    secret = call(Account(client, {}), "register_tenant").json()["tenant"]["api_key_secret"]
    [row] = all_rows(superuser)["idempotency_keys"]
    assert secret not in row
    assert PASSWORD not in row
    assert "initech" not in row.lower()


def test_an_answer_sealed_with_an_older_encryption_key_is_replayed(
    acme: Account, settings: Settings, clock: TurnedClock
) -> None:
    first = call(acme, "regenerate_api_keys")
    renewed = Keyring({**Keyring.parse(new_keyring("new")).keys, **settings.encryption_keys.keys})
    with CheckedClient(create_app(replace(settings, encryption_keys=renewed), clock=clock)) as after:
        again = call(Account(after, acme.registered), "regenerate_api_keys")
    assert (is_replayed(again), again.content) == (True, first.content)
