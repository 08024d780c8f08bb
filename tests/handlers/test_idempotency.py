"""Idempotency-Key: the operations that take it do a thing once, and say the same of it to whoever asks again."""

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
# Its caller's token ends with it: a repeat is told that first.
STAYS_SIGNED_IN = [name for name in BODIES if name != "change_password"]


@pytest.fixture(scope="module")
def whole_app(
    settings: Settings, running_stripe: Sandbox, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    """An app with a Stripe, that may call loopback."""
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


def ask(
    account: Account, operation_id: str, *, key: str | None = "one", body: Any = "usual", **headers: str
) -> httpx.Response:
    """Ask for an operation, as the owner where it is not for anyone."""
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


def everything(superuser: Engine) -> dict[str, list[str]]:
    """All rows of all tables, but what is noted of a login."""
    with superuser.connect() as connection:
        return {
            table: sorted(connection.scalars(text(f"SELECT to_jsonb(t)::text FROM {table} t")))
            for table in metadata.tables
        }


def count(superuser: Engine, table: str) -> int:
    with superuser.connect() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


# Once --------------------------------------------------------------------------------------------


def test_the_operations_are_those_that_change_something_for_good() -> None:
    assert KEYED.keys() == BODIES.keys()


@pytest.fixture
def listening(acme: Account, receiver: Receiver) -> Account:
    """Acme, whose webhook has a receiver."""
    url = f"http://localhost:{receiver.port}/in"
    assert acme.post("/webhooks/config/", {"webhook_url": url}).is_success
    return acme


@pytest.mark.parametrize("operation_id", STAYS_SIGNED_IN)
def test_a_repeat_is_answered_alike_and_changes_nothing(
    listening: Account, superuser: Engine, operation_id: str
) -> None:
    first = ask(listening, operation_id)
    before = everything(superuser)
    again = ask(listening, operation_id)

    assert first.is_success, first.text
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert (is_replayed(first), is_replayed(again)) == (False, True)
    assert everything(superuser) == before
    own = {"x-request-id", "idempotent-replayed", "ratelimit"}
    assert {k: v for k, v in again.headers.items() if k not in own} == {
        k: v for k, v in first.headers.items() if k not in own
    }
    assert again.headers["x-request-id"] != first.headers["x-request-id"]


def test_a_changed_password_is_told_again_to_whoever_has_logged_in_with_it(acme: Account) -> None:
    first = ask(acme, "change_password")
    assert problem(ask(acme, "change_password")) == (401, "session-ended")
    renewed = Account(acme.client, log_in(acme.client, acme.email, NEW_PASSWORD).json())
    again = ask(renewed, "change_password")
    assert (is_replayed(again), again.content) == (True, first.content)


def test_a_receiver_is_tested_once(listening: Account, receiver: Receiver) -> None:
    for _ in range(3):
        assert ask(listening, "send_test_webhook").json()["success"]
    assert len(receiver.received) == 1


@pytest.mark.parametrize("operation_id", ["regenerate_api_keys", "configure_webhook"])
def test_without_a_key_it_is_done_each_time(acme: Account, operation_id: str) -> None:
    first, second = (ask(acme, operation_id, key=None) for _ in range(2))
    assert first.content != second.content
    assert not is_replayed(second)


def test_a_cookie_is_part_of_the_answer(acme: Account) -> None:
    ours = {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}
    first, again = (ask(acme, "start_stripe_connect", **ours) for _ in range(2))
    assert first.headers["set-cookie"] == again.headers["set-cookie"]
    assert is_replayed(again)


def test_the_same_json_is_the_same_however_it_is_written(acme: Account) -> None:
    first = ask(acme, "regenerate_api_keys")
    headers = {
        **bearer(acme.tokens["access"]),
        "Idempotency-Key": "one",
        "Content-Type": "Application/JSON; charset=utf-8",
    }
    backwards = json.dumps(dict(reversed(REGENERATE.items())), indent=4)
    again = acme.client.post(f"{API}/api-keys/regenerate/", content=backwards, headers=headers)
    assert (is_replayed(again), again.content) == (True, first.content)


def test_a_key_means_the_same_in_quotes_and_without(acme: Account) -> None:
    ask(acme, "regenerate_api_keys", key='"one"')
    assert is_replayed(ask(acme, "regenerate_api_keys", key="one"))


def test_the_answer_is_the_old_one_whatever_has_happened_since(acme: Account) -> None:
    first = ask(acme, "regenerate_api_keys")
    acme.revoke()
    again = ask(acme, "regenerate_api_keys")
    assert again.content == first.content
    secret = again.json()["keys"]["live_secret"]["key"]
    assert acme.client.get(f"{API}/verify/", headers=bearer(secret)).json()["code"] == "key-revoked"


def test_twenty_at_once_are_one(acme: Account, superuser: Engine) -> None:
    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(lambda _: ask(acme, "regenerate_api_keys"), range(20)))
    done = [answer for answer in got if answer.is_success]
    assert len([answer for answer in done if not is_replayed(answer)]) == 1
    assert len({answer.content for answer in done}) == 1
    assert {problem(answer) for answer in got if not answer.is_success} <= {(409, "idempotency-in-progress")}
    # Those of the registration, and the new ones.
    assert count(superuser, "api_keys") == 8


