"""Limits on the wire: who is counted, what a response reports of it, and when it is 429."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from app import create_app
from billing.counters import InProcess
from billing.http.addresses import network_of
from billing.http.document import Operation, load, operations
from billing.idempotency import LEASE
from billing.limits import HOUR, MINUTE, STANDARD, Brake, Policies, Policy
from billing.settings import Settings
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, Account, CheckedClient, bearer, log_in, register

OPERATIONS = {o.operation_id: o for o in operations(load())}
PUBLIC = {name for name, operation in OPERATIONS.items() if not operation.schemes}
SECURED = sorted(OPERATIONS.keys() - PUBLIC)
VERIFY = f"{API}/verify/"


def small_policies() -> Policies:
    """Policies that allow two requests of each kind."""
    return replace(
        STANDARD,
        by_address={name: Policy(policy.name, 2, MINUTE) for name, policy in STANDARD.by_address.items()},
        bad_credentials=Policy("credentials", 2, MINUTE),
        by_tenant={tier: Policy("default", 2, MINUTE) for tier in STANDARD.by_tenant},
    )


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "by Connexion"])
def tight_app(
    request: pytest.FixtureRequest,
    settings: Settings,
    shared_clock: TurnedClock,
    shared_counters: InProcess,
) -> Iterator[TestClient]:
    built = replace(settings, compiled_operations=request.param)
    app = create_app(built, clock=shared_clock, policies=small_policies(), counters=shared_counters)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def tight(tight_app: TestClient, clock: TurnedClock, uncounted: None, clean: None) -> TestClient:
    """A client of a server that allows two requests."""
    tight_app.cookies.clear()
    return tight_app


def ask(client: TestClient, operation: Operation, **more: Any) -> httpx.Response:
    # A valid body for no operation: a limit is checked before the body is.
    body = {"json": {}} if operation.method == "POST" else {}
    return client.request(operation.method, operation.path, **body, **more)


def limits_of(answer: httpx.Response) -> dict[str, tuple[int, int, int, int]]:
    """What the response reports of each limit: quota, window, remaining, seconds left."""
    quotas, left = (answer.headers.get_list(name, True) for name in ("ratelimit-policy", "ratelimit"))
    reported = {}
    for policy, state in zip(quotas, left, strict=True):
        (name, q, w), (again, r, t) = policy.split(";"), state.split(";")
        assert name == again
        assert (q[:2], w[:2], r[:2], t[:2]) == ("q=", "w=", "r=", "t=")
        reported[name.strip('"')] = tuple(int(part[2:]) for part in (q, w, r, t))
    return reported  # type: ignore[return-value]


def assert_limited(answer: httpx.Response, limit: str) -> None:
    """Assert that it is 429, in its problem, its limit headers and `Retry-After`."""
    assert (answer.status_code, answer.json()["code"]) == (429, "rate-limited")
    assert limit in answer.json()["detail"]
    _, window, remaining, seconds = limits_of(answer)[limit]
    assert remaining == 0
    assert 1 <= seconds == int(answer.headers["retry-after"]) <= window


# Every operation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operation_id", sorted(PUBLIC))
def test_a_public_operation_is_counted_by_address(
    tight: TestClient, clock: TurnedClock, operation_id: str
) -> None:
    operation, name = OPERATIONS[operation_id], STANDARD.by_address[operation_id].name
    passed = [ask(tight, operation) for _ in range(2)]
    assert [answer.status_code for answer in passed] == [400, 400]
    assert [limits_of(answer)[name][:3] for answer in passed] == [(2, 60, 1), (2, 60, 0)]
    refused = ask(tight, operation)
    assert_limited(refused, name)
    clock.turn(seconds=int(refused.headers["retry-after"]))
    assert ask(tight, operation).status_code == 400


@pytest.mark.parametrize("operation_id", SECURED)
def test_a_secured_operation_is_counted_by_tenant(
    tight: TestClient, clock: TurnedClock, operation_id: str
) -> None:
    acme = Account(tight, register(tight).json())
    credentials = bearer(acme.tokens["access"])
    answers = [ask(tight, OPERATIONS["get_current_user"], headers=credentials) for _ in range(2)]
    assert [limits_of(answer)["default"][:3] for answer in answers] == [(2, 60, 1), (2, 60, 0)]
    refused = ask(tight, OPERATIONS[operation_id], headers=credentials)
    assert_limited(refused, "default")
    clock.turn(seconds=int(refused.headers["retry-after"]))
    answer = ask(tight, OPERATIONS[operation_id], headers=credentials)
    assert answer.status_code != 429
    assert limits_of(answer)["default"][2] == 1


@pytest.mark.parametrize("operation_id", SECURED)
def test_429_after_repeated_missing_or_bad_credentials(tight: TestClient, operation_id: str) -> None:
    operation = OPERATIONS[operation_id]
    missing, bad = ask(tight, operation), ask(tight, operation, headers=bearer("nonsense"))
    assert [missing.status_code, bad.status_code] == [401, 401]
    assert [limits_of(answer)["credentials"][2] for answer in (missing, bad)] == [1, 0]
    for credentials in ({}, bearer("nonsense"), {"X-API-Key": "nonsense"}):
        refused = ask(tight, operation, headers=credentials)
        assert_limited(refused, "credentials")
        assert "www-authenticate" not in refused.headers


# Who is counted ----------------------------------------------------------------------------------


def test_unauthenticated_requests_do_not_lock_out_tenants_at_the_same_address(tight: TestClient) -> None:
    acme = Account(tight, register(tight).json())
    for _ in range(5):
        tight.get(VERIFY)
    assert tight.get(VERIFY).status_code == 429
    assert acme.get("/verify/").status_code == 200


def test_tenants_are_counted_separately_and_the_secret_keys_of_one_together(tight: TestClient) -> None:
    acme = Account(tight, register(tight).json())
    globex = Account(tight, register(tight, "Globex Ltd.").json())
    live, test = ({"X-API-Key": acme.tenant[name]} for name in ("api_key_secret", "api_key_test_secret"))
    answers = [tight.get(VERIFY, headers=headers) for headers in (live, test)]
    assert [limits_of(answer)["default"][2] for answer in answers] == [1, 0]
    assert tight.get(VERIFY, headers=live).status_code == 429
    assert globex.get("/me/").status_code == 200


def test_requests_with_a_publishable_key_cannot_lock_out_the_tenant(tight: TestClient) -> None:
    acme = Account(tight, register(tight).json())
    public, secret = ({"X-API-Key": acme.tenant[name]} for name in ("api_key_public", "api_key_secret"))
    assert [tight.get(VERIFY, headers=public).status_code for _ in range(3)] == [200, 200, 429]
    assert tight.get(VERIFY, headers=secret).status_code == 200
    assert acme.get("/api-keys/").status_code == 200


def test_requests_with_a_secret_key_cannot_keep_users_from_revoking_it(tight: TestClient) -> None:
    acme = Account(tight, register(tight).json())
    secret = {"X-API-Key": acme.tenant["api_key_secret"]}
    assert [tight.get(VERIFY, headers=secret).status_code for _ in range(3)] == [200, 200, 429]
    revoked = acme.post("/api-keys/revoke/", {"key_type": "all", "confirm": True})
    assert (revoked.status_code, limits_of(revoked)["default"][2]) == (200, 1)


def test_forbidden_requests_are_counted_too(tight: TestClient) -> None:
    headers = bearer(register(tight).json()["tenant"]["api_key_public"])
    answers = [tight.post(f"{API}/webhooks/test/", headers=headers).status_code for _ in range(3)]
    assert answers == [403, 403, 429]


def test_forbidden_test_deliveries_do_not_use_up_their_limit(acme: Account) -> None:
    headers = bearer(acme.tenant["api_key_public"])
    for _ in range(11):
        assert acme.client.post(f"{API}/webhooks/test/", headers=headers).status_code == 403
    assert limits_of(acme.post("/webhooks/test/", {}))["test-deliveries"][2] == 9


def test_an_expired_token_is_not_counted_as_bad_credentials(tight: TestClient, clock: TurnedClock) -> None:
    acme = Account(tight, register(tight).json())
    clock.turn(minutes=16)
    answers = [acme.get("/me/") for _ in range(4)]
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(401, "token-expired")}


def test_a_wrong_password_is_not_counted_as_bad_credentials(tight: TestClient) -> None:
    answer = log_in(tight, "nobody@acme.example", "wrong")
    assert answer.status_code == 401
    assert limits_of(answer).keys() == {"login", "login-failures"}


def test_a_stolen_session_cannot_block_its_owners_password_change(acme: Account) -> None:
    for _ in range(6):
        change(acme, "wrong")
    assert change(acme, PASSWORD).status_code == 429
    owner = Account(acme.client, {**acme.registered, **log_in(acme.client, acme.email).json()})
    assert change(owner, PASSWORD).status_code == 200


@pytest.mark.parametrize(("tier", "quota"), [("free", 600), ("pro", 3000), ("enterprise", 12_000)])
def test_a_tier_has_its_own_limit(acme: Account, superuser: Engine, tier: str, quota: int) -> None:
    with superuser.begin() as connection:
        connection.execute(text("UPDATE tenants SET tier = :tier"), {"tier": tier})
    assert limits_of(acme.get("/verify/"))["default"][:3] == (quota, 60, quota - 1)


def test_a_test_delivery_counts_towards_two_limits(acme: Account) -> None:
    answer = acme.post("/webhooks/test/", {})
    assert answer.status_code == 409
    assert limits_of(answer).keys() == {"default", "test-deliveries"}
    assert limits_of(answer)["test-deliveries"][:3] == (10, 60, 9)


@pytest.mark.parametrize(
    ("path", "body", "limit"),
    [
        ("/change-password/", {"old_password": PASSWORD, "new_password": "a" * 12}, "password-changes"),
        ("/api-keys/regenerate/", {}, "key-changes"),
        ("/api-keys/revoke/", {"mode": "test"}, None),
        ("/stripe/connect/", {}, "stripe-connect"),
        ("/stripe/status/", None, "stripe-status"),
    ],
)
def test_costly_operations_count_towards_their_own_limit_too(
    acme: Account, path: str, body: dict[str, str] | None, limit: str | None
) -> None:
    answer = acme.get(path) if body is None else acme.post(path, body)
    assert limits_of(answer).keys() - {"password-failures"} == {"default", limit} - {None}


def test_a_repeat_of_a_request_in_progress_costs_nothing(
    acme: Account, superuser: Engine, clock: TurnedClock
) -> None:
    headers = bearer(acme.tokens["access"]) | {"Idempotency-Key": "once"}
    body = {"key_type": "test", "confirm": True}

    def regenerate() -> httpx.Response:
        return acme.client.post(f"{API}/api-keys/regenerate/", json=body, headers=headers)

    assert limits_of(regenerate())["key-changes"][2] == 299
    with superuser.begin() as connection:  # As if its server had been lost before the response was stored.
        lost = text("UPDATE idempotency_keys SET answer = NULL, expires_at = :at")
        connection.execute(lost, {"at": clock() + LEASE})
    for _ in range(3):
        repeated = regenerate()
        assert (repeated.status_code, repeated.json()["code"]) == (409, "idempotency-in-progress")
        assert limits_of(repeated)["key-changes"][2] == 298


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002::/64"),
        ("2001:db8:1:2::", "20010db800010002::/64"),
        ("2001:db8:1:3::", "20010db800010003::/64"),
        ("local", "local"),
    ],
)
def test_an_ipv6_address_is_counted_by_its_64_bit_prefix(address: str, network: str) -> None:
    assert network_of(address) == network


def test_pages_and_unknown_paths_are_not_limited(client: TestClient) -> None:
    for path in ("/healthz", "/docs/", "/openapi.json", "/nothing/"):
        assert "ratelimit" not in client.get(path).headers


# Wrong passwords ---------------------------------------------------------------------------------


def test_429_after_five_wrong_passwords_for_one_account(acme: Account, clock: TurnedClock) -> None:
    for left in (4, 3, 2, 1, 0):
        wrong = log_in(acme.client, acme.email, "wrong")
        assert wrong.status_code == 401
        assert limits_of(wrong)["login-failures"][:3] == (5, 300, left)
    # Not even the right one is checked, in whatever case the email is.
    refused = log_in(acme.client, acme.email.upper())
    assert_limited(refused, "login-failures")
    clock.turn(seconds=int(refused.headers["retry-after"]))
    assert log_in(acme.client, acme.email).status_code == 200


def test_an_unknown_email_is_throttled_like_a_known_one(acme: Account) -> None:
    def outcomes(email: str) -> list[Any]:
        answers = [log_in(acme.client, email, "wrong") for _ in range(5)]
        return [(answer.status_code, answer.json()["code"]) for answer in answers]

    assert outcomes(acme.email) == outcomes("nobody@acme.example") == [(401, "invalid-credentials")] * 5


def test_a_successful_login_resets_the_failure_count(acme: Account, clock: TurnedClock) -> None:
    for _ in range(2):
        assert [log_in(acme.client, acme.email, "wrong").status_code for _ in range(4)] == [401] * 4
        assert log_in(acme.client, acme.email).status_code == 200
        clock.turn(minutes=1)


def test_wrong_passwords_do_not_lock_out_the_owner_at_another_address(
    settings: Settings, clock: TurnedClock, uncounted: None, clean: None
) -> None:
    app = create_app(settings, clock=clock)
    with CheckedClient(app, client=("198.51.100.7", 1)) as attacker:
        acme = Account(attacker, register(attacker).json())
        statuses = [log_in(attacker, acme.email, "wrong").status_code for _ in range(6)]
        owner = CheckedClient(app, client=("192.0.2.1", 1))
        owner.portal = attacker.portal
        assert statuses == [401] * 5 + [429]
        assert log_in(owner, acme.email).status_code == 200
        assert log_in(attacker, acme.email).status_code == 429


@dataclass
class BrakedServer:
    """A server whose brake is triggered by four failures, and its clients at any address."""

    app: ASGIApp
    first: TestClient

    def at(self, address: str) -> CheckedClient:
        client = CheckedClient(self.app, client=(address, 1))
        client.portal = self.first.portal
        return client

    def guess(self, email: str, *addresses: str) -> list[int]:
        return [log_in(self.at(address), email, "wrong").status_code for address in addresses]


@pytest.fixture
def braked(settings: Settings, clock: TurnedClock, clean: None) -> Iterator[BrakedServer]:
    brake = Brake(Policy("account-failures", 4, HOUR), Policy("braked-failures", 2, HOUR))
    app = create_app(settings, clock=clock, policies=replace(STANDARD, brakes={"log_in": brake}))
    with CheckedClient(app) as first:
        register(first)
        yield BrakedServer(app, first)


EMAIL = "ada@acme.example"
FOUR_ADDRESSES = [f"198.51.100.{number}" for number in range(4)]


@pytest.mark.parametrize("email", [EMAIL, "nobody@acme.example"])
def test_wrong_passwords_from_many_addresses_lower_the_limit_of_each(
    braked: BrakedServer, email: str
) -> None:
    assert braked.guess(email, *FOUR_ADDRESSES) == [401] * 4
    for address in ("198.51.100.9", FOUR_ADDRESSES[0]):
        assert braked.guess(email, *[address] * 3) == [401, 401, 429]
        refused = log_in(braked.at(address), email)
        assert_limited(refused, "braked-failures")
        assert limits_of(refused).keys() == {"login", "braked-failures"}


def test_wrong_passwords_from_many_addresses_do_not_lock_out_the_owner(braked: BrakedServer) -> None:
    braked.guess(EMAIL, *FOUR_ADDRESSES * 3)
    owner = braked.at("192.0.2.1")
    for _ in range(3):  # And the right one resets the count.
        assert [log_in(owner, EMAIL, guess).status_code for guess in ("wrong", PASSWORD)] == [401, 200]


def test_a_login_of_the_owner_does_not_release_the_brake(braked: BrakedServer) -> None:
    braked.guess(EMAIL, *FOUR_ADDRESSES)
    assert log_in(braked.at("192.0.2.1"), EMAIL).status_code == 200
    assert braked.guess(EMAIL, *["198.51.100.9"] * 3) == [401, 401, 429]


def test_right_passwords_do_not_trigger_the_brake(braked: BrakedServer) -> None:
    braked.guess(EMAIL, *FOUR_ADDRESSES[:3])
    for address in FOUR_ADDRESSES * 2:
        assert log_in(braked.at(address), EMAIL).status_code == 200
    answer = log_in(braked.at("192.0.2.1"), EMAIL, "wrong")
    assert "login-failures" in limits_of(answer)


def test_a_brake_applies_to_one_account_and_expires(braked: BrakedServer, clock: TurnedClock) -> None:
    braked.guess(EMAIL, *FOUR_ADDRESSES)
    other = log_in(braked.at("192.0.2.1"), "nobody@acme.example", "wrong")
    assert "login-failures" in limits_of(other)
    clock.turn(seconds=HOUR)
    assert braked.guess(EMAIL, *["198.51.100.9"] * 4) == [401] * 4


def test_429_after_ten_logins_from_one_address(acme: Account) -> None:
    answers = [log_in(acme.client, f"{number}@acme.example", "wrong") for number in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert_limited(answers[-1], "login")


def test_a_login_resets_neither_the_address_nor_another_account(acme: Account, globex: Account) -> None:
    tries = [log_in(acme.client, *login) for login in [(acme.email, "wrong"), (globex.email,)] * 5]
    assert [answer.status_code for answer in tries] == [401, 200] * 5
    assert [limits_of(answer)["login"][2] for answer in tries] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [limits_of(answer)["login-failures"][2] for answer in tries] == [4, 4, 3, 4, 2, 4, 1, 4, 0, 4]
    refused = log_in(acme.client, globex.email)
    assert_limited(refused, "login")


def change(acme: Account, old: str, new: str = "NewSecurePassword456!") -> httpx.Response:
    return acme.post("/change-password/", {"old_password": old, "new_password": new})


def test_429_after_five_wrong_old_passwords(acme: Account, clock: TurnedClock) -> None:
    assert [change(acme, "wrong").status_code for _ in range(5)] == [403] * 5
    refused = change(acme, PASSWORD)
    assert_limited(refused, "password-failures")
    clock.turn(seconds=int(refused.headers["retry-after"]))
    assert change(acme, PASSWORD).status_code == 200


def test_a_weak_new_password_is_not_counted_as_a_failure(acme: Account) -> None:
    assert [change(acme, PASSWORD, "acme.example1").status_code for _ in range(7)] == [422] * 7
    assert change(acme, PASSWORD).status_code == 200


def test_a_replayed_weak_new_password_is_not_counted_as_a_failure(acme: Account) -> None:
    body = {"old_password": PASSWORD, "new_password": "acme.example1"}
    for n in range(14):  # Each of them twice.
        headers = bearer(acme.tokens["access"]) | {"Idempotency-Key": f"weak-{n // 2}"}
        answer = acme.client.post(f"{API}/change-password/", json=body, headers=headers)
        assert answer.status_code == 422
    assert change(acme, PASSWORD).status_code == 200


def test_a_login_that_timed_out_is_not_counted_as_a_failure(
    settings: Settings, clock: TurnedClock, acme: Account, superuser: Engine
) -> None:
    short = replace(settings, request_timeout_seconds=1)
    with (
        CheckedClient(create_app(short, clock=clock), raise_server_exceptions=False) as client,
        ThreadPoolExecutor(5) as threads,
    ):
        with superuser.begin() as connection:
            connection.execute(text("LOCK TABLE users"))
            late = list(threads.map(lambda _: log_in(client, acme.email).status_code, range(5)))
        assert late == [503] * 5
        assert log_in(client, acme.email).status_code == 200


def test_users_are_throttled_separately(acme: Account, globex: Account) -> None:
    for _ in range(6):
        change(acme, "wrong")
    assert change(acme, PASSWORD).status_code == 429
    assert change(globex, PASSWORD).status_code == 200


# Off -----------------------------------------------------------------------------------------------


def test_no_limit_headers_when_limits_are_off(flooded: TestClient) -> None:
    answers = [log_in(flooded, "nobody@acme.example", "wrong") for _ in range(12)]
    assert {answer.status_code for answer in answers} == {401}
    assert not {"ratelimit", "ratelimit-policy"} & answers[0].headers.keys()
