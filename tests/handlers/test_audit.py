"""What each operation records in the audit log: actor, action, subject, reason, address and request."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from app import create_app
from billing import failed_logins, users
from billing.actors import SYSTEM, Actor
from billing.counters import InProcess
from billing.errors import DatabaseUnavailable
from billing.failed_logins import FailedLogins
from billing.limits import STANDARD
from billing.settings import Settings
from billing.storage.store import Store
from billing.tenants import Account as Known
from billing.users import normalise_email
from sandbox.stripe import Sandbox
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, Account, CheckedClient, bearer, log_in, register

ROOT = Path(__file__).parents[2]
URL = "https://hooks.acme.example/very/secret"
PATIENCE_SECONDS = 20


@pytest.fixture(scope="module")
def stripe_app(
    settings: Settings, running_stripe: Sandbox, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    with_stripe = replace(
        settings,
        stripe_secret_key=running_stripe.secret_key,
        stripe_connect_client_id=running_stripe.client_id,
        stripe_api_base=running_stripe.url,
        stripe_connect_base=running_stripe.url,
    )
    app = create_app(with_stripe, clock=shared_clock, counters=shared_counters)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(
    stripe_app: TestClient, stripe: Sandbox, clock: TurnedClock, uncounted: None, clean: None
) -> TestClient:
    """Overrides the shared `client`: its server is configured with Stripe."""
    stripe_app.cookies.clear()
    return stripe_app


def rows_of(superuser: Engine, account: Account, action: str) -> list[Any]:
    query = "SELECT * FROM audit_log WHERE tenant_id = :id AND action = :action ORDER BY sequence"
    with superuser.connect() as connection:
        values = {"id": account.tenant["id"], "action": action}
        return list(connection.execute(text(query), values).all())


def await_row(superuser: Engine, account: Account, action: str) -> Any:
    """Wait for the row, which is written a second after its request."""
    [row] = await_rows(superuser, account, action, 1)
    return row


def await_rows(superuser: Engine, account: Account, action: str, number: int) -> list[Any]:
    """Wait for exactly this number of rows; returns them in order."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(rows := rows_of(superuser, account, action)) < number:
        assert time.monotonic() < deadline, "It was never written."
        time.sleep(0.05)
    assert len(rows) == number
    return rows


# Each change -------------------------------------------------------------------------------------


def delete(account: Account, path: str) -> httpx.Response:
    return account.client.delete(f"{API}{path}", headers=bearer(account.tokens["access"]))


def change_password(account: Account, old: str = PASSWORD) -> httpx.Response:
    return account.post("/change-password/", {"old_password": old, "new_password": "NewSecurePassword456!"})


def configure(account: Account) -> httpx.Response:
    return account.post("/webhooks/config/", {"webhook_url": URL})


def revoke(account: Account) -> httpx.Response:
    body = {"key_type": "live", "confirm": True, "reason": "leaked in a screenshot"}
    return account.post("/api-keys/revoke/", body)


def remove(account: Account, stripe: Sandbox) -> httpx.Response:
    configure(account)
    return delete(account, "/webhooks/config/")


def start_connect(account: Account) -> httpx.Response:
    return account.client.post(f"{API}/stripe/connect/", headers=bearer(account.tokens["access"]))


def complete_connect(account: Account, stripe: Sandbox) -> httpx.Response:
    url = stripe.approve(start_connect(account).json()["url"])
    return account.client.get(url, follow_redirects=False)


def decline_connect(account: Account, stripe: Sandbox) -> httpx.Response:
    return account.client.get(stripe.decline(start_connect(account).json()["url"]), follow_redirects=False)


def disconnect(account: Account, stripe: Sandbox) -> httpx.Response:
    complete_connect(account, stripe)
    return delete(account, "/stripe/disconnect/")


# Stands for the id of the account at Stripe, whatever it is.
ACCOUNT = "the account"

Act = Callable[[Account, Sandbox], httpx.Response]
# The call, and the row's actor kind, subject and reason.
CHANGES: dict[str, tuple[Act, str, str | None, str | None]] = {
    "user.logged_in": (lambda a, s: log_in(a.client, a.email), "anonymous", "ada@acme.example", None),
    "user.password_changed": (lambda a, s: change_password(a), "user", "ada@acme.example", None),
    "api_key.regenerated": (
        lambda a, s: a.post("/api-keys/regenerate/", {"key_type": "test", "confirm": True}),
        "user",
        "test",
        None,
    ),
    "api_key.revoked": (lambda a, s: revoke(a), "user", "live", "leaked in a screenshot"),
    "stripe.connect_started": (lambda a, s: start_connect(a), "user", "oauth", None),
    "stripe.connected": (complete_connect, "anonymous", ACCOUNT, None),
    "stripe.connect_refused": (decline_connect, "anonymous", None, "access-denied"),
    "stripe.disconnected": (disconnect, "user", ACCOUNT, None),
    "webhook.configured": (lambda a, s: configure(a), "user", "hooks.acme.example", None),
    "webhook.removed": (remove, "user", "hooks.acme.example", None),
}


