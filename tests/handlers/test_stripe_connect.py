"""Operations 8–11 (Stripe Connect), by status, and what the worker does after them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

import httpx
import orjson
import pytest
import structlog
from jsonschema_rs import Draft202012Validator
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from app import create_app
from billing import gateway, users
from billing.assembly import stripe_connections_for
from billing.counters import InProcess
from billing.errors import StripeAlreadyConnected
from billing.http.lanes import STRIPE_THREADS
from billing.ids import new_id
from billing.settings import Settings
from billing.storage.store import Store
from billing.stripe_connect import CHECK, DEAUTHORIZE, Grant, forget_states, hashed, note
from billing.stripe_connect import Account as StripeAccount
from billing.stripe_connect import connect as connect_account
from billing.stripe_connect import disconnect as end_connection
from billing.stripe_connections import StripeConnections
from billing.tasks import Task
from billing.worker import Worker
from sandbox.accounts import Status
from sandbox.faults import Fault
from sandbox.stripe import Sandbox
from tests.answers import COMPONENTS
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, Account, CheckedClient, bearer, log_in, register, waits_for_a_lock

CONNECT, CALLBACK = f"{API}/stripe/connect/", f"{API}/stripe/callback/"
STATUS, DISCONNECT = f"{API}/stripe/status/", f"{API}/stripe/disconnect/"
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
RETURN_URL = "https://app.acme.example/settings?tab=payments#stripe"
FORM = "application/x-www-form-urlencoded"
STATUSES = ("active", "incomplete", "restricted", "pending", "under_review", "rejected")

# The timeout of calls to Stripe in these tests, and how much longer a busy machine may take.
PATIENCE_SECONDS = 1.0
LATE_SECONDS = 2.0


# An app with a Stripe ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripe_settings(settings: Settings, running_stripe: Sandbox) -> Settings:
    return replace(
        settings,
        stripe_secret_key=running_stripe.secret_key,
        stripe_connect_client_id=running_stripe.client_id,
        stripe_api_base=running_stripe.url,
        stripe_connect_base=running_stripe.url,
    )


@pytest.fixture(scope="module")
def stripe_app(
    stripe_settings: Settings, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "TOTAL_SECONDS", PATIENCE_SECONDS)
        # Otherwise it would still be open in the next test.
        patch.setattr(gateway.CircuitBreaker, "OPEN_SECONDS", 0)
        app = create_app(stripe_settings, clock=shared_clock, counters=shared_counters)
        with CheckedClient(app, raise_server_exceptions=False) as client:
            yield client


@pytest.fixture
def client(
    stripe_app: TestClient, stripe: Sandbox, clock: TurnedClock, uncounted: None, clean: None
) -> TestClient:
    """Overrides the shared `client`: its server is configured with Stripe."""
    stripe_app.cookies.clear()
    return stripe_app


@pytest.fixture
def connections(stripe_settings: Settings, store: Store, clock: TurnedClock) -> StripeConnections:
    """The `StripeConnections` of the worker."""
    return stripe_connections_for(stripe_settings, store, clock)


@pytest.fixture
def worker(store: Store, connections: StripeConnections, clock: TurnedClock) -> Worker:
    jobs = {CHECK: connections.check, DEAUTHORIZE: connections.deauthorize}
    return Worker(store, jobs, clock, threads=1)


def take_due(worker: Worker) -> list[Task]:
    """Take the due tasks about Stripe."""
    due = [worker._store.take_due(queue, worker._clock(), most=100) for queue in ("general", "checks")]
    return [task for taken in due for task in taken if task.kind in (CHECK, DEAUTHORIZE)]


def run_due(worker: Worker) -> list[str]:
    """Execute the due tasks about Stripe; returns their kinds."""
    taken = take_due(worker)
    for task in taken:
        worker.do(task)
    return [task.kind for task in taken]


# An owner's actions ------------------------------------------------------------------------------


def start(account: Account, headers: dict[str, str] | None = None, **asked: str) -> httpx.Response:
    given = bearer(account.tokens["access"]) | (headers or {})
    return account.client.post(CONNECT, headers=given, **({"json": asked} if asked else {}))


def agree(account: Account, stripe: Sandbox, status: str = "active", **asked: str) -> str:
    """Approve at Stripe; returns the callback URL that Stripe sends the owner's browser to."""
    return stripe.approve(start(account, **asked).json()["url"], status)


def call_back(client: TestClient, url: str, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.get(url, headers=given, follow_redirects=False)


def connect(account: Account, stripe: Sandbox, status: str = "active") -> str:
    """Connect an account; returns its id at Stripe."""
    answer = call_back(account.client, agree(account, stripe, status))
    assert answer.status_code == 200
    return answer.json()["account_id"]


def reconnect(account: Account, stripe: Sandbox, account_id: str) -> httpx.Response:
    url = stripe.approve(start(account).json()["url"], account_id=account_id)
    return call_back(account.client, url)


def status(account: Account) -> dict[str, Any]:
    answer = account.get("/stripe/status/")
    assert answer.status_code == 200
    return answer.json()


def disconnect(account: Account) -> httpx.Response:
    return account.client.delete(DISCONNECT, headers=bearer(account.tokens["access"]))


def log_in_later(account: Account, clock: TurnedClock, **later: float) -> None:
    """The owner logs in again, later."""
    clock.turn(**later)
    account.registered["tokens"] = log_in(account.client, account.email).json()["tokens"]


def shown(account: Account) -> tuple[str | None, str]:
    """The account and the status in the tenant's details."""
    tenant = account.get("/details/").json()["tenant"]
    return tenant["stripe_connect_account_id"], tenant["stripe_connect_status"]


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def state_of(url: str) -> str:
    return query_of(url)["state"]


# What is stored ----------------------------------------------------------------------------------


def audited(superuser: Engine, account: Account) -> list[tuple[str, str | None, str | None]]:
    """The audited actions about Stripe, with subject and reason, oldest first."""
    rows = "SELECT action, subject, reason FROM audit_log WHERE tenant_id = :id AND action LIKE 'stripe.%' "
    return [tuple(row) for row in rows_of(superuser, rows + "ORDER BY sequence", id=account.tenant["id"])]


def stripe_events(superuser: Engine, account: Account) -> list[tuple[str, str]]:
    """The types and statuses of the tenant's events about Stripe, each validated by the OpenAPI document."""
    wanted = "SELECT sequence, type, body FROM events WHERE tenant_id = :id ORDER BY sequence"
    rows = rows_of(superuser, wanted, id=account.tenant["id"])
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    bodies = [orjson.loads(bytes(row.body)) for row in rows if row.type.startswith("stripe.")]
    for body in bodies:
        last = body["type"].rpartition(".")[2]
        event_validator(f"StripeAccount{last.capitalize()}Event").validate(body)
        assert body["tenant_id"] == account.tenant["id"]
    return [(body["type"], body["data"]["status"]) for body in bodies]


def event_validator(name: str) -> Any:
    schema = {"$ref": f"#/components/schemas/{name}", "components": COMPONENTS}
    return Draft202012Validator(schema, validate_formats=True)


def tasks(superuser: Engine) -> list[tuple[str, str]]:
    """The waiting tasks about Stripe, by kind and account."""
    wanted = "SELECT kind, subject FROM tasks WHERE kind LIKE 'stripe.%' ORDER BY kind"
    return [tuple(row) for row in rows_of(superuser, wanted)]


def rows_of(superuser: Engine, query: str, **values: Any) -> list[Any]:
    with superuser.connect() as connection:
        return list(connection.execute(text(query), values).all())


def change(superuser: Engine, statement: str, **values: Any) -> None:
    with superuser.begin() as connection:
        connection.execute(text(statement), values)


# connect -----------------------------------------------------------------------------------------


def test_connect_returns_the_url_to_send_the_browser_to(
    acme: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    answer = start(acme)
    assert answer.status_code == 200
    body = answer.json()
    asked = query_of(body["url"])
    assert body["flow"] == "oauth"
    assert (asked["state"], asked["redirect_uri"]) == (body["state"], body["redirect_uri"])
    assert (asked["scope"], asked["response_type"]) == ("read_write", "code")
    assert body["redirect_uri"] == f"http://testserver{CALLBACK}"
    clock.turn(minutes=10)
    assert body["expires_at"][:19] == clock.now.isoformat()[:19]
    assert stripe.calls == []
    assert "set-cookie" not in answer.headers


def test_only_a_digest_of_the_state_is_stored(acme: Account, superuser: Engine) -> None:
    state = start(acme).json()["state"]
    rows = rows_of(superuser, "SELECT s::text AS whole, s.digest FROM connect_states s")
    assert [row.digest for row in rows] == [hashed(state).hex()]
    assert state not in rows[0].whole


@pytest.mark.parametrize(
    "content_type", [None, FORM, "application/json", "text/plain", "multipart/form-data"]
)
def test_connect_accepts_an_empty_body_of_any_content_type(acme: Account, content_type: str | None) -> None:
    headers = {"content-length": "0"} | ({"content-type": content_type} if content_type else {})
    given = bearer(acme.tokens["access"]) | headers
    assert acme.client.post(CONNECT, headers=given, content=b"").status_code == 200


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b'{"flow": "express"}', "application/json", 400),
        (b'{"flow": null}', "application/json", 400),
        (b'{"return_url": "app.acme.example"}', "application/json", 400),
        (b'{"return_url": "javascript:alert(1)"}', "application/json", 400),
        (b'{"return_url": "https://app.acme.example/\\n"}', "application/json", 400),
        (b'{"return_url": null}', "application/json", 400),
        (b'{"redirect_uri": "https://evil.example/"}', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{", "application/json", 400),
        (b"flow=oauth", FORM, 415),
    ],
)
def test_connect_400_and_415(
    acme: Account, superuser: Engine, body: bytes, content_type: str, expected: int
) -> None:
    headers = bearer(acme.tokens["access"]) | {"content-type": content_type}
    assert acme.client.post(CONNECT, headers=headers, content=body).status_code == expected
    assert rows_of(superuser, "SELECT 1 FROM connect_states") == []


def test_401_without_a_session(acme: Account) -> None:
    for method, path in (("POST", CONNECT), ("GET", STATUS), ("DELETE", DISCONNECT)):
        assert acme.client.request(method, path).status_code == 401
        by_key = {"X-API-Key": acme.tenant["api_key_secret"]}
        assert acme.client.request(method, path, headers=by_key).status_code == 401
        as_bearer = bearer(acme.tenant["api_key_secret"])
        assert acme.client.request(method, path, headers=as_bearer).status_code == 403


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("owner", {"connect", "status", "disconnect"}), ("admin", {"status"}), ("developer", set())],
)
def test_allowed_operations_by_role(acme: Account, superuser: Engine, role: str, allowed: set[str]) -> None:
    change(superuser, "UPDATE users SET role = :role", role=role)
    statuses = {
        "connect": start(acme).status_code,
        "status": acme.get("/stripe/status/").status_code,
        "disconnect": disconnect(acme).status_code,
    }
    assert statuses == {name: 200 if name in allowed else 403 for name in statuses}


