"""The gateway to Stripe: whatever Stripe does, a value or an error of ours, in time, and no secret leaked."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson
import pytest
import stripe as library
import structlog
from jsonschema_rs import Draft202012Validator

from billing import gateway as module
from billing import logs
from billing.errors import CodeRejected, StripeNotConfigured, StripeUnavailable
from billing.gateway import CircuitBreaker, Gateway
from billing.handlers import shapes
from billing.ids import new_id
from billing.stripe_connect import Account, Connection, Grant, Requirements
from billing.stripe_connections import StatusView
from billing.tenants import Tenant
from billing.users import User
from sandbox.faults import ONLY, Fault, Operation
from sandbox.stripe import Sandbox
from tests.answers import COMPONENTS
from tests.clock import TurnedClock
from tests.receivers import Behaviour, Receiver, answers, head, receiving, says

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
ID = "acct_1AcmeExample"
CALLBACK = "http://testserver/callback/"
ACME = Tenant(
    new_id(),
    "Acme Inc.",
    "acme-inc",
    "ada@acme.example",
    None,
    None,
    None,
    "not_connected",
    "free",
    True,
    NOW,
    NOW,
)
ADA = User(ACME.id, new_id(), "ada@acme.example", "Ada", "", "owner", True, 1, None, NOW, NOW)

SHORT_SECONDS = 0.5
# A busy machine must not fail a test.
LATE_SECONDS = 1


@pytest.fixture
def gateway(stripe: Sandbox) -> Gateway:
    return gateway_to(stripe.url, secret_key=stripe.secret_key, client_id=stripe.client_id)


@pytest.fixture
def impatient_gateway(stripe: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A gateway with a shorter timeout."""
    monkeypatch.setattr(module, "TOTAL_SECONDS", SHORT_SECONDS)
    return gateway_to(stripe.url, secret_key=stripe.secret_key, client_id=stripe.client_id)


def gateway_to(url: str, **changes: Any) -> Gateway:
    keys = {"secret_key": new_key(), "client_id": "ca_acme"}
    return Gateway(**{**keys, "api_base": url, "connect_base": url, **changes})


@contextmanager
def facing(behave: Behaviour) -> Iterator[tuple[Gateway, Receiver]]:
    """A gateway to a Stripe with this behaviour."""
    with receiving(behave) as receiver:
        yield gateway_to(f"http://127.0.0.1:{receiver.port}"), receiver


# Made at run time: a secret scanner would mistake a constant for a real key.
def new_key(prefix: str = "sk_test_") -> str:
    return prefix + secrets.token_hex(12)


def authorize_url(gateway: Gateway) -> str:
    return gateway.authorize_url(state="f3c1", redirect_uri=CALLBACK, tenant=ACME, user=ADA)


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def approved_code(gateway: Gateway, stripe: Sandbox, status: str = "active") -> str:
    """The code issued when the owner approves."""
    return query_of(stripe.approve(authorize_url(gateway), status))["code"]


def connected_account(gateway: Gateway, stripe: Sandbox, status: str = "active") -> str:
    return gateway.complete(approved_code(gateway, stripe, status)).account_id


# Success -----------------------------------------------------------------------------------------


def test_the_authorize_url_requests_what_payments_need(gateway: Gateway, stripe: Sandbox) -> None:
    url = authorize_url(gateway)
    assert url.startswith(f"{stripe.url}/oauth/authorize?")
    assert query_of(url) == {
        "client_id": stripe.client_id,
        "redirect_uri": CALLBACK,
        "response_type": "code",
        "scope": "read_write",
        "state": "f3c1",
        "stripe_user[business_name]": "Acme Inc.",
        "stripe_user[email]": "ada@acme.example",
        "stripe_user[first_name]": "Ada",
    }
    assert stripe.calls == []


def test_prefilled_fields_are_omitted_from_an_overlong_authorize_url(gateway: Gateway) -> None:
    tenant, user = replace(ACME, company_name="株" * 255), replace(ADA, first_name="\U0001f600" * 150)
    url = gateway.authorize_url(state="f3c1", redirect_uri=CALLBACK, tenant=tenant, user=user)
    assert query_of(url).keys() == {"client_id", "redirect_uri", "response_type", "scope", "state"}