@pytest.mark.parametrize("action", CHANGES)
def test_each_change_is_audited(acme: Account, stripe: Sandbox, superuser: Engine, action: str) -> None:
    act, actor, subject, reason = CHANGES[action]
    answer = act(acme, stripe)
    assert (answer.status_code < 300) == (action != "stripe.connect_refused"), answer.text
    [row] = rows_of(superuser, acme, action)
    named = row.subject if subject != ACCOUNT else dict.fromkeys(stripe.accounts, ACCOUNT)[row.subject]
    assert (row.actor_kind, named, row.reason) == (actor, subject, reason)
    assert row.actor_id == (UUID(acme.registered["user"]["id"]) if actor == "user" else None)
    assert (row.address, row.request_id) == ("testclient", answer.headers["x-request-id"])


def test_a_registration_is_audited_in_two_rows(client: TestClient, superuser: Engine) -> None:
    answer = register(client)
    account = Account(client, answer.json())
    for action, subject in (("tenant.registered", "acme-inc"), ("user.added", "ada@acme.example")):
        [row] = rows_of(superuser, account, action)
        assert (row.actor_kind, row.actor_id, row.subject) == ("anonymous", None, subject)
        assert (row.address, row.request_id) == ("testclient", answer.headers["x-request-id"])


# Each failure ------------------------------------------------------------------------------------


def test_a_failed_login_is_audited_with_its_address(acme: Account, superuser: Engine) -> None:
    answer = log_in(acme.client, acme.email.upper(), "wrong password")
    assert answer.status_code == 401
    row = await_row(superuser, acme, "user.login_failed")
    assert (row.actor_kind, row.actor_id, row.subject) == ("anonymous", None, acme.email)
    assert (row.address, row.request_id) == ("testclient", answer.headers["x-request-id"])
    assert row.details == {"cause": "wrong password"}


def test_a_wrong_old_password_is_audited(acme: Account, superuser: Engine) -> None:
    answer = change_password(acme, old="wrong password")
    assert answer.status_code == 403
    row = await_row(superuser, acme, "user.password_change_failed")
    assert (str(row.actor_id), row.subject) == (acme.registered["user"]["id"], acme.email)
    assert (row.address, row.request_id) == ("testclient", answer.headers["x-request-id"])


def test_a_flush_with_nothing_queued_does_nothing(store: Store, clock: TurnedClock) -> None:
    failed = FailedLogins(clock)
    assert failed.waiting == 0
    failed.flush(store)


@pytest.fixture
def throttling_client(settings: Settings, clock: TurnedClock, clean: None) -> Iterator[CheckedClient]:
    """A client of a server that limits only wrong passwords."""
    policies = replace(STANDARD, by_address={})
    with CheckedClient(create_app(settings, clock=clock, policies=policies)) as client:
        yield client


def test_throttled_logins_are_audited_once_per_window(
    throttling_client: CheckedClient, superuser: Engine, clock: TurnedClock
) -> None:
    acme = Account(throttling_client, register(throttling_client).json())
    for window in (1, 2):
        answers = [log_in(throttling_client, acme.email.upper(), "wrong password") for _ in range(8)]
        assert [answer.status_code for answer in answers] == [401] * 5 + [429] * 3
        await_rows(superuser, acme, "user.login_failed", 5 * window)
        *_, row = await_rows(superuser, acme, "user.login_throttled", window)
        assert (row.actor_kind, row.actor_id, row.subject) == ("anonymous", None, acme.email)
        assert (row.address, row.request_id) == ("testclient", answers[5].headers["x-request-id"])
        assert row.details == {"limit": "login-failures"}
        clock.turn(seconds=int(answers[-1].headers["retry-after"]))


def test_failed_logins_of_an_unknown_email_are_not_audited(acme: Account, superuser: Engine) -> None:
    for email in ("nobody@acme.example", acme.email):
        assert log_in(acme.client, email, "wrong password").status_code == 401
    await_row(superuser, acme, "user.login_failed")
    with superuser.connect() as connection:
        query = text("SELECT subject FROM audit_log WHERE action = 'user.login_failed'")
        assert list(connection.scalars(query)) == [acme.email]