@pytest.mark.parametrize("flow", ["oauth", "account_link"])
def test_connect_409_when_connected(acme: Account, stripe: Sandbox, flow: str) -> None:
    connect(acme, stripe)
    answer = start(acme, flow=flow)
    assert (answer.status_code, answer.json()["code"]) == (409, "stripe-already-connected")
    assert stripe.called("create_account") == []


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/",
        "https://app.acme.example.evil.example/",
        "https://app.acme.example@evil.example/",
        "https://evil.example/#https://app.acme.example",
        "http://app.acme.example/",
        "https://app.acme.example:8443/",
        "https://app.acme.example\\@evil.example/",
        "https://APP.acme.example/",
    ],
)
def test_connect_422_for_a_return_url_of_another_origin(acme: Account, superuser: Engine, url: str) -> None:
    answer = start(acme, return_url=url)
    assert (answer.status_code, answer.json()["code"]) == (422, "return-url-refused")
    assert "evil" not in answer.text
    assert rows_of(superuser, "SELECT 1 FROM connect_states") == []


@pytest.fixture
def unconfigured(running_app: TestClient, clock: TurnedClock, clean: None) -> Account:
    """A tenant of a server without Stripe."""
    running_app.cookies.clear()
    return Account(running_app, register(running_app).json())


@pytest.mark.parametrize(
    ("flow", "named"), [("oauth", "STRIPE_CONNECT_CLIENT_ID"), ("account_link", "STRIPE_SECRET_KEY")]
)
def test_connect_503_names_the_missing_setting(unconfigured: Account, flow: str, named: str) -> None:
    answer = start(unconfigured, flow=flow)
    assert (answer.status_code, answer.json()["code"]) == (503, "stripe-not-configured")
    assert named in answer.json()["detail"]
    assert "retry-after" not in answer.headers


def test_other_operations_work_without_stripe_configured(unconfigured: Account) -> None:
    assert status(unconfigured)["status"] == "not_connected"
    assert disconnect(unconfigured).status_code == 200
    answer = call_back(unconfigured.client, f"{CALLBACK}?code=ac_1&state=unknown")
    assert (answer.status_code, answer.json()["code"]) == (400, "state-unknown")


def test_status_comes_from_the_cache_without_stripe_configured(
    unconfigured: Account, store: Store, clock: TurnedClock
) -> None:
    with store.tenant(UUID(unconfigured.tenant["id"]), exclusive=True) as tx:
        grant = Grant("acct_1AcmeExample", "read_write", livemode=False)
        connect_account(tx, grant, None, livemode=False, now=clock())
    body = status(unconfigured)
    assert (body["account_id"], body["status"], body["source"]) == ("acct_1AcmeExample", "pending", "cache")


# callback: success -------------------------------------------------------------------------------


@pytest.mark.parametrize("word", STATUSES)
def test_callback_connects_the_account(acme: Account, stripe: Sandbox, word: str) -> None:
    answer = call_back(acme.client, agree(acme, stripe, word))
    assert answer.status_code == 200
    body = answer.json()
    assert (body["account_id"], body["status"]) == (next(iter(stripe.accounts)), word)
    assert body["tenant"].keys() == {"id", "company_name", "slug", "is_active", "created_at"}
    assert body["tenant"]["id"] == acme.tenant["id"]
    assert shown(acme) == (body["account_id"], word)
    assert status(acme)["status"] == word


def test_callback_ignores_credentials(acme: Account, globex: Account, stripe: Sandbox) -> None:
    answer = call_back(acme.client, agree(globex, stripe), **bearer(acme.tokens["access"]))
    assert answer.json()["tenant"]["id"] == globex.tenant["id"]
    assert shown(acme) == (None, "not_connected")
    assert call_back(acme.client, agree(acme, stripe), Authorization="Bearer nonsense").status_code == 200


def test_callback_ignores_unknown_parameters(acme: Account, stripe: Sandbox) -> None:
    answer = call_back(acme.client, agree(acme, stripe) + "&added=next%20year&added=twice")
    assert answer.status_code == 200


def test_an_account_not_retrieved_in_the_callback_is_checked_later(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine, clock: TurnedClock
) -> None:
    stripe.faults.always("retrieve_account", Fault.SERVER_ERROR)
    answer = call_back(acme.client, agree(acme, stripe))
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")
    assert status(acme)["checked_at"] is None
    stripe.faults.clear()
    clock.turn(seconds=1)
    assert run_due(worker) == [CHECK]
    assert shown(acme) == (answer.json()["account_id"], "active")
    assert stripe_events(superuser, acme) == [
        ("stripe.account.connected", "pending"),
        ("stripe.account.updated", "active"),
    ]