def test_twenty_who_register_at_once_are_one(client: TestClient, superuser: Engine) -> None:
    nobody = Account(client, {})
    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(lambda _: ask(nobody, "register_tenant"), range(20)))
    assert {answer.status_code for answer in got} <= {201, 409}
    assert len({answer.content for answer in got if answer.is_success}) == 1
    assert "email-taken" not in {answer.json().get("code") for answer in got}
    assert count(superuser, "tenants") == 1


# 400, 422 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    # Of letters that no id in an answer has.
    ["", '""', "z y", '"z', 'z"', 'z"y', '"z"y"', "z\\y", "z\ty", "\xe9", "z" * 256, '"' + "z" * 254 + '"'],
)
def test_400_for_what_is_no_key(acme: Account, key: str) -> None:
    answer = ask(acme, "regenerate_api_keys", key=key.encode("latin-1"))  # type: ignore[arg-type]
    assert problem(answer) == (400, "invalid-request")
    assert {fault["pointer"] for fault in answer.json()["errors"]} == {"/header/Idempotency-Key"}
    assert not key or key not in answer.text


@pytest.mark.parametrize(
    "key", ["a", "a" * 255, '"' + "a" * 253 + '"', '"a b"', "~!#$%&'()*+,-./:;<=>?@[]^_`{|}"]
)
def test_a_key_may_be(acme: Account, key: str) -> None:
    assert not is_replayed(ask(acme, "regenerate_api_keys", key=key))
    assert is_replayed(ask(acme, "regenerate_api_keys", key=key))


def test_400_for_two_keys(acme: Account) -> None:
    headers = [("Authorization", f"Bearer {acme.tokens['access']}"), *[("Idempotency-Key", "one")] * 2]
    answer = acme.client.post(f"{API}/api-keys/regenerate/", json=REGENERATE, headers=headers)
    assert problem(answer) == (400, "invalid-request")


def test_where_it_changes_nothing_the_header_is_not_looked_at(acme: Account) -> None:
    headers = {**bearer(acme.tokens["access"]), "Idempotency-Key": "no key"}
    assert acme.client.get(f"{API}/me/", headers=headers).status_code == 200


def test_422_for_another_body(acme: Account, superuser: Engine) -> None:
    ask(acme, "regenerate_api_keys")
    before = everything(superuser)
    answer = ask(acme, "regenerate_api_keys", body={**REGENERATE, "grace_period_seconds": 1})
    assert problem(answer) == (422, "idempotency-key-reused")
    assert everything(superuser) == before


def test_422_for_another_operation(acme: Account) -> None:
    ask(acme, "regenerate_api_keys")
    assert problem(ask(acme, "revoke_api_keys", body=REGENERATE)) == (422, "idempotency-key-reused")


def test_a_body_that_is_no_good_claims_nothing(acme: Account) -> None:
    assert ask(acme, "regenerate_api_keys", body={}).status_code == 400
    assert ask(acme, "regenerate_api_keys").status_code == 200


# Whose key it is ---------------------------------------------------------------------------------


def test_another_tenant_may_choose_the_same_key(acme: Account, globex: Account) -> None:
    first, second = ask(acme, "regenerate_api_keys"), ask(globex, "regenerate_api_keys")
    assert second.is_success
    assert not is_replayed(second)
    assert first.json()["keys"].keys() == second.json()["keys"].keys()
    assert first.content != second.content