def test_a_code_is_exchanged_for_a_grant(gateway: Gateway, stripe: Sandbox) -> None:
    grant = gateway.complete(approved_code(gateway, stripe))
    assert grant == Grant(next(iter(stripe.accounts)), "read_write", livemode=False)


@pytest.mark.parametrize(
    "status", ["active", "incomplete", "restricted", "pending", "under_review", "rejected"]
)
def test_an_account_is_returned_as_stripe_describes_it(
    gateway: Gateway, stripe: Sandbox, status: str
) -> None:
    account_id = connected_account(gateway, stripe, status)
    account = gateway.account(account_id)
    assert account is not None
    assert (account.id, account.status) == (account_id, status)
    assert (account.email, account.country, account.default_currency) == ("ada@acme.example", "US", "usd")
    assert account.capabilities.keys() == {"card_payments", "transfers"}
    assert fits(account)


def test_a_revoked_or_unknown_account_is_none(gateway: Gateway, stripe: Sandbox) -> None:
    account_id = connected_account(gateway, stripe)
    stripe.revoke(account_id)
    assert gateway.account(account_id) is None
    assert gateway.account("acct_1NobodysExample") is None


def test_an_account_is_created_once_per_idempotency_key(gateway: Gateway, stripe: Sandbox) -> None:
    made = [gateway.create_account(ACME, idempotency_key="account-1") for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].status == "pending"
    assert made[0] != gateway.create_account(ACME, idempotency_key="account-2")
    assert len(stripe.accounts) == 2
    assert stripe.called("create_account")[0].form["metadata[tenant_id]"] == str(ACME.id)


def test_both_urls_of_an_account_link_lead_to_the_callback(gateway: Gateway, stripe: Sandbox) -> None:
    made = gateway.create_account(ACME, idempotency_key="account-1")
    url = gateway.account_link(made.id, return_url=CALLBACK)
    assert stripe.leave(url) == CALLBACK
    assert stripe.finish(url) == CALLBACK  # The link was used: this is its refresh_url.


def test_revoking_a_revoked_or_unknown_account_is_no_error(gateway: Gateway, stripe: Sandbox) -> None:
    account_id = connected_account(gateway, stripe)
    gateway.revoke(account_id)
    assert not stripe.accounts[account_id].is_connected
    gateway.revoke(account_id)
    gateway.revoke("acct_1NobodysExample")


@pytest.mark.parametrize("wrong", ["client_id", "secret_key"])
def test_wrong_platform_keys_do_not_make_an_account_look_revoked(
    gateway: Gateway, stripe: Sandbox, wrong: str
) -> None:
    account_id = connected_account(gateway, stripe)
    keys = {"secret_key": stripe.secret_key, "client_id": stripe.client_id}
    keys[wrong] = {"client_id": "ca_another", "secret_key": new_key()}[wrong]
    with pytest.raises(StripeUnavailable):
        gateway_to(stripe.url, **keys).revoke(account_id)
    assert stripe.accounts[account_id].is_connected


# Missing settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_key", "client_id", "for_oauth", "for_links"),
    [
        (
            False,
            None,
            "This server has no STRIPE_CONNECT_CLIENT_ID and no STRIPE_SECRET_KEY.",
            "This server has no STRIPE_SECRET_KEY.",
        ),
        (False, "ca_acme", "This server has no STRIPE_SECRET_KEY.", "This server has no STRIPE_SECRET_KEY."),
        (True, None, "This server has no STRIPE_CONNECT_CLIENT_ID.", None),
        (True, "ca_acme", None, None),
    ],
)
def test_missing_settings_are_named(
    has_key: bool, client_id: str | None, for_oauth: str | None, for_links: str | None
) -> None:
    key = new_key() if has_key else None
    with receiving(answers(200, b"{}")) as receiver:
        half = gateway_to(f"http://127.0.0.1:{receiver.port}", secret_key=key, client_id=client_id)
        assert refusal_of(lambda: half.require_configured()) == for_oauth
        assert refusal_of(lambda: half.require_configured(for_oauth=False)) == for_links
        assert refusal_of(lambda: authorize_url(half)) == for_oauth
        assert refusal_of(lambda: half.complete("ac_1")) == for_oauth
        assert refusal_of(lambda: half.revoke(ID)) == for_oauth
        assert refusal_of(lambda: half.account(ID)) == for_links
        assert refusal_of(lambda: half.create_account(ACME, idempotency_key="1")) == for_links
        assert refusal_of(lambda: half.account_link(ID, return_url=CALLBACK)) == for_links
        assert bool(receiver.received) is (for_links is None)