def test_a_browser_gets_a_page(acme: Account, stripe: Sandbox) -> None:
    answer = call_back(acme.client, agree(acme, stripe), Accept=CHROME)
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == "text/html"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "The Stripe account is connected." in answer.text
    # The person may have been sent to Stripe by someone other than they think.
    assert "It belongs to Acme Inc." in answer.text


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "application/json, text/html;q=0.9", "", "nonsense"]
)
def test_other_clients_get_json(acme: Account, stripe: Sandbox, accept: str) -> None:
    answer = call_back(acme.client, agree(acme, stripe), Accept=accept)
    assert answer.json()["status"] == "active"


def test_a_browser_gets_errors_as_pages(client: TestClient) -> None:
    for query, expected in (("", 400), ("?state=unknown&code=ac_1", 400), ("?error=access_denied", 403)):
        answer = call_back(client, CALLBACK + query, Accept=CHROME)
        assert answer.status_code == expected
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_refusal_shown_to_a_browser_is_logged(acme: Account, stripe: Sandbox) -> None:
    asked = stripe.approve(start(acme, return_url=RETURN_URL).json()["url"])
    with structlog.testing.capture_logs() as events:
        assert call_back(acme.client, f"{CALLBACK}?error=access_denied", Accept=CHROME).status_code == 403
        statuses = [call_back(acme.client, asked).status_code for _ in range(2)]
    assert statuses == [303, 303]
    logged = [event.get("problem") for event in events if event["event"] == "request"]
    assert logged == ["access-denied", None, "state-used"]


def test_303_to_the_return_url(acme: Account, stripe: Sandbox) -> None:
    url = agree(acme, stripe, return_url=RETURN_URL)
    answer = call_back(acme.client, url, Accept=CHROME)
    assert answer.status_code == 303
    back = "https://app.acme.example/settings?tab=payments&stripe=connected#stripe"
    assert answer.headers["location"] == back
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.content == b""
    again = call_back(acme.client, url)
    assert again.status_code == 303
    assert query_of(again.headers["location"])["code"] == "state-used"
    assert shown(acme)[1] == "active"


def test_303_to_a_page_of_the_api_itself(acme: Account, stripe: Sandbox) -> None:
    answer = call_back(acme.client, agree(acme, stripe, return_url="http://testserver/ui/"))
    assert answer.headers["location"] == "http://testserver/ui/?stripe=connected"


def test_303_reports_the_error_to_the_return_url(acme: Account, stripe: Sandbox) -> None:
    url = stripe.decline(start(acme, return_url=RETURN_URL).json()["url"])
    answer = call_back(acme.client, url, Accept=CHROME)
    assert answer.status_code == 303
    assert query_of(answer.headers["location"]) == {
        "tab": "payments",
        "stripe": "error",
        "code": "access-denied",
    }


# callback: refusals and failures -----------------------------------------------------------------


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize(
    ("query", "expected", "code"),
    [
        ("", 400, "state-missing"),
        ("?code=ac_1", 400, "state-missing"),
        ("?code=ac_1&state=", 400, "state-missing"),
        ("?state=unknown", 400, "state-unknown"),
        ("?code=ac_1&state=unknown&scope=read_write", 400, "state-unknown"),
        ("?code=ac_1&state=%C3%A9%F0%9F%98%80", 400, "state-unknown"),
        ("?error=access_denied&state=unknown", 400, "state-unknown"),
        ("?error=access_denied", 403, "access-denied"),
        ("?error=access_denied&error_description=The+user+denied+your+request", 403, "access-denied"),
        ("?error=access_denied&state=", 403, "access-denied"),
        ("?error=invalid_scope", 403, "access-denied"),
        ("?state=a%00b", 400, "invalid-request"),
        (f"?state={'a' * 257}", 400, "invalid-request"),
        (f"?state=unknown&code={'a' * 257}", 400, "invalid-request"),
    ],
)
def test_callback_without_a_valid_state_changes_nothing(
    acme: Account, stripe: Sandbox, superuser: Engine, query: str, expected: int, code: str
) -> None:
    assert refusal(call_back(acme.client, CALLBACK + query)) == (expected, code)
    assert audited(superuser, acme) == []
    assert stripe.calls == []