def test_another_user_of_the_tenant_gets_an_answer_of_their_own(
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
    first, second = ask(acme, "regenerate_api_keys"), ask(bob, "regenerate_api_keys")
    assert not is_replayed(second)
    assert first.content != second.content


def test_whoever_registers_is_known_by_their_address(client: TestClient) -> None:
    body = BODIES["register_tenant"]
    first = ask(Account(client, {}), "register_tenant")
    elsewhere = TestClient(client.app, client=("192.0.2.7", 50000))
    headers = {"Idempotency-Key": "one"}
    answer = elsewhere.post(f"{API}/register/", json=body, headers=headers)
    assert first.status_code == 201
    assert problem(answer) == (409, "email-taken")


def test_a_replay_needs_credentials_that_would_do(acme: Account, clock: TurnedClock) -> None:
    ask(acme, "regenerate_api_keys")
    clock.turn(minutes=16)
    assert problem(ask(acme, "regenerate_api_keys")) == (401, "token-expired")
    renewed = Account(acme.client, log_in(acme.client, acme.email).json())
    assert is_replayed(ask(renewed, "regenerate_api_keys"))


# Refusals and failures ---------------------------------------------------------------------------


def test_what_the_state_of_things_refused_is_kept(acme: Account, superuser: Engine) -> None:
    body = {**BODIES["register_tenant"], "email": acme.email}
    first = ask(acme, "register_tenant", body=body)
    before = everything(superuser)
    again = ask(acme, "register_tenant", body=body)
    assert problem(first) == (409, "email-taken")
    assert (is_replayed(again), again.status_code, again.content) == (True, 409, first.content)
    assert everything(superuser) == before


def test_what_a_rule_refused_is_kept(acme: Account) -> None:
    body = {"webhook_url": "https://127.0.0.1/"}
    with structlog.testing.capture_logs() as events:
        first, again = (ask(acme, "configure_webhook", body=body) for _ in range(2))
    assert problem(first) == (422, "webhook-url-refused")
    assert (is_replayed(again), again.content) == (True, first.content)
    said = [event["problem"] for event in events if event["event"] == "request"]
    assert said == ["webhook-url-refused"] * 2


def test_a_wrong_password_is_not_kept(acme: Account) -> None:
    wrong = {**BODIES["change_password"], "old_password": "not this one"}
    for _ in range(2):
        answer = ask(acme, "change_password", body=wrong)
        assert problem(answer) == (403, "wrong-password")
        assert not is_replayed(answer)
    assert ask(acme, "change_password").status_code == 200


def test_a_failure_is_not_kept(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    stripe.faults.once("create_account_link", Fault.SERVER_ERROR)
    assert ask(acme, "start_stripe_connect").status_code == 502
    assert count(superuser, "idempotency_keys") == 0
    answer = ask(acme, "start_stripe_connect")
    assert answer.status_code == 200
    assert not is_replayed(answer)


# In progress -------------------------------------------------------------------------------------


def begin(superuser: Engine) -> None:
    """As if the answer had been lost before it was kept."""
    with superuser.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET answer = NULL"))


def end_at(superuser: Engine, at: object) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET expires_at = :at"), {"at": at})


def test_409_while_the_first_is_being_answered(acme: Account, superuser: Engine, clock: TurnedClock) -> None:
    ask(acme, "regenerate_api_keys")
    begin(superuser)
    end_at(superuser, clock() + LEASE)
    answer = ask(acme, "regenerate_api_keys")
    assert problem(answer) == (409, "idempotency-in-progress")
    assert answer.headers["retry-after"] == "1"
    other = ask(acme, "regenerate_api_keys", body={**REGENERATE, "grace_period_seconds": 1})
    assert problem(other) == (422, "idempotency-key-reused")

    clock.now += LEASE - MOMENT
    assert ask(acme, "regenerate_api_keys").status_code == 409
    clock.now += MOMENT
    answer = ask(acme, "regenerate_api_keys")
    assert answer.status_code == 200
    assert not is_replayed(answer)


def test_a_day_later_the_key_is_free(acme: Account, clock: TurnedClock) -> None:
    ask(acme, "regenerate_api_keys")
    clock.now += KEPT - MOMENT
    acme = Account(acme.client, log_in(acme.client, acme.email).json())
    assert is_replayed(ask(acme, "regenerate_api_keys"))
    clock.now += MOMENT
    assert not is_replayed(ask(acme, "regenerate_api_keys"))
    assert is_replayed(ask(acme, "regenerate_api_keys"))


# At rest -----------------------------------------------------------------------------------------


def test_neither_what_was_asked_nor_what_was_answered_can_be_read(
    client: TestClient, superuser: Engine
) -> None:
    secret = ask(Account(client, {}), "register_tenant").json()["tenant"]["api_key_secret"]
    [row] = everything(superuser)["idempotency_keys"]
    assert secret not in row
    assert PASSWORD not in row
    assert "initech" not in row.lower()


def test_an_answer_is_read_with_the_key_that_sealed_it(
    acme: Account, settings: Settings, clock: TurnedClock
) -> None:
    first = ask(acme, "regenerate_api_keys")
    renewed = Keyring({**Keyring.parse(new_keyring("new")).keys, **settings.encryption_keys.keys})
    with CheckedClient(create_app(replace(settings, encryption_keys=renewed), clock=clock)) as after:
        again = ask(Account(after, acme.registered), "regenerate_api_keys")
    assert (is_replayed(again), again.content) == (True, first.content)