def test_throttled_logins_of_an_unknown_email_are_not_audited(
    acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    failed = FailedLogins(clock)
    failed.note_throttled(SYSTEM, "nobody@acme.example", "login-failures")
    assert failed.waiting == 1
    failed.flush(store)
    assert failed.waiting == 0
    assert not rows_of(superuser, acme, "user.login_throttled")


def test_throttled_logins_are_attributed_to_the_right_user(
    acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    tenant_id = UUID(acme.tenant["id"])
    bob = users.new_user(tenant_id, {"email": "bob@acme.example"}, role="developer", now=clock())
    with store.tenant(tenant_id) as tx:
        users.add(tx, bob, password_hash="-", now=clock())
    failed = FailedLogins(clock)
    failed.note_throttled(SYSTEM, bob.email, "login-failures")
    failed.flush(store)
    [row] = rows_of(superuser, acme, "user.login_throttled")
    assert row.subject == bob.email


def test_a_full_queue_of_failed_logins_drops_the_oldest(
    known: Known,
    acme: Account,
    store: Store,
    superuser: Engine,
    clock: TurnedClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failed_logins, "MOST", 3)
    failed = FailedLogins(clock)
    for number in range(5):
        failed.note("user.login_failed", SYSTEM, known.user, str(number))
    assert failed.waiting == 3
    failed.flush(store)
    assert [row.details["cause"] for row in rows_of(superuser, acme, "user.login_failed")] == ["2", "3", "4"]


def test_a_throttled_password_change_is_not_audited_as_a_login(acme: Account, superuser: Engine) -> None:
    statuses = [change_password(acme, old="wrong password").status_code for _ in range(7)]
    assert statuses == [403] * 5 + [429] * 2
    await_rows(superuser, acme, "user.password_change_failed", 5)
    assert not rows_of(superuser, acme, "user.login_throttled")


@pytest.fixture
def known(acme: Account, store: Store) -> Known:
    with store.platform() as platform:
        found = platform.find_account(normalise_email(acme.email))
    assert found
    return found


def test_failed_logins_stay_queued_while_the_database_is_unavailable(
    known: Known, acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    failed = FailedLogins(clock)
    for cause in ("first", "second"):
        failed.note("user.login_failed", Actor("anonymous"), known.user, cause)
    away = Store(store._vault, connections=1)
    with pytest.raises(DatabaseUnavailable):
        failed.flush(away)
    assert failed.waiting == 2
    failed.flush(store)
    rows = rows_of(superuser, acme, "user.login_failed")
    assert [row.details["cause"] for row in rows] == ["first", "second"]
    assert failed.waiting == 0


def test_simultaneous_flushes_write_each_row_once(
    known: Known, acme: Account, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    failed = FailedLogins(clock)
    for number in range(40):
        failed.note("user.login_failed", SYSTEM, known.user, str(number))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(failed.flush, [store, store]))
    rows = rows_of(superuser, acme, "user.login_failed")
    assert sorted(int(row.details["cause"]) for row in rows) == list(range(40))


def test_a_failed_login_of_a_deleted_tenant_is_discarded(
    known: Known, store: Store, superuser: Engine, acme: Account, clock: TurnedClock
) -> None:
    failed = FailedLogins(clock)
    stranger = replace(known.user, tenant_id=UUID(int=1))
    failed.note("user.login_failed", SYSTEM, stranger, "of a tenant that is gone")
    failed.note("user.login_failed", SYSTEM, known.user, "kept")
    failed.flush(store)
    assert failed.waiting == 0
    assert [row.details["cause"] for row in rows_of(superuser, acme, "user.login_failed")] == ["kept"]


# The list of actions -----------------------------------------------------------------------------


def recorded_in(path: Path) -> Iterator[str]:
    """Every action named in a call of `audit.record`, or assigned in `failed_logins.py`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("audit.record"):
            yield from names_in(node.args[0])
        if isinstance(node, ast.Assign) and path.name == "failed_logins.py":
            yield from names_in(node.value)


def names_in(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and re.fullmatch(r"[a-z_]+\.[a-z_]+", str(inner.value)):
            yield str(inner.value)


def test_the_documented_actions_are_exactly_those_recorded() -> None:
    recorded = {name for path in (ROOT / "billing").rglob("*.py") for name in recorded_in(path)}
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", (ROOT / "docs/audit.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == recorded
    assert recorded >= {*CHANGES, "tenant.enabled", "tenant.disabled", "user.login_failed"}