def test_400_state_expired_after_ten_minutes(
    acme: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    url = agree(acme, stripe)
    clock.turn(minutes=10)
    assert refusal(call_back(acme.client, url)) == (400, "state-expired")
    assert stripe.called("token") == []
    # Anyone who has the URL may repeat it: that must not fill the log.
    assert audited(superuser, acme)[-1][0] == "stripe.connect_started"


def test_a_state_is_accepted_for_almost_ten_minutes(
    acme: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    url = agree(acme, stripe)
    clock.turn(minutes=9, seconds=59)
    assert call_back(acme.client, url).status_code == 200


def test_400_for_a_used_state(acme: Account, stripe: Sandbox) -> None:
    url = agree(acme, stripe)
    assert call_back(acme.client, url).status_code == 200
    assert refusal(call_back(acme.client, url)) == (400, "state-used")
    assert len(stripe.called("token")) == 1
    assert shown(acme)[1] == "active"


def test_a_reloaded_callback_page_is_not_audited(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    url = agree(acme, stripe)
    call_back(acme.client, url)
    before = audited(superuser, acme)
    assert refusal(call_back(acme.client, url)) == (400, "state-used")
    assert audited(superuser, acme) == before


def test_a_new_start_ends_the_tenants_earlier_state(acme: Account, globex: Account, stripe: Sandbox) -> None:
    old, theirs = agree(acme, stripe), agree(globex, stripe)
    new = agree(acme, stripe)
    assert refusal(call_back(acme.client, old)) == (400, "state-expired")
    assert call_back(acme.client, new).status_code == 200
    assert call_back(acme.client, theirs).status_code == 200


def test_a_disconnection_ends_what_was_started(acme: Account, globex: Account, stripe: Sandbox) -> None:
    ours, theirs = agree(acme, stripe), agree(globex, stripe)
    assert disconnect(acme).status_code == 200
    assert refusal(call_back(acme.client, ours)) == (400, "state-expired")
    assert call_back(acme.client, theirs).status_code == 200


def test_a_state_is_deleted_after_a_day(
    acme: Account, stripe: Sandbox, store: Store, clock: TurnedClock
) -> None:
    old = agree(acme, stripe)
    clock.turn(days=1, seconds=1)
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        forget_states(tx, now=clock())
    assert refusal(call_back(acme.client, old)) == (400, "state-unknown")


def test_403_access_denied_consumes_the_state(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    url = stripe.decline(start(acme).json()["url"])
    assert refusal(call_back(acme.client, url)) == (403, "access-denied")
    assert "denied your" not in call_back(acme.client, url).text
    assert refusal(call_back(acme.client, url)) == (400, "state-used")
    assert shown(acme) == (None, "not_connected")
    assert audited(superuser, acme)[1] == ("stripe.connect_refused", None, "access-denied")


def test_403_access_denied_if_stripe_omits_the_state(acme: Account, stripe: Sandbox) -> None:
    stripe.faults.once("decide", Fault.NO_STATE)
    started = start(acme).json()["url"]
    assert refusal(call_back(acme.client, stripe.decline(started))) == (403, "access-denied")
    assert call_back(acme.client, stripe.approve(started)).status_code == 200


@pytest.mark.parametrize("was", ["unknown", "used", "missing", "empty"])
def test_422_for_a_rejected_code(
    acme: Account, globex: Account, stripe: Sandbox, superuser: Engine, was: str
) -> None:
    other = agree(globex, stripe)
    call_back(globex.client, other)
    code = {
        "unknown": "code=ac_none",
        "used": f"code={query_of(other)['code']}",
        "empty": "code=",
        "missing": "",
    }
    answer = call_back(acme.client, f"{CALLBACK}?state={start(acme).json()['state']}&{code[was]}")
    assert refusal(answer) == (422, "code-rejected")
    assert audited(superuser, acme)[-1] == ("stripe.connect_refused", None, "code-rejected")
    assert shown(acme) == (None, "not_connected")


def test_409_for_an_account_of_another_tenant(
    acme: Account, globex: Account, stripe: Sandbox, superuser: Engine
) -> None:
    account_id = connect(globex, stripe)
    assert refusal(reconnect(acme, stripe, account_id)) == (409, "stripe-account-taken")
    assert audited(superuser, acme)[-1] == ("stripe.connect_refused", None, "stripe-account-taken")
    assert shown(acme) == (None, "not_connected")
    # It is the other tenant's, and is not deauthorized on this refusal.
    assert (DEAUTHORIZE, account_id) not in tasks(superuser)
    assert status(globex)["status"] == "active"


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.HANG, Fault.UNKNOWN_OAUTH_ERROR, Fault.EMPTY])
def test_502_if_the_code_cannot_be_exchanged(
    acme: Account, stripe: Sandbox, superuser: Engine, fault: Fault
) -> None:
    stripe.faults.once("token", fault)
    began = time.monotonic()
    assert refusal(call_back(acme.client, agree(acme, stripe))) == (502, "stripe-unavailable")
    assert time.monotonic() - began < PATIENCE_SECONDS + LATE_SECONDS
    assert audited(superuser, acme)[-1] == ("stripe.connect_refused", None, "stripe-unavailable")
    assert shown(acme) == (None, "not_connected")
    connect(acme, stripe)


def test_502_after_the_code_was_used_is_repaired_by_starting_again(acme: Account, stripe: Sandbox) -> None:
    stripe.faults.once("token", Fault.HANG_AFTER)
    url = agree(acme, stripe)
    assert refusal(call_back(acme.client, url)) == (502, "stripe-unavailable")
    assert refusal(call_back(acme.client, url)) == (400, "state-used")
    (account_id,) = stripe.accounts
    assert stripe.accounts[account_id].is_connected
    assert reconnect(acme, stripe, account_id).status_code == 200


@pytest.mark.parametrize(
    ("fault", "expected", "code"),
    [
        (Fault.WRONG_LIVEMODE, 502, "stripe-unavailable"),
        (Fault.READ_ONLY, 403, "access-denied"),
    ],
)
def test_an_unsuitable_grant_is_revoked_at_stripe(
    acme: Account,
    stripe: Sandbox,
    superuser: Engine,
    worker: Worker,
    fault: Fault,
    expected: int,
    code: str,
) -> None:
    stripe.faults.once("token", fault)
    assert refusal(call_back(acme.client, agree(acme, stripe))) == (expected, code)
    (account_id,) = stripe.accounts
    assert audited(superuser, acme)[-1] == ("stripe.connect_refused", None, code)
    assert shown(acme) == (None, "not_connected")
    assert run_due(worker) == [DEAUTHORIZE]
    assert not stripe.accounts[account_id].is_connected
    assert reconnect(acme, stripe, account_id).status_code == 200


def test_an_account_revoked_twice_has_one_deauthorize_task(
    acme: Account, stripe: Sandbox, superuser: Engine, worker: Worker
) -> None:
    # With two tasks, the first would free the account, and the second disconnect its next tenant.
    account_id = connect(acme, stripe)
    disconnect(acme)
    stripe.faults.once("token", Fault.READ_ONLY)
    url = stripe.approve(start(acme).json()["url"], account_id=account_id)
    assert refusal(call_back(acme.client, url)) == (403, "access-denied")
    assert tasks(superuser) == [(DEAUTHORIZE, account_id)]
    assert run_due(worker) == [DEAUTHORIZE]
    assert tasks(superuser) == []


def test_502_for_a_malformed_account_id(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    stripe.faults.once("token", Fault.MALFORMED_ACCOUNT)
    assert refusal(call_back(acme.client, agree(acme, stripe))) == (502, "stripe-unavailable")
    assert tasks(superuser) == []
    assert shown(acme) == (None, "not_connected")


@pytest.mark.parametrize(
    ("since", "expected", "code"),
    [
        ("UPDATE users SET role = 'admin'", 400, "state-expired"),
        ("UPDATE users SET is_active = false", 400, "state-expired"),
        ("UPDATE tenants SET is_active = false", 403, "tenant-disabled"),
    ],
)
def test_a_state_is_refused_once_its_owner_or_tenant_loses_the_right(
    acme: Account, stripe: Sandbox, superuser: Engine, since: str, expected: int, code: str
) -> None:
    url = agree(acme, stripe)
    change(superuser, since)
    assert refusal(call_back(acme.client, url)) == (expected, code)
    assert stripe.called("token") == []
    assert audited(superuser, acme)[-1][0] != "stripe.connected"


@pytest.mark.parametrize("same", [True, False])
def test_a_second_grant_is_revoked_unless_for_the_connected_account(
    acme: Account, stripe: Sandbox, store: Store, superuser: Engine, clock: TurnedClock, same: bool
) -> None:
    account_id = connect(acme, stripe)
    granted = account_id if same else "acct_1Another"
    with store.tenant(UUID(acme.tenant["id"]), exclusive=True) as tx:
        grant = Grant(granted, "read_write", livemode=False)
        refused = connect_account(tx, grant, None, livemode=False, now=clock())
    assert isinstance(refused, StripeAlreadyConnected)
    assert shown(acme) == (account_id, "active")
    revoked = [] if same else [(DEAUTHORIZE, granted)]
    assert tasks(superuser) == [(CHECK, account_id), *revoked]


# callback: bound to a browser --------------------------------------------------------------------

OUR_PAGE = {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}


def binding_of(answer: httpx.Response) -> str:
    given = re.fullmatch(
        r"__Host-connect=([A-Za-z0-9_-]{43}); Secure; HttpOnly; SameSite=Lax; Path=/; Max-Age=600",
        answer.headers["set-cookie"],
    )
    assert given
    return given[1]


def test_a_start_from_our_own_page_binds_the_state_to_the_browser(acme: Account, stripe: Sandbox) -> None:
    answer = start(acme, OUR_PAGE)
    binding = binding_of(answer)
    url = stripe.approve(answer.json()["url"])
    for cookie in (
        "",
        "__Host-connect=",
        f"__Host-connect={secrets.token_urlsafe(32)}",
        f"connect={binding}",
    ):
        assert refusal(call_back(acme.client, url, Cookie=cookie)) == (400, "state-unknown")
    assert stripe.called("token") == []
    # The other browsers did not use the state up.
    assert call_back(acme.client, url, Cookie=f"a=b; __Host-connect={binding}").status_code == 200


def test_another_browser_does_not_learn_the_return_url(acme: Account, stripe: Sandbox) -> None:
    answer = start(acme, OUR_PAGE, return_url=RETURN_URL)
    url = stripe.approve(answer.json()["url"])
    assert refusal(call_back(acme.client, url)) == (400, "state-unknown")
    bound = f"__Host-connect={binding_of(answer)}"
    assert call_back(acme.client, url, Cookie=bound).status_code == 303


def test_a_state_brought_by_another_browser_is_audited_with_its_address(
    acme: Account, stripe: Sandbox, superuser: Engine
) -> None:
    answer = call_back(acme.client, stripe.approve(start(acme, OUR_PAGE).json()["url"]))
    assert refusal(answer) == (400, "state-unknown")
    wanted = "SELECT actor_kind, address, request_id FROM audit_log WHERE action = 'stripe.connect_refused'"
    assert [tuple(row) for row in rows_of(superuser, wanted)] == [
        ("anonymous", "testclient", answer.headers["x-request-id"])
    ]


def test_a_browser_keeps_its_binding(acme: Account, globex: Account, stripe: Sandbox) -> None:
    first = binding_of(start(acme, OUR_PAGE))
    cookie = {"Cookie": f"__Host-connect={first}"}
    assert binding_of(start(globex, OUR_PAGE | cookie)) == first
    for planted in ("__Host-connect=short", f"x__Host-connect={first}", 'a="' + r"\1" * 15_000 + '"'):
        assert binding_of(start(acme, OUR_PAGE | {"Cookie": planted})) not in ("short", first)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://testserver"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://testserver"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://app.acme.example"},
        {"Sec-Fetch-Site": "none"},
        # Set under another host name, the cookie would not be sent to ours.
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "same-origin", "Host": "other.example"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "null"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://["},
    ],
)
def test_no_cookie_for_a_request_not_from_our_own_page(
    acme: Account, stripe: Sandbox, headers: dict[str, str]
) -> None:
    answer = start(acme, headers)
    assert "set-cookie" not in answer.headers
    url = stripe.approve(answer.json()["url"])
    assert call_back(acme.client, url, Cookie="__Host-connect=anything").status_code == 200


# callback: secrets -------------------------------------------------------------------------------


@pytest.fixture
def output(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], str]]:
    """All that was logged, before redaction, and all that was printed."""
    # The tests' own HTTP client logs the URLs that it requests.
    caplog.set_level("WARNING", logger="httpx")
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as events:

        def everything() -> str:
            return repr(events) + caplog.text + "".join(capfd.readouterr())

        yield everything