def refusal_of(call: Callable[[], object]) -> str | None:
    """The detail of `StripeNotConfigured`, None if it is not raised."""
    try:
        call()
    except StripeNotConfigured as error:
        return error.detail
    except StripeUnavailable:
        pass
    return None


@pytest.mark.parametrize(
    ("prefix", "livemode"),
    [("sk_live_", True), ("rk_live_", True), ("sk_test_", False), ("rk_test_", False), (None, False)],
)
def test_the_key_determines_livemode(prefix: str | None, livemode: bool) -> None:
    key = new_key(prefix) if prefix else None
    assert gateway_to("http://127.0.0.1:9", secret_key=key).livemode is livemode


# Scripted faults ---------------------------------------------------------------------------------


CALLS: dict[Operation, Callable[[Gateway, str, str], object]] = {
    Operation.TOKEN: lambda gateway, account_id, code: gateway.complete(code),
    Operation.DEAUTHORIZE: lambda gateway, account_id, code: gateway.revoke(account_id),
    Operation.RETRIEVE_ACCOUNT: lambda gateway, account_id, code: gateway.account(account_id),
    Operation.CREATE_ACCOUNT: lambda gateway, account_id, code: gateway.create_account(
        ACME, idempotency_key=account_id
    ),
    Operation.CREATE_ACCOUNT_LINK: lambda gateway, account_id, code: gateway.account_link(
        account_id, return_url=CALLBACK
    ),
}
# With these, Stripe's answers are still well-formed.
WELL_FORMED = {Fault.WRONG_LIVEMODE, Fault.READ_ONLY, Fault.BARE_ACCOUNT}
OPERATION_FAULTS = [(call, fault) for call in CALLS for fault in Fault if call in ONLY.get(fault, Operation)]


@pytest.mark.parametrize(
    ("operation", "fault"), [(call, fault) for call, fault in OPERATION_FAULTS if fault not in WELL_FORMED]
)
def test_a_fault_is_stripe_unavailable_in_time_and_leaks_no_secret(
    gateway: Gateway,
    impatient_gateway: Gateway,
    stripe: Sandbox,
    output: Callable[[], str],
    operation: Operation,
    fault: Fault,
) -> None:
    account_id, code = connected_account(gateway, stripe), approved_code(gateway, stripe)
    stripe.faults.always(operation, fault)
    began = time.monotonic()
    with pytest.raises(StripeUnavailable) as caught:
        CALLS[operation](impatient_gateway, account_id, code)
    assert time.monotonic() - began < SHORT_SECONDS + LATE_SECONDS
    visible = output() + str(caught.value) + repr(caught.value) + described(caught)
    assert "stripe refused or failed" in visible or fault is Fault.MALFORMED_ACCOUNT
    assert_no_secret_in(visible, stripe, code)


def test_a_grant_of_another_mode_or_scope_is_returned_unchanged(gateway: Gateway, stripe: Sandbox) -> None:
    stripe.faults.once("token", Fault.WRONG_LIVEMODE)
    stripe.faults.once("token", Fault.READ_ONLY)
    assert gateway.complete(approved_code(gateway, stripe)).livemode is True
    assert gateway.complete(approved_code(gateway, stripe)).scope == "read_only"


def test_an_account_may_consist_of_its_id_alone(gateway: Gateway, stripe: Sandbox) -> None:
    account_id = connected_account(gateway, stripe)
    stripe.faults.always("retrieve_account", Fault.BARE_ACCOUNT)
    stripe.faults.always("create_account", Fault.BARE_ACCOUNT)
    assert gateway.account(account_id) == Account(account_id)
    assert gateway.create_account(ACME, idempotency_key="1").status == "pending"
    assert fits(Account(account_id))


@pytest.mark.parametrize("was", ["unknown", "used", "expired"])
def test_an_invalid_code_is_rejected_and_not_leaked(
    gateway: Gateway, stripe: Sandbox, output: Callable[[], str], was: str
) -> None:
    code = approved_code(gateway, stripe)
    if was == "unknown":
        code = code[:-4] + "none"
    if was == "used":
        gateway.complete(code)
    if was == "expired":
        stripe.clock = clock = TurnedClock()
        clock.turn(minutes=6)
    with pytest.raises(CodeRejected) as caught:
        gateway.complete(code)
    visible = output() + str(caught.value) + repr(caught.value) + described(caught)
    assert "invalid_grant" in output()
    assert_no_secret_in(visible, stripe, code)


def test_a_grant_does_not_expose_its_tokens(
    gateway: Gateway, stripe: Sandbox, output: Callable[[], str]
) -> None:
    code = approved_code(gateway, stripe)
    assert_no_secret_in(output() + repr(gateway.complete(code)), stripe, code)


@pytest.fixture
def output(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], str]]:
    """Everything logged, before any redaction, and everything printed."""
    printed = ""
    with structlog.testing.capture_logs() as events:

        def everything() -> str:
            nonlocal printed
            out, err = capfd.readouterr()
            printed += out + err
            return repr(events) + caplog.text + printed

        yield everything