@pytest.mark.parametrize("accept", ["application/json", CHROME], ids=["json", "page"])
@pytest.mark.parametrize("fault", [None, Fault.SERVER_ERROR, Fault.READ_ONLY, Fault.UNKNOWN_OAUTH_ERROR])
def test_code_and_state_are_neither_logged_nor_echoed(
    acme: Account, stripe: Sandbox, output: Callable[[], str], accept: str, fault: Fault | None
) -> None:
    if fault is not None:
        stripe.faults.once("token", fault)
    url = agree(acme, stripe)
    state, code = state_of(url), query_of(url)["code"]
    answers = [call_back(acme.client, url, Accept=accept) for _ in range(2)]
    another = start(acme)
    # Stripe's refusal contains the code; if the tenant is connected, the second start is refused.
    unused = another.json()["state"] if another.status_code == 200 else f"{state}x"
    answers.append(call_back(acme.client, f"{CALLBACK}?state={unused}&code={code}", Accept=accept))
    everything = output() + "".join(answer.text + repr(answer.headers) for answer in answers)
    assert "complete_stripe_connect" in everything
    for secret in (state, unused, code, stripe.secret_key):
        assert secret not in everything


def test_no_table_contains_the_code_or_a_token(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    url = agree(acme, stripe)
    call_back(acme.client, url)
    for table in (
        "connect_states",
        "stripe_connections",
        "events",
        "tasks",
        "audit_log",
        "directory",
        "tenants",
    ):
        for row in rows_of(superuser, f"SELECT t::text AS whole FROM {table} t"):
            for secret in (state_of(url), query_of(url)["code"], "sk_test_", "rt_", "access_token"):
                assert secret not in row.whole


# status ------------------------------------------------------------------------------------------


def test_status_of_a_never_connected_tenant(acme: Account, stripe: Sandbox) -> None:
    body = status(acme)
    assert (body["connected"], body["status"], body["source"]) == (False, "not_connected", "cache")
    assert {body[name] for name in ("account_id", "livemode", "charges_enabled", "checked_at")} == {None}
    assert body["capabilities"] == {}
    assert body["requirements"]["currently_due"] == []
    assert set(body["account_details"].values()) == {None}
    assert stripe.calls == []


def test_status_asks_stripe(acme: Account, stripe: Sandbox, clock: TurnedClock) -> None:
    account_id = connect(acme, stripe, "incomplete")
    clock.turn(seconds=1)
    body = status(acme)
    assert (body["connected"], body["account_id"], body["livemode"]) == (True, account_id, False)
    assert (body["status"], body["source"]) == ("incomplete", "live")
    assert body["requirements"]["currently_due"] == ["external_account"]
    assert body["account_details"]["email"] == acme.tenant["email"]
    assert body["checked_at"][:19] == clock.now.isoformat()[:19]


def test_status_follows_changes_at_stripe(
    acme: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    for word in STATUSES[1:]:
        stripe.become(account_id, word)
        clock.turn(seconds=1)
        for _ in range(2):
            assert status(acme)["status"] == word
        assert shown(acme) == (account_id, word)
    assert stripe_events(superuser, acme) == [
        ("stripe.account.connected", "active"),
        *(("stripe.account.updated", word) for word in STATUSES[1:]),
    ]


@pytest.mark.parametrize(
    "fault", [Fault.HANG, Fault.DRIP, Fault.SERVER_ERROR, Fault.BAD_GATEWAY, Fault.EMPTY, Fault.RATE_LIMIT]
)
def test_status_comes_from_the_cache_if_stripe_fails(
    acme: Account, stripe: Sandbox, clock: TurnedClock, fault: Fault
) -> None:
    account_id = connect(acme, stripe, "restricted")
    known = status(acme)
    stripe.become(account_id, "active")
    stripe.faults.always("retrieve_account", fault)
    clock.turn(minutes=1)
    began = time.monotonic()
    body = status(acme)
    assert time.monotonic() - began < PATIENCE_SECONDS + LATE_SECONDS
    assert body == known | {"source": "cache"}


def test_status_detects_a_disconnection_at_stripe(
    acme: Account, globex: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    stripe.revoke(account_id)
    clock.turn(seconds=1)
    body = status(acme)
    assert (body["connected"], body["status"], body["account_id"]) == (False, "disconnected", None)
    assert shown(acme) == (None, "disconnected")
    assert audited(superuser, acme)[-1] == ("stripe.disconnected", account_id, "disconnected at Stripe")
    assert stripe_events(superuser, acme)[-1] == ("stripe.account.disconnected", "disconnected")
    assert status(acme)["source"] == "cache"
    # The account belongs to no tenant any more.
    assert tasks(superuser) == []
    assert reconnect(globex, stripe, account_id).status_code == 200


# disconnect --------------------------------------------------------------------------------------


def test_disconnect_does_not_call_stripe_and_can_be_repeated(
    acme: Account, stripe: Sandbox, superuser: Engine
) -> None:
    account_id = connect(acme, stripe)
    asked = len(stripe.calls)
    for _ in range(2):
        answer = disconnect(acme)
        assert answer.status_code == 200
        assert answer.json()["tenant"]["stripe_connect_status"] == "disconnected"
        assert answer.json()["tenant"]["stripe_connect_account_id"] is None
    assert len(stripe.calls) == asked
    assert tasks(superuser) == [(DEAUTHORIZE, account_id)]
    assert [row for row in audited(superuser, acme) if row[0] == "stripe.disconnected"] == [
        ("stripe.disconnected", account_id, None)
    ]
    assert [kind for kind, _ in stripe_events(superuser, acme)] == [
        "stripe.account.connected",
        "stripe.account.disconnected",
    ]
    body = status(acme)
    assert (body["connected"], body["status"], body["account_id"]) == (False, "disconnected", None)


def test_disconnect_of_a_never_connected_tenant_changes_nothing(acme: Account, superuser: Engine) -> None:
    assert disconnect(acme).json()["tenant"]["stripe_connect_status"] == "not_connected"
    assert audited(superuser, acme) == []
    assert tasks(superuser) == []


def test_disconnect_ends_only_the_tenants_own_connection(
    acme: Account, globex: Account, stripe: Sandbox
) -> None:
    connect(acme, stripe)
    connect(globex, stripe)
    disconnect(acme)
    assert status(globex)["status"] == "active"


# worker ------------------------------------------------------------------------------------------


def test_the_worker_deauthorizes_a_disconnected_account(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    assert run_due(worker) == [DEAUTHORIZE]
    assert not stripe.accounts[account_id].is_connected
    assert (run_due(worker), tasks(superuser)) == ([], [])


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.BAD_GATEWAY, Fault.UNKNOWN_OAUTH_ERROR])
def test_the_worker_retries_a_deauthorization_with_growing_delays(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine, clock: TurnedClock, fault: Fault
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    stripe.faults.always("deauthorize", fault)
    assert run_due(worker) == [DEAUTHORIZE]
    assert tasks(superuser) == [(DEAUTHORIZE, account_id)]
    for minutes in (1, 2, 4):
        clock.turn(minutes=minutes, seconds=-1)
        assert run_due(worker) == []
        clock.turn(seconds=1)
        assert run_due(worker) == [DEAUTHORIZE]
    stripe.faults.clear()
    clock.turn(minutes=8)
    assert run_due(worker) == [DEAUTHORIZE]
    assert not stripe.accounts[account_id].is_connected
    assert tasks(superuser) == []


def test_a_deauthorization_is_done_if_stripe_revoked_it_already(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    stripe.revoke(account_id)
    assert run_due(worker) == [DEAUTHORIZE]
    assert tasks(superuser) == []


def test_a_deauthorization_stays_due_while_our_client_id_is_wrong(
    acme: Account,
    stripe: Sandbox,
    stripe_settings: Settings,
    store: Store,
    superuser: Engine,
    clock: TurnedClock,
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    for client_id in ("ca_another", None):
        wrong = replace(stripe_settings, stripe_connect_client_id=client_id)
        lost = stripe_connections_for(wrong, store, clock)
        assert run_due(Worker(store, {DEAUTHORIZE: lost.deauthorize}, clock, threads=1)) == [DEAUTHORIZE]
        assert tasks(superuser) == [(DEAUTHORIZE, account_id)]
        clock.turn(hours=1)
    assert stripe.accounts[account_id].is_connected


def test_an_account_reconnected_meanwhile_is_not_deauthorized(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    assert reconnect(acme, stripe, account_id).status_code == 200
    assert run_due(worker) == []
    assert stripe.called("deauthorize") == []
    assert status(acme)["status"] == "active"
    assert tasks(superuser) == [(CHECK, account_id)]


def test_a_reconnection_during_a_deauthorization_is_checked_at_stripe(
    acme: Account, stripe: Sandbox, worker: Worker, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    (taken,) = take_due(worker)
    assert take_due(worker) == []  # Taken already.
    assert reconnect(acme, stripe, account_id).status_code == 200
    worker.do(taken)
    clock.turn(seconds=1)
    assert run_due(worker) == [CHECK]
    assert shown(acme) == (None, "disconnected")


def test_an_account_is_taken_until_it_is_deauthorized(
    acme: Account, globex: Account, stripe: Sandbox, worker: Worker
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    assert refusal(reconnect(globex, stripe, account_id)) == (409, "stripe-account-taken")
    assert run_due(worker) == [DEAUTHORIZE]
    assert reconnect(globex, stripe, account_id).status_code == 200
    assert run_due(worker) == []
    assert status(globex)["status"] == "active"
    assert shown(acme) == (None, "disconnected")


def test_a_deauthorized_account_is_free_even_if_its_tenant_has_another(
    acme: Account, globex: Account, stripe: Sandbox, worker: Worker
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    other = connect(acme, stripe)
    assert run_due(worker) == [DEAUTHORIZE]
    assert reconnect(globex, stripe, account_id).status_code == 200
    assert shown(acme) == (other, "active")


def test_an_unsuitable_grant_of_a_former_account_is_revoked(
    acme: Account, stripe: Sandbox, superuser: Engine, worker: Worker
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    assert (run_due(worker), tasks(superuser)) == ([DEAUTHORIZE], [])
    stripe.faults.once("token", Fault.READ_ONLY)
    assert refusal(reconnect(acme, stripe, account_id)) == (403, "access-denied")
    assert tasks(superuser) == [(DEAUTHORIZE, account_id)]


def test_the_worker_checks_accounts_regularly(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    clock.turn(minutes=59)
    assert run_due(worker) == []
    stripe.become(account_id, "restricted")
    clock.turn(minutes=17)
    assert run_due(worker) == [CHECK]
    assert stripe_events(superuser, acme)[-1] == ("stripe.account.updated", "restricted")
    # While Stripe does not answer, the last known status holds.
    stripe.faults.always("retrieve_account", Fault.SERVER_ERROR)
    clock.turn(minutes=76)
    assert run_due(worker) == [CHECK]
    stripe.faults.clear()
    stripe.revoke(account_id)
    clock.turn(minutes=76)
    assert run_due(worker) == [CHECK]
    log_in_later(acme, clock)
    assert shown(acme) == (None, "disconnected")
    assert tasks(superuser) == []
    assert audited(superuser, acme)[-1][:2] == ("stripe.disconnected", account_id)


def test_a_check_after_the_disconnection_does_nothing(
    acme: Account, stripe: Sandbox, worker: Worker, superuser: Engine, clock: TurnedClock
) -> None:
    connect(acme, stripe)
    clock.turn(hours=2)
    (taken,) = take_due(worker)
    assert taken.kind == CHECK
    log_in_later(acme, clock)
    disconnect(acme)
    asked = len(stripe.calls)
    worker.do(taken)
    assert len(stripe.calls) == asked
    assert [kind for kind, _ in tasks(superuser)] == [DEAUTHORIZE]


def test_account_checks_have_their_own_queue(acme: Account, stripe: Sandbox, superuser: Engine) -> None:
    connect(acme, stripe)
    assert rows_of(superuser, "SELECT queue FROM tasks WHERE kind = 'stripe.check'") == [("checks",)]


def test_answers_are_ordered_by_when_stripe_was_asked(
    acme: Account, stripe: Sandbox, stripe_settings: Settings, store: Store, clock: TurnedClock
) -> None:
    connect(acme, stripe)
    before = len(stripe.calls)
    # A clock that advances with each call to Stripe, and at no other time.
    ticking = stripe_connections_for(
        stripe_settings, store, lambda: clock.now + timedelta(minutes=len(stripe.calls) - before + 1)
    )
    known = ticking.status(UUID(acme.tenant["id"])).connection
    assert known is not None
    assert known.checked_at == clock.now + timedelta(minutes=1)
    worse = replace(known.account, charges_enabled=False)
    with store.tenant(UUID(acme.tenant["id"]), exclusive=True) as tx:
        minutes = [clock.now + timedelta(minutes=number) for number in range(6)]
        note(tx, known, known.account, asked_at=minutes[2], now=minutes[4])
        seen = note(tx, known, worse, asked_at=minutes[3], now=minutes[5])
    assert seen is not None
    assert seen.status == "restricted"


def test_an_answer_about_an_ended_connection_changes_nothing(
    acme: Account, stripe: Sandbox, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    connect(acme, stripe)
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        known = tx.stripe.find()
    disconnect(acme)
    before = audited(superuser, acme), stripe_events(superuser, acme), tasks(superuser)
    clock.turn(seconds=1)
    with store.tenant(UUID(acme.tenant["id"]), exclusive=True) as tx:
        assert known is not None
        note(tx, known, None, asked_at=clock(), now=clock())
    assert (audited(superuser, acme), stripe_events(superuser, acme), tasks(superuser)) == before


def test_an_answer_older_than_the_stored_one_changes_nothing(
    acme: Account, stripe: Sandbox, connections: StripeConnections, store: Store, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    clock.turn(seconds=10)
    assert status(acme)["status"] == "active"
    clock.turn(seconds=-5)
    stripe.become(account_id, "rejected")
    assert status(acme)["status"] == "active"
    clock.turn(seconds=10)
    assert status(acme)["status"] == "rejected"


# events and audit --------------------------------------------------------------------------------


def test_events_and_audit_rows_cover_the_whole_lifecycle(
    acme: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    call_back(acme.client, stripe.decline(start(acme).json()["url"]))
    account_id = connect(acme, stripe, "pending")
    stripe.become(account_id, "active")
    clock.turn(seconds=1)
    status(acme)
    disconnect(acme)
    reconnect(acme, stripe, account_id)
    assert audited(superuser, acme) == [
        ("stripe.connect_started", "oauth", None),
        ("stripe.connect_refused", None, "access-denied"),
        ("stripe.connect_started", "oauth", None),
        ("stripe.connected", account_id, None),
        ("stripe.disconnected", account_id, None),
        ("stripe.connect_started", "oauth", None),
        ("stripe.connected", account_id, None),
    ]
    assert stripe_events(superuser, acme) == [
        ("stripe.account.connected", "pending"),
        ("stripe.account.updated", "active"),
        ("stripe.account.disconnected", "disconnected"),
        ("stripe.account.connected", "active"),
    ]
    kinds = "SELECT actor_kind, address FROM audit_log WHERE action LIKE 'stripe.%' ORDER BY sequence"
    assert [tuple(row) for row in rows_of(superuser, kinds)[:2]] == [
        ("user", "testclient"),
        ("anonymous", "testclient"),
    ]


def test_each_tenant_numbers_its_own_events(
    acme: Account, globex: Account, stripe: Sandbox, superuser: Engine
) -> None:
    connect(acme, stripe)
    connect(globex, stripe)
    disconnect(acme)
    assert len(stripe_events(superuser, acme)) == 2
    assert stripe_events(superuser, globex) == [("stripe.account.connected", "active")]


# account_link ------------------------------------------------------------------------------------


def test_an_account_link_creates_an_account_for_the_tenant(
    acme: Account, stripe: Sandbox, superuser: Engine
) -> None:
    answer = start(acme, flow="account_link")
    assert answer.status_code == 200
    assert answer.json()["flow"] == "account_link"
    assert answer.json()["url"].startswith(f"{stripe.url}/setup/")
    (account_id,) = stripe.accounts
    (made,) = stripe.called("create_account")
    assert made.headers["idempotency-key"]
    assert made.form["email"] == acme.tenant["email"]
    assert made.form["metadata[tenant_id]"] == acme.tenant["id"]
    assert shown(acme) == (account_id, "pending")
    assert stripe_events(superuser, acme) == [("stripe.account.connected", "pending")]


def test_an_account_link_returns_with_only_its_state(
    acme: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    url = stripe.finish(start(acme, flow="account_link").json()["url"])
    assert query_of(url).keys() == {"state"}
    clock.turn(minutes=1)
    answer = call_back(acme.client, url)
    assert (answer.status_code, answer.json()["status"]) == (200, "active")
    assert refusal(call_back(acme.client, url)) == (400, "state-used")
    assert stripe.called("token") == []
    assert stripe_events(superuser, acme)[-1] == ("stripe.account.updated", "active")
    answer = start(acme, flow="account_link")
    assert refusal(answer) == (409, "stripe-already-connected")


def test_an_account_link_is_renewed_while_the_form_is_unfinished(acme: Account, stripe: Sandbox) -> None:
    first = start(acme, flow="account_link").json()["url"]
    answer = call_back(acme.client, stripe.leave(first))
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")
    # The old link also leads back; its state is used as well.
    assert refusal(call_back(acme.client, stripe.finish(first))) == (400, "state-used")
    second = start(acme, flow="account_link").json()["url"]
    assert second != first
    assert len(stripe.accounts) == len(stripe.called("create_account")) == 1
    assert call_back(acme.client, stripe.finish(second)).status_code == 200
    assert refusal(start(acme, flow="oauth")) == (409, "stripe-already-connected")


def test_simultaneous_starts_create_one_account(
    acme: Account, stripe: Sandbox, superuser: Engine, clock: TurnedClock
) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: start(acme, flow="account_link"), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(stripe.accounts) == 1
    assert len(stripe_events(superuser, acme)) == 1
    clock.turn(seconds=1)
    endings = [call_back(acme.client, stripe.leave(answer.json()["url"])).status_code for answer in answers]
    assert sorted(endings) == [200, 400, 400, 400]


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.HANG_AFTER])
def test_502_if_the_account_cannot_be_created_and_a_repeat_creates_only_one(
    acme: Account, stripe: Sandbox, superuser: Engine, fault: Fault
) -> None:
    stripe.faults.once("create_account", fault)
    assert refusal(start(acme, flow="account_link")) == (502, "stripe-unavailable")
    assert shown(acme) == (None, "not_connected")
    assert start(acme, flow="account_link").status_code == 200
    assert len(stripe.accounts) == 1


def test_account_creation_uses_a_new_idempotency_key_after_an_hour(
    acme: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    # Under an idempotency key Stripe keeps a failure as long as a success.
    stripe.faults.always("create_account", Fault.SERVER_ERROR)
    for hours in (0, 0, 1):
        log_in_later(acme, clock, hours=hours)
        assert refusal(start(acme, flow="account_link")) == (502, "stripe-unavailable")
    first, repeat, later = (call.headers["idempotency-key"] for call in stripe.called("create_account"))
    assert first == repeat != later


def test_502_if_the_link_cannot_be_created_and_a_repeat_succeeds(acme: Account, stripe: Sandbox) -> None:
    stripe.faults.once("create_account_link", Fault.SERVER_ERROR)
    assert refusal(start(acme, flow="account_link")) == (502, "stripe-unavailable")
    assert shown(acme)[1] == "pending"
    assert start(acme, flow="account_link").status_code == 200
    assert len(stripe.accounts) == 1


def test_disconnecting_an_account_link_does_not_deauthorize_at_stripe(
    acme: Account, stripe: Sandbox, superuser: Engine, worker: Worker
) -> None:
    url = stripe.finish(start(acme, flow="account_link").json()["url"])
    (account_id,) = stripe.accounts
    disconnect(acme)
    assert tasks(superuser) == []
    assert stripe.called("deauthorize") == []
    assert stripe.accounts[account_id].is_connected
    assert refusal(call_back(acme.client, url)) == (400, "state-expired")
    assert shown(acme) == (None, "disconnected")
    assert start(acme, flow="account_link").status_code == 200
    assert len(stripe.accounts) == 2


def test_a_new_link_after_a_disconnection_connects_the_new_account(
    acme: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    start(acme, flow="account_link")
    (first,) = stripe.accounts
    disconnect(acme)
    url = stripe.finish(start(acme, flow="account_link").json()["url"])
    (second,) = stripe.accounts.keys() - {first}
    clock.turn(seconds=1)
    assert call_back(acme.client, url).status_code == 200
    assert shown(acme) == (second, "active")


def test_409_for_an_account_created_for_another_tenant(
    acme: Account, globex: Account, stripe: Sandbox
) -> None:
    start(acme, flow="account_link")
    (account_id,) = stripe.accounts
    assert refusal(reconnect(globex, stripe, account_id)) == (409, "stripe-account-taken")


def test_an_account_link_returns_to_the_return_url(acme: Account, stripe: Sandbox) -> None:
    link = start(acme, flow="account_link", return_url=RETURN_URL).json()["url"]
    answer = call_back(acme.client, stripe.finish(link))
    assert query_of(answer.headers["location"])["stripe"] == "connected"


# concurrency -------------------------------------------------------------------------------------


def test_of_fifty_simultaneous_callbacks_with_one_code_one_connects(
    acme: Account, stripe: Sandbox, superuser: Engine
) -> None:
    url = agree(acme, stripe)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: call_back(acme.client, url), range(50)))
    endings = [200 if answer.status_code == 200 else answer.json()["code"] for answer in answers]
    assert endings.count(200) == 1
    # A busy machine may have had no free thread for some.
    assert set(endings) <= {200, "state-used", "overloaded"}
    assert len(stripe.called("token")) == 1
    assert stripe_events(superuser, acme) == [("stripe.account.connected", "active")]


def test_an_account_not_yet_deauthorized_goes_to_its_last_tenant(
    acme: Account, globex: Account, stripe: Sandbox
) -> None:
    account_id = connect(acme, stripe)
    stripe.revoke(account_id)
    disconnect(acme)
    globex_url = stripe.approve(start(globex).json()["url"], account_id=account_id)
    acme_url = stripe.approve(start(acme).json()["url"], account_id=account_id)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda url: call_back(acme.client, url), [globex_url, acme_url]))
    # It is still Acme's until it is deauthorized at Stripe.
    assert [answer.status_code for answer in answers] == [409, 200]


def test_one_of_two_simultaneous_tenants_gets_a_free_account(
    acme: Account, globex: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    stripe.revoke(account_id)
    clock.turn(seconds=1)
    assert status(acme)["status"] == "disconnected"
    urls = [stripe.approve(start(who).json()["url"], account_id=account_id) for who in (acme, globex)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda url: call_back(acme.client, url), urls))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert sorted([shown(acme)[0] is None, shown(globex)[0] is None]) == [False, True]


def await_lock_wait(superuser: Engine, other: Future[Any]) -> None:
    """Wait until the other waits for a lock, or is done."""
    while not other.done() and not waits_for_a_lock(superuser):
        time.sleep(0.01)


def test_a_callback_that_waited_for_another_sees_its_connection(
    acme: Account, stripe: Sandbox, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    url = agree(acme, stripe)
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(UUID(acme.tenant["id"]), exclusive=True) as tx:
            grant = Grant("acct_1Another", "read_write", livemode=False)
            connect_account(tx, grant, None, livemode=False, now=clock())
            answer = pool.submit(call_back, acme.client, url)
            await_lock_wait(superuser, answer)
        assert refusal(answer.result()) == (409, "stripe-already-connected")
    assert shown(acme)[0] == "acct_1Another"


def test_a_status_call_during_a_disconnection_does_not_reconnect(
    acme: Account,
    stripe: Sandbox,
    store: Store,
    superuser: Engine,
    connections: StripeConnections,
    clock: TurnedClock,
) -> None:
    connect(acme, stripe)
    clock.turn(seconds=1)
    tenant_id = UUID(acme.tenant["id"])
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(tenant_id, exclusive=True) as tx:
            end_connection(tx, now=clock())
            seen = pool.submit(connections.status, tenant_id)
            await_lock_wait(superuser, seen)
        seen.result()
    assert status(acme)["status"] == "disconnected"


def test_a_reconnection_while_a_deauthorization_waits_is_checked_at_once(
    acme: Account, stripe: Sandbox, store: Store, superuser: Engine, worker: Worker, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    disconnect(acme)
    (taken,) = take_due(worker)
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(UUID(acme.tenant["id"]), exclusive=True) as tx:
            grant = Grant(account_id, "read_write", livemode=False)
            connect_account(tx, grant, StripeAccount(account_id), livemode=False, now=clock())
            deauthorized = pool.submit(worker.do, taken)
            await_lock_wait(superuser, deauthorized)
        deauthorized.result()
    clock.turn(seconds=1)
    assert run_due(worker) == [CHECK]
    assert shown(acme) == (None, "disconnected")


def test_a_hanging_stripe_does_not_delay_other_requests(
    acme: Account, globex: Account, stripe: Sandbox
) -> None:
    connect(acme, stripe)
    stripe.faults.always("retrieve_account", Fault.HANG)
    # A busy machine may be slow for another reason, but not three times in a row.
    assert any(
        verify_seconds_while_stripe_hangs(acme, globex, stripe) < PATIENCE_SECONDS / 2 for _ in range(3)
    )
    assert disconnect(globex).status_code == 200


def verify_seconds_while_stripe_hangs(acme: Account, globex: Account, stripe: Sandbox) -> float:
    """How long Globex waits for `verify` while Acme's requests occupy every thread for Stripe."""
    key = {"X-API-Key": globex.tenant["api_key_secret"]}
    hanging = len(stripe.calls) + STRIPE_THREADS
    callers = STRIPE_THREADS + 6
    with ThreadPoolExecutor(callers) as pool:
        waiting = [pool.submit(acme.get, "/stripe/status/") for _ in range(callers)]
        until = time.monotonic() + PATIENCE_SECONDS
        while len(stripe.calls) < hanging and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
        answer = globex.client.get(f"{API}/verify/", headers=key)
        seconds = time.monotonic() - began
    assert answer.status_code == 200
    assert {answer.result().status_code for answer in waiting} <= {200, 503}
    return seconds


def test_a_worker_without_stripe_keeps_its_tasks(
    acme: Account, stripe: Sandbox, settings: Settings, store: Store, superuser: Engine, clock: TurnedClock
) -> None:
    account_id = connect(acme, stripe)
    clock.turn(hours=2)
    idle = stripe_connections_for(settings, store, clock)
    jobs: dict[str, Callable[[Task], None]] = {CHECK: idle.check, DEAUTHORIZE: idle.deauthorize}
    assert run_due(Worker(store, jobs, clock, threads=1)) == [CHECK]
    assert tasks(superuser) == [(CHECK, account_id)]


def test_a_time_stored_by_a_fast_clock_does_not_block_answers(
    acme: Account, stripe: Sandbox, clock: TurnedClock
) -> None:
    connect(acme, stripe)
    clock.turn(minutes=10)
    assert status(acme)["status"] == "active"
    clock.turn(minutes=-10)
    account_id, _ = shown(acme)
    stripe.accounts[str(account_id)].become(Status.RESTRICTED)
    assert status(acme)["status"] == "restricted"


# Ended sessions ----------------------------------------------------------------------------------


def change_password(account: Account) -> None:
    body = {"old_password": PASSWORD, "new_password": "correct horse battery staple"}
    assert account.post("/change-password/", body).status_code == 200


def is_connected(account: Account, store: Store) -> bool:
    with store.tenant(UUID(account.tenant["id"])) as tx:
        return tx.stripe.find() is not None


def reuse_a_refresh_token(account: Account, clock: TurnedClock) -> None:
    body = {"refresh": account.tokens["refresh"]}
    assert account.client.post(f"{API}/token/refresh/", json=body).status_code == 200
    clock.turn(seconds=60)
    assert account.client.post(f"{API}/token/refresh/", json=body).status_code == 401


@pytest.mark.parametrize("ending", ["password changed", "token reused", "reset", "disabled and enabled"])
def test_a_state_ends_with_the_session_that_started_it(
    acme: Account, stripe: Sandbox, store: Store, clock: TurnedClock, ending: str
) -> None:
    """Otherwise whoever stole the session could direct the tenant's payments to their own account."""
    url = agree(acme, stripe)
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        owner = tx.users.all()[0]
    match ending:
        case "password changed":
            change_password(acme)
        case "token reused":
            reuse_a_refresh_token(acme, clock)
        case "reset":
            with store.tenant(owner.tenant_id, exclusive=True) as tx:
                users.reset_password(tx, owner, "new", now=clock())
        case _:
            with store.tenant(owner.tenant_id, exclusive=True) as tx:
                another = replace(owner, id=new_id(), email="bob@acme.example")
                users.add(tx, another, password_hash="-", now=clock())
                users.disable(tx, owner.email, now=clock())
                users.enable(tx, owner.email, now=clock())
    assert refusal(call_back(acme.client, url)) == (400, "state-expired")
    assert not is_connected(acme, store)


@pytest.mark.parametrize("flow", ["oauth", "account_link"])
def test_a_waiting_start_is_refused_if_its_session_ends_meanwhile(
    acme: Account, stripe: Sandbox, superuser: Engine, store: Store, flow: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(UUID(acme.tenant["id"]), exclusive=True):
            late = pool.submit(start, acme, flow=flow)
            await_lock_wait(superuser, late)
            change_password(acme)
        assert refusal(late.result()) == (401, "session-ended")
    assert not is_connected(acme, store)


def test_a_callback_is_refused_if_its_session_ends_meanwhile(
    acme: Account, stripe: Sandbox, superuser: Engine, store: Store, clock: TurnedClock, worker: Worker
) -> None:
    url = agree(acme, stripe)
    with ThreadPoolExecutor(1) as pool:
        with store.tenant(UUID(acme.tenant["id"]), exclusive=True):
            late = pool.submit(call_back, acme.client, url)
            await_lock_wait(superuser, late)
            change_password(acme)
        assert refusal(late.result()) == (400, "state-expired")
    assert not is_connected(acme, store)
    # The grant is revoked at Stripe.
    assert run_due(worker) == [DEAUTHORIZE]
    assert not any(account.is_connected for account in stripe.accounts.values())