def described(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The error with its causes, as a log line shows it."""
    return logs.redact(logs.describe((caught.type, caught.value, caught.tb)))


def assert_no_secret_in(visible: str, stripe: Sandbox, code: str) -> None:
    assert stripe.secret_key not in visible
    assert code not in visible
    for token in ("access_token", "refresh_token", "rt_", "sk_test_" + "0"):
        assert token not in visible


# An unreachable or wrong Stripe ------------------------------------------------------------------


def test_an_unreachable_stripe_is_reported_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(answers()) as receiver:
        pass
    began = time.monotonic()
    for call in CALLS.values():
        with pytest.raises(StripeUnavailable):
            call(gateway_to(f"http://127.0.0.1:{receiver.port}"), ID, "ac_1")
    assert time.monotonic() - began < len(CALLS) * LATE_SECONDS


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with (
        receiving(answers(200, json.dumps({"id": ID}).encode())) as elsewhere,
        facing(answers(status, b"", Location=f"{elsewhere.url}")) as (gateway, receiver),
    ):
        for call in CALLS.values():
            with pytest.raises(StripeUnavailable):
                call(gateway, ID, "ac_1")
    assert receiver.received
    assert not elsewhere.received


def test_proxies_and_credentials_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with receiving(answers(200, b"{}")) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{proxy.port}")
        with facing(answers(200, json.dumps({"id": ID}).encode())) as (gateway, receiver):
            assert gateway.account(ID) == Account(ID)
    assert not proxy.received
    assert receiver.last.headers["Authorization"].startswith("Bearer sk_test_")


def test_every_call_sends_the_key_and_uses_the_expected_path() -> None:
    with facing(answers(200, b"{}")) as (gateway, receiver):
        for call in CALLS.values():
            with suppress(StripeUnavailable):
                call(gateway, ID, "ac_1")
    assert [(received.method, received.path) for received in receiver.received] == [
        ("POST", "/oauth/token"),
        ("POST", "/oauth/deauthorize"),
        ("GET", f"/v1/accounts/{ID}"),
        ("POST", "/v1/accounts"),
        ("POST", "/v1/account_links"),
    ]
    assert {received.headers["Authorization"][:15] for received in receiver.received} == {"Bearer sk_test_"}


# Absurd answers ----------------------------------------------------------------------------------


def shown(account: Account) -> Any:
    """The account as `get_stripe_status` returns it."""
    connection = Connection(new_id(), "oauth", True, account, NOW, NOW)
    return orjson.loads(orjson.dumps(shapes.stripe_status(StatusView(connection, is_live=True))))


STATUS = Draft202012Validator(
    {"$ref": "#/components/schemas/StripeStatus", "components": COMPONENTS}, validate_formats=True
)


def fits(account: Account) -> bool:
    """Whether the account fits the document, and the column that stores it."""
    body = shown(account)
    STATUS.validate(body)
    assert "\\u0000" not in orjson.dumps(body).decode()
    return True


def account_in(body: bytes, *, status: int = 200) -> Account | None:
    with facing(answers(status, body)) as (gateway, _):
        return gateway.account(ID)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[{}]",
        b"null",
        b"true",
        b"7",
        b'"acct_1AcmeExample"',
        b"{}",
        b'{"id": null}',
        b'{"id": 7}',
        b'{"id": ""}',
        b'{"id": ["acct_1AcmeExample"]}',
        b'{"id": "acct_1"}',
        b'{"id": "acct_1AcmeExample\\n"}',
        b'{"id": "acct_1AcmeExample/../x"}',
        b'{"id": "acct_' + b"1" * 65 + b'"}',
        b'{"id": "cus_1AcmeExample"}',
        b'{"object": "list", "data": []}',
        b'{"id": "acct_1AcmeExample"',
        b'{"id": "acct_1AcmeExample", "email": "\x00"}',
        b'{"id": "acct_1AcmeExample", "email": "\xff"}',
        b"\x00",
        b"\x1f\x8b\x08",
        b"<!doctype html><title>Maintenance</title>",
        b'{"id": "acct_1AcmeExample", "n": ' + b"9" * 5000 + b"}",
    ],
)
def test_an_invalid_account_is_stripe_unavailable(body: bytes) -> None:
    with pytest.raises(StripeUnavailable):
        account_in(body)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"7",
        b"{}",
        b'{"error": null}',
        b'{"error": []}',
        b'{"error": 7}',
        b'{"error": "invalid_grant"}',
        b'{"error": "account_invalid"}',
        b'{"error": {"code": ["account_invalid"]}}',
        b'{"error": {"code": {"code": "account_invalid"}, "message": 7}}',
        b'{"error": {"code": "\\u0000", "type": [], "message": {}}}',
        b'{"error": {"type": "idempotency_error"}}',
    ],
)
def test_an_absurd_refusal_is_stripe_unavailable(status: int, body: bytes) -> None:
    with facing(answers(status, body, Request_Id="req_" + "x" * 1000)) as (gateway, _):
        with pytest.raises(StripeUnavailable):
            gateway.account(ID)
        for operation, call in CALLS.items():
            # For a code, this is how Stripe reports an invalid one, whatever the status.
            with pytest.raises((StripeUnavailable, CodeRejected)) as caught:
                call(gateway, ID, "ac_1")
            assert (caught.type is CodeRejected) <= (
                operation is Operation.TOKEN and b"invalid_grant" in body
            )


def test_only_a_403_means_that_an_account_is_gone() -> None:
    gone = json.dumps({"error": {"type": "invalid_request_error", "code": "account_invalid"}}).encode()
    assert account_in(gone, status=403) is None
    for status in (400, 401, 404, 500):
        with pytest.raises(StripeUnavailable):
            account_in(gone, status=status)


def test_an_answer_larger_than_a_mebibyte_is_refused() -> None:
    start = json.dumps({"id": ID, "padding": ""}).encode()[:-2]
    room = module.LARGEST_ANSWER - len(start) - 2
    assert account_in(start + b"x" * room + b'"}') == Account(ID)
    with pytest.raises(StripeUnavailable):
        account_in(start + b"x" * (room + 1) + b'"}')


@pytest.mark.parametrize("depth", [2, 50, 150, 200, 300, 500, 800, 990, 2000, 100_000])
@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_deeply_nested_answers_do_not_crash_the_gateway(depth: int, pair: tuple[bytes, bytes]) -> None:
    deep = pair[0] * depth + b"1" + pair[1] * depth
    with suppress(StripeUnavailable):
        assert account_in(b'{"id": "%s", "requirements": {"errors": %s}}' % (ID.encode(), deep)) is not None
    for call in CALLS.values():
        refusing = facing(answers(400, b'{"error": {"code": %s}}' % deep))
        with refusing as (gateway, _), pytest.raises(StripeUnavailable):
            call(gateway, ID, "ac_1")


@pytest.mark.parametrize(
    ("value", "is_read"),
    [
        (b"[" * 99 + b"]" * 99, True),
        (b"[" * 100 + b"]" * 100, False),
        (b'[{"a":' * 49 + b"1" + b"}]" * 49, True),
        (b'[{"a":' * 50 + b"1" + b"}]" * 50, False),
        (b"[" + b"[]," * 5000 + b"[]]", True),
        (rb'"' + b"[{" * 5000 + rb'"', True),
        (rb'"\"' + b"[{" * 5000 + rb'\\"', True),
        (rb'["\\",' * 100 + b"1" + b"]" * 100, False),
    ],
    ids=[
        "lists",
        "deep lists",
        "both",
        "deep both",
        "side by side",
        "text",
        "text with quotes",
        "deep lists and quotes",
    ],
)
def test_an_answer_nested_at_most_a_hundred_levels_is_read(value: bytes, is_read: bool) -> None:
    body = b'{"id": "%s", "other": %s}' % (ID.encode(), value)
    with nullcontext() if is_read else pytest.raises(StripeUnavailable):
        assert account_in(body) == Account(ID)


ABSURD: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    10**18,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 300_000,
    "\x00",
    "a\nb",
    "a\x7fb",
    "\u2028",
    "\ud800",
    "‮evil",
    "rejected.\x00",
    [],
    [None, 7, True, [], {}, "", "x", "x" * 300, "\x00"],
    {},
    {"": "", "a": None, "b": 7, "\x00": "active", "c": "\x00", "d" * 300: "active", "e": "x" * 300},
    {"id": ID, "object": "account"},
    {"object": "list", "data": [], "has_more": True},
]
TEXTS = ("email", "business_type", "country", "default_currency")
BOOLEANS = ("charges_enabled", "payouts_enabled", "details_submitted")
LISTS = ("currently_due", "eventually_due", "past_due", "pending_verification", "errors")


def absurd_accounts() -> Iterator[tuple[str, Any]]:
    for name in (*TEXTS, *BOOLEANS, "requirements", "capabilities", "object"):
        yield from ((name, {name: value}) for value in ABSURD)
    for name in (*LISTS, "disabled_reason", "current_deadline"):
        yield from ((name, {"requirements": {name: value}}) for value in ABSURD)
    for name in ("code", "reason", "requirement"):
        yield from ((name, {"requirements": {"errors": [{name: value}]}}) for value in ABSURD)
    yield from (("capability", {"capabilities": {"transfers": value}}) for value in ABSURD)


def test_accounts_with_absurd_members_fit_the_document() -> None:
    bodies = [
        json.dumps({"id": ID, "object": "account", **members}).encode() for _, members in absurd_accounts()
    ]
    waiting = iter(bodies)

    def behave(visit: Any) -> None:
        while visit.receive():
            body = next(waiting)
            visit.send(head(200, {"Content-Length": str(len(body))}) + body)

    with facing(behave) as (gateway, receiver):
        for _ in bodies:
            account = gateway.account(ID)
            assert account is not None
            assert fits(account)
    assert len(receiver.received) == len(bodies) > 400


def account_with(**members: Any) -> Account:
    found = account_in(json.dumps({"id": ID, **members}).encode())
    assert found is not None
    assert fits(found)
    return found


def test_lists_of_ten_thousand_are_cut_to_their_first_items() -> None:
    names = [f"field_{number}" for number in range(10_000)]
    asked = dict.fromkeys(LISTS, names) | {"errors": [{"code": name} for name in names]}
    account = account_with(requirements=asked, capabilities=dict.fromkeys(names, "active"))
    assert account.requirements.past_due == tuple(names[:500])
    assert len(account.requirements.errors) == 500
    assert list(account.capabilities) == names[:200]


def test_invalid_members_of_an_account_are_ignored() -> None:
    account = account_with(
        email="ada@acme.example\x00",
        country="us",
        default_currency="USD",
        business_type=7,
        charges_enabled="true",
        payouts_enabled=1,
        requirements={
            "currently_due": ["good", "bad\n", 7],
            "current_deadline": True,
            "errors": [{"code": "good", "reason": "Two\nlines."}, "bad"],
        },
        capabilities={"good": "active", "bad": None, "": "active"},
    )
    assert account == Account(
        ID,
        requirements=Requirements(currently_due=("good",), errors=account.requirements.errors),
        capabilities={"good": "active"},
    )
    assert [(error.code, error.reason) for error in account.requirements.errors] == [("good", ""), ("", "")]


@pytest.mark.parametrize(
    "changes",
    [
        {"stripe_user_id": None},
        {"stripe_user_id": 7},
        {"stripe_user_id": "acct_1"},
        {"stripe_user_id": "acct_1AcmeExample\x00"},
        {"stripe_user_id": "acct_1AcmeExample/../../v1/charges"},
        {"stripe_user_id": [ID]},
        {"livemode": None},
        {"livemode": "false"},
        {"livemode": 0},
    ],
)
def test_an_invalid_token_response_is_stripe_unavailable(changes: dict[str, Any]) -> None:
    token = {"stripe_user_id": ID, "livemode": False, "scope": "read_write"}
    with facing(answers(200, json.dumps(token).encode())) as (gateway, _):
        assert gateway.complete("ac_1") == Grant(ID, "read_write", livemode=False)
    absurd = facing(answers(200, json.dumps(token | changes).encode()))
    with absurd as (gateway, _), pytest.raises(StripeUnavailable):
        gateway.complete("ac_1")


@pytest.mark.parametrize("scope", [None, 7, [], ["read_write"], {}, "", "read_write\x00", "x" * 10_000])
def test_an_invalid_scope_is_not_read_write(scope: Any) -> None:
    token = {"stripe_user_id": ID, "livemode": False, "scope": scope}
    with facing(answers(200, json.dumps(token).encode())) as (gateway, _):
        assert gateway.complete("ac_1").scope != "read_write"


@pytest.mark.parametrize(
    "link",
    [
        {},
        {"url": None},
        {"url": 7},
        {"url": []},
        {"url": ""},
        {"url": "javascript:alert(1)"},
        {"url": "/setup"},
        {"url": "https://connect.stripe.com/a b"},
        {"url": "https://connect.stripe.com/\x00"},
        {"url": "https://connect.stripe.com/\r\nSet-Cookie: a=b"},
        {"url": "https://connect.stripe.com/" + "x" * 5000},
        [],
        None,
    ],
)
def test_an_invalid_account_link_is_stripe_unavailable(link: Any) -> None:
    absurd = facing(answers(200, json.dumps(link).encode()))
    with absurd as (gateway, _), pytest.raises(StripeUnavailable):
        gateway.account_link(ID, return_url=CALLBACK)


# The breaker -------------------------------------------------------------------------------------


class FakeClock:
    """A clock in seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail(breaker: CircuitBreaker) -> None:
    with suppress(StripeUnavailable), breaker:
        raise StripeUnavailable from library.APIConnectionError("-")


def is_open(breaker: CircuitBreaker) -> bool:
    return breaker._clock() < breaker._open_until


def test_the_breaker_opens_after_three_failures_in_a_row() -> None:
    breaker = CircuitBreaker(FakeClock())
    for _ in range(2):
        fail(breaker)
    assert not is_open(breaker)
    with breaker:
        pass
    for _ in range(2):
        fail(breaker)
    assert not is_open(breaker)
    fail(breaker)
    assert is_open(breaker)


def test_an_open_breaker_lets_calls_through_after_15_seconds() -> None:
    clock = FakeClock()
    breaker = CircuitBreaker(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 14.9
    assert is_open(breaker)
    clock.now += 0.1
    assert not is_open(breaker)
    fail(breaker)  # One more is enough: Stripe is still unreachable.
    assert is_open(breaker)
    clock.now += 15
    with breaker:
        pass
    for _ in range(2):
        fail(breaker)
    assert not is_open(breaker)


def test_refusals_do_not_open_the_breaker() -> None:
    breaker = CircuitBreaker(FakeClock())
    for _ in range(5):
        with suppress(StripeUnavailable), breaker:
            raise StripeUnavailable from library.InvalidRequestError("-", None, http_status=404)
    assert not is_open(breaker)


def test_calls_fail_at_once_while_another_has_waited_too_long() -> None:
    clock = FakeClock()
    breaker, waiting, over = CircuitBreaker(clock), threading.Event(), threading.Event()

    def wait() -> None:
        with breaker:
            waiting.set()
            over.wait(10)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(wait)
        assert waiting.wait(10)
        clock.now += CircuitBreaker.PATIENCE_SECONDS
        with breaker:
            pass
        clock.now += 0.1
        with pytest.raises(StripeUnavailable), breaker:
            pass
        over.set()
    with breaker:
        pass


def test_an_exception_propagates_through_the_breaker() -> None:
    with pytest.raises(ZeroDivisionError), CircuitBreaker(FakeClock()):
        _ = 1 / 0


def test_failures_in_concurrent_threads_open_the_breaker() -> None:
    breaker = CircuitBreaker(FakeClock())
    together = threading.Barrier(32)

    def once(number: int) -> None:
        together.wait(10)
        fail(breaker)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(once, range(32)))
    assert is_open(breaker)


def test_an_open_breaker_stops_queries_but_not_grants_or_revocations(
    gateway: Gateway, stripe: Sandbox
) -> None:
    account_id, code = connected_account(gateway, stripe), approved_code(gateway, stripe)
    stripe.faults.always("retrieve_account", Fault.SERVER_ERROR)
    for _ in range(5):
        with pytest.raises(StripeUnavailable):
            gateway.account(account_id)
    assert len(stripe.called("retrieve_account")) == 3
    # Calls that cannot be made later are tried all the same.
    assert gateway.complete(code).scope == "read_write"
    gateway.revoke(account_id)


def test_one_success_resets_the_count_of_failures(gateway: Gateway, stripe: Sandbox) -> None:
    account_id = connected_account(gateway, stripe)
    for _ in range(3):
        stripe.faults.once("retrieve_account", Fault.BAD_GATEWAY)
        stripe.faults.once("retrieve_account", Fault.RATE_LIMIT)
        for _ in range(2):
            with pytest.raises(StripeUnavailable):
                gateway.account(account_id)
        assert gateway.account(account_id) is not None


# Concurrency -------------------------------------------------------------------------------------


def test_a_connection_is_reused_by_other_threads() -> None:
    with facing(answers(200, json.dumps({"id": ID}).encode())) as (gateway, receiver):
        for _ in range(5):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(gateway.account, ID).result() == Account(ID)
        assert receiver.connections == 1
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: gateway.account(ID).id, range(60))) == {ID}
    assert receiver.connections <= 4


def test_a_connection_closed_by_stripe_is_replaced_silently() -> None:
    body = json.dumps({"id": ID}).encode()
    with facing(says(head(200, {"Content-Length": str(len(body))}) + body)) as (gateway, receiver):
        for _ in range(3):
            assert gateway.account(ID) == Account(ID)
            time.sleep(0.02)
    assert receiver.connections == 3


def test_hanging_calls_do_not_delay_others(impatient_gateway: Gateway, stripe: Sandbox) -> None:
    account_id = connected_account(impatient_gateway, stripe)
    stripe.faults.always("create_account", Fault.HANG)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(8))
        hanging = [
            pool.submit(impatient_gateway.create_account, ACME, idempotency_key=str(number))
            for number in range(8)
        ]
        began = time.monotonic()
        assert impatient_gateway.account(account_id) is not None
        assert time.monotonic() - began < SHORT_SECONDS
    assert {type(call.exception()) for call in hanging} == {StripeUnavailable}
