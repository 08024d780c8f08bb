"""The Stripe sandbox, called by Stripe's own library and checked against Stripe's own schema."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests
import stripe
from jsonschema_rs import Draft4Validator
from stripe import StripeClient, oauth_error

from billing.storage import database, embedded
from sandbox.__main__ import bound_to_parent
from sandbox.accounts import Status
from sandbox.faults import Fault
from sandbox.stripe import Sandbox
from tests import live
from tests.clock import TurnedClock
from tests.conftest import clone
from tests.sandbox.platform import client_of

ROOT = Path(__file__).parents[2]
CALLBACK = "http://127.0.0.1:8000/callback/?tenant=acme"
REFRESH = "http://127.0.0.1:8000/refresh/"
RETURN = "http://127.0.0.1:8000/return/"
# uvicorn checks a tenth of a second later whether it was told to stop at once.
DRAIN_NOTICED_SECONDS = 0.4
HALF_A_LOGIN = (
    b"POST /api/v1/auth/tenants/login/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n"
)


@pytest.fixture
def address(client: StripeClient) -> str:
    """Where the platform sends its tenant to connect."""
    return authorize_url(client)


def authorize_url(client: StripeClient, **more: Any) -> str:
    asked = {"scope": "read_write", "redirect_uri": CALLBACK, "state": "f3c1", **more}
    return client.oauth.authorize_url({name: value for name, value in asked.items() if value is not None})


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, strict_parsing=True))


def code_of(sandbox: Sandbox, address: str, status: str = "active") -> str:
    return query_of(sandbox.approve(address, status))["code"]


def redeem(client: StripeClient, code: str) -> Any:
    return client.oauth.token({"grant_type": "authorization_code", "code": code})


def connected(sandbox: Sandbox, client: StripeClient, status: str = "active") -> str:
    return redeem(client, code_of(sandbox, authorize_url(client), status)).stripe_user_id


def created(client: StripeClient, **more: Any) -> Any:
    return client.v1.accounts.create({"type": "standard", "email": "ada@acme.example", **more})


def link_to(client: StripeClient, account_id: str, **more: Any) -> Any:
    return client.v1.account_links.create(
        {
            "account": account_id,
            "type": "account_onboarding",
            "refresh_url": REFRESH,
            "return_url": RETURN,
            **more,
        }
    )


# The page ----------------------------------------------------------------------------------------


def test_page_says_that_it_is_not_stripe(address: str, session: requests.Session) -> None:
    answer = session.get(address)
    assert answer.status_code == 200
    assert "<title>Stripe sandbox</title>" in answer.text
    assert "This is not Stripe" in answer.text


def test_page_offers_every_state_and_a_refusal(address: str, session: requests.Session) -> None:
    page = session.get(address).text
    assert re.findall(r'name="account" value="(\w+)"', page) == [status.value for status in Status]
    assert re.findall(r'name="decision" value="(\w+)"', page) == ["connect", "decline"]


def test_page_shows_the_prefill_escaped(client: StripeClient, session: requests.Session) -> None:
    name = "<script>alert(1)</script> & Söhne"
    page = session.get(authorize_url(client, stripe_user={"business_name": name})).text
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Söhne" in page


def test_page_is_not_cached_and_runs_no_scripts(address: str, session: requests.Session) -> None:
    headers = session.get(address).headers
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    # Chromium would apply it to the redirect to the platform.
    assert "form-action" not in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("wrong", "mentioned"),
    [
        ({"client_id": "ca_other"}, "client identifier"),
        ({"response_type": "token"}, "response_type"),
        ({"scope": "admin"}, "scope"),
        ({"redirect_uri": None}, "redirect_uri"),
        ({"redirect_uri": "javascript:alert(1)"}, "redirect_uri"),
        ({"redirect_uri": "/callback/"}, "redirect_uri"),
        ({"redirect_uri": f"{CALLBACK}#here"}, "redirect_uri"),
        ({"redirect_uri": "http://[broken/"}, "redirect_uri"),
    ],
)
def test_400_page_for_an_invalid_authorize_url(
    sandbox: Sandbox, client: StripeClient, session: requests.Session, wrong: dict[str, Any], mentioned: str
) -> None:
    address = authorize_url(client, **wrong)
    for answer in (
        session.get(address),
        session.post(address, {"decision": "decline"}, allow_redirects=False),
    ):
        assert answer.status_code == 400
        assert mentioned in answer.text
    with pytest.raises(ValueError, match="400"):
        sandbox.approve(address)


def test_400_page_for_an_unknown_account_state(address: str, session: requests.Session) -> None:
    answer = session.post(address, {"decision": "connect", "account": "gold"}, allow_redirects=False)
    assert answer.status_code == 400


def test_400_page_for_an_unregistered_redirect_uri(session: requests.Session) -> None:
    with Sandbox(redirect_uris={RETURN}) as sandbox:
        client = client_of(sandbox, session)
        assert session.get(authorize_url(client, redirect_uri=RETURN)).status_code == 200
        assert session.get(authorize_url(client, redirect_uri=f"{RETURN}?x=1")).status_code == 400


def test_approval_returns_code_scope_and_state(sandbox: Sandbox, address: str) -> None:
    callback = sandbox.approve(address)
    assert callback.startswith(f"{CALLBACK}&")
    answered = query_of(callback)
    assert re.fullmatch(r"ac_\w{32}", answered.pop("code"))
    assert answered == {"tenant": "acme", "scope": "read_write", "state": "f3c1"}


def test_scope_is_read_only_by_default(sandbox: Sandbox, client: StripeClient) -> None:
    callback = sandbox.approve(authorize_url(client, scope=None))
    assert query_of(callback)["scope"] == "read_only"
    assert redeem(client, query_of(callback)["code"]).scope == "read_only"


def test_refusal_returns_the_error_and_the_state(sandbox: Sandbox, address: str) -> None:
    callback = sandbox.decline(address)
    assert "error_description=The+user+denied+your+request" in callback
    assert query_of(callback) == {
        "tenant": "acme",
        "error": "access_denied",
        "error_description": "The user denied your request",
        "state": "f3c1",
    }
    assert not sandbox.accounts


def test_callback_has_no_state_when_none_was_sent(sandbox: Sandbox, client: StripeClient) -> None:
    address = authorize_url(client, state=None)
    assert "state" not in query_of(sandbox.approve(address))
    assert "state" not in query_of(sandbox.decline(address))


def test_authorize_url_of_another_host_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="not the sandbox's"):
        sandbox.approve("https://connect.stripe.com/oauth/authorize?client_id=ca_1")


# Tokens ------------------------------------------------------------------------------------------


def test_token_names_the_account(sandbox: Sandbox, client: StripeClient, address: str) -> None:
    token = redeem(client, code_of(sandbox, address)).to_dict()
    assert token.keys() == {
        "access_token",
        "livemode",
        "refresh_token",
        "token_type",
        "stripe_publishable_key",
        "stripe_user_id",
        "scope",
    }
    assert re.fullmatch(r"acct_[A-Za-z0-9]{16}", token["stripe_user_id"])
    assert (token["livemode"], token["scope"], token["token_type"]) == (False, "read_write", "bearer")


def test_live_mode_follows_the_key(session: requests.Session) -> None:
    with Sandbox(livemode=True) as sandbox:
        assert sandbox.secret_key.startswith("sk_live_")
        client = client_of(sandbox, session)
        assert redeem(client, code_of(sandbox, authorize_url(client))).livemode is True


def test_key_may_be_sent_in_the_form(sandbox: Sandbox, session: requests.Session, address: str) -> None:
    form = {"grant_type": "authorization_code", "code": code_of(sandbox, address)}
    answer = session.post(f"{sandbox.url}/oauth/token", {**form, "client_secret": sandbox.secret_key})
    assert answer.json()["livemode"] is False
    assert sandbox.called("token")[0].form == form


def test_code_works_once_and_its_reuse_keeps_the_connection(
    sandbox: Sandbox, client: StripeClient, address: str
) -> None:
    code = code_of(sandbox, address)
    account_id = redeem(client, code).stripe_user_id
    with pytest.raises(oauth_error.InvalidGrantError, match=code) as refused:
        redeem(client, code)
    assert refused.value.http_status == 400
    assert refused.value.json_body.keys() == {"error", "error_description"}
    assert client.v1.accounts.retrieve(account_id).id == account_id


@pytest.mark.parametrize(("minutes", "works"), [(4.9, True), (5.1, False)])
def test_code_works_for_five_minutes(
    sandbox: Sandbox, client: StripeClient, address: str, minutes: float, works: bool
) -> None:
    sandbox.clock = clock = TurnedClock()
    code = code_of(sandbox, address)
    clock.turn(minutes=minutes)
    if works:
        assert redeem(client, code)
    else:
        with pytest.raises(oauth_error.InvalidGrantError, match="expired"):
            redeem(client, code)


def test_unknown_code_is_an_invalid_grant(client: StripeClient) -> None:
    with pytest.raises(oauth_error.InvalidGrantError, match="does not exist"):
        redeem(client, "ac_unknown")


def test_other_grant_types_are_not_supported(client: StripeClient) -> None:
    with pytest.raises(oauth_error.UnsupportedGrantTypeError):
        client.oauth.token({"grant_type": "refresh_token", "refresh_token": "rt_1"})


@pytest.mark.parametrize("credentials", [{}, {"client_secret": "sk_test_wrong"}])
def test_token_request_without_our_key_is_an_invalid_client(
    sandbox: Sandbox,
    session: requests.Session,
    client: StripeClient,
    address: str,
    credentials: dict[str, str],
) -> None:
    code = code_of(sandbox, address)
    form = {"grant_type": "authorization_code", "code": code, **credentials}
    answer = session.post(f"{sandbox.url}/oauth/token", form)
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    assert redeem(client, code)


def test_an_account_can_be_connected_again(sandbox: Sandbox, client: StripeClient, address: str) -> None:
    account_id = connected(sandbox, client, "restricted")
    callback = sandbox.approve(address, account_id=account_id)
    assert redeem(client, query_of(callback)["code"]).stripe_user_id == account_id
    assert client.v1.accounts.retrieve(account_id).charges_enabled is False


# Deauthorizing -----------------------------------------------------------------------------------


def test_deauthorized_account_is_out_of_reach(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = connected(sandbox, client)
    answer = client.oauth.deauthorize({"stripe_user_id": account_id})
    assert answer.stripe_user_id == account_id
    assert_out_of_reach(client, account_id)


def test_revoked_account_is_out_of_reach(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = connected(sandbox, client)
    sandbox.revoke(account_id)
    assert_out_of_reach(client, account_id)
    assert_not_connected(client, account_id)


def test_account_is_out_of_reach_until_its_code_is_redeemed(
    sandbox: Sandbox, client: StripeClient, address: str
) -> None:
    code = code_of(sandbox, address)
    (account_id,) = sandbox.accounts
    assert_out_of_reach(client, account_id)
    redeem(client, code)
    assert client.v1.accounts.retrieve(account_id)


def test_deauthorizing_twice_is_an_invalid_client(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = connected(sandbox, client)
    client.oauth.deauthorize({"stripe_user_id": account_id})
    assert_not_connected(client, account_id)


def test_account_created_by_the_platform_cannot_be_deauthorized(client: StripeClient) -> None:
    account_id = created(client).id
    assert_not_connected(client, account_id)
    assert client.v1.accounts.retrieve(account_id)


def test_deauthorizing_needs_the_client_id(client: StripeClient) -> None:
    with pytest.raises(oauth_error.InvalidClientError, match="No such application"):
        client.oauth.deauthorize({"client_id": "ca_other", "stripe_user_id": "acct_1"})


def assert_out_of_reach(client: StripeClient, account_id: str) -> None:
    with pytest.raises(stripe.PermissionError) as refused:
        client.v1.accounts.retrieve(account_id)
    assert refused.value.http_status == 403
    assert refused.value.error.code == "account_invalid"


def assert_not_connected(client: StripeClient, account_id: str) -> None:
    with pytest.raises(oauth_error.InvalidClientError, match="not connected") as refused:
        client.oauth.deauthorize({"stripe_user_id": account_id})
    assert refused.value.http_status == 401


# Accounts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", Status)
def test_account_has_the_chosen_state(sandbox: Sandbox, client: StripeClient, status: Status) -> None:
    assert read(client.v1.accounts.retrieve(connected(sandbox, client, status))) == status


@pytest.mark.parametrize("status", Status)
def test_account_can_change_to_every_state(sandbox: Sandbox, client: StripeClient, status: Status) -> None:
    account_id = connected(sandbox, client, "rejected")
    sandbox.become(account_id, status.value)
    assert read(client.v1.accounts.retrieve(account_id)) == status


def read(account: stripe.Account) -> Status:
    """How a platform reads an account's state: the first that fits."""
    body = account.to_dict()
    due = body["requirements"]
    reason = due["disabled_reason"] or ""
    if reason.startswith("rejected."):
        return Status.REJECTED
    if not body["details_submitted"]:
        return Status.PENDING
    if reason in ("requirements.pending_verification", "under_review", "listed"):
        return Status.UNDER_REVIEW
    if reason or due["past_due"] or not body["charges_enabled"]:
        return Status.RESTRICTED
    if due["currently_due"] or not body["payouts_enabled"]:
        return Status.INCOMPLETE
    return Status.ACTIVE


def test_account_has_the_prefilled_values(sandbox: Sandbox, client: StripeClient) -> None:
    prefill = {
        "email": "ada@acme.example",
        "business_name": "Acme",
        "country": "GB",
        "url": "https://acme.example",
    }
    code = code_of(sandbox, authorize_url(client, stripe_user=prefill))
    account = client.v1.accounts.retrieve(redeem(client, code).stripe_user_id)
    assert (account.email, account.country, account.default_currency) == ("ada@acme.example", "GB", "gbp")
    assert account.business_profile.to_dict() == {"name": "Acme", "url": "https://acme.example"}


def test_change_merges_mappings_and_replaces_other_values(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = connected(sandbox, client)
    sandbox.change(account_id, requirements={"disabled_reason": "listed"}, country="FR")
    account = client.v1.accounts.retrieve(account_id)
    assert account.country == "FR"
    assert account.requirements.disabled_reason == "listed"
    assert account.requirements.currently_due == []


def test_changes_affect_only_their_account(sandbox: Sandbox, client: StripeClient) -> None:
    changed, other = (connected(sandbox, client, "restricted") for _ in range(2))
    sandbox.change(changed, requirements={"past_due": []})
    assert client.v1.accounts.retrieve(other).requirements.past_due


def test_created_account_is_pending_and_in_reach(client: StripeClient) -> None:
    account = created(client, business_profile={"name": "Acme"}, metadata={"tenant": "acme"})
    assert (account.email, account.type) == ("ada@acme.example", "standard")
    assert account.business_profile.name == "Acme"
    assert account.metadata.to_dict() == {"tenant": "acme"}
    assert read(client.v1.accounts.retrieve(account.id)) == Status.PENDING


def test_same_idempotency_key_returns_the_same_account(sandbox: Sandbox, client: StripeClient) -> None:
    def create(key: str, email: str = "ada@acme.example") -> str:
        return client.v1.accounts.create({"email": email}, {"idempotency_key": key}).id

    assert create("one") == create("one") != create("two")
    assert len(sandbox.accounts) == 2
    with pytest.raises(stripe.IdempotencyError):
        create("one", "grace@acme.example")


@pytest.mark.parametrize("key", ["sk_test_wrong", "sk_test_"])
def test_401_for_a_wrong_key(sandbox: Sandbox, session: requests.Session, key: str) -> None:
    client = client_of(sandbox, session, key=key)
    for call in (lambda: client.v1.accounts.retrieve("acct_1"), lambda: created(client)):
        with pytest.raises(stripe.AuthenticationError, match="Invalid API Key") as refused:
            call()
        assert refused.value.http_status == 401


def test_401_without_a_key(sandbox: Sandbox, session: requests.Session) -> None:
    answer = session.get(f"{sandbox.url}/v1/accounts/acct_1")
    assert answer.status_code == 401
    assert "did not provide an API key" in answer.json()["error"]["message"]


def test_404_as_stripe_for_an_unknown_endpoint(client: StripeClient) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL") as refused:
        client.v1.customers.list()
    assert refused.value.http_status == 404


# Account links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", Status)
def test_finished_link_gives_the_account_the_chosen_state(
    sandbox: Sandbox, client: StripeClient, status: Status
) -> None:
    account_id = created(client).id
    assert sandbox.finish(link_to(client, account_id).url, status.value) == RETURN
    assert read(client.v1.accounts.retrieve(account_id)) == status


def test_link_left_unfinished_changes_nothing(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = created(client).id
    assert sandbox.leave(link_to(client, account_id).url) == RETURN
    assert read(client.v1.accounts.retrieve(account_id)) == Status.PENDING


def test_link_opens_a_page(client: StripeClient, session: requests.Session) -> None:
    page = session.get(link_to(client, created(client).id).url).text
    assert "This is not Stripe" in page
    assert re.findall(r'name="decision" value="(\w+)"', page) == ["finish", "leave"]


def test_used_link_leads_to_the_refresh_url(
    sandbox: Sandbox, client: StripeClient, session: requests.Session
) -> None:
    account_id = created(client).id
    url = link_to(client, account_id).url
    sandbox.leave(url)
    assert session.get(url, allow_redirects=False).headers["Location"] == REFRESH
    assert sandbox.finish(url) == REFRESH
    assert read(client.v1.accounts.retrieve(account_id)) == Status.PENDING


def test_expired_link_leads_to_the_refresh_url(sandbox: Sandbox, client: StripeClient) -> None:
    sandbox.clock = clock = TurnedClock()
    link = link_to(client, created(client).id)
    assert link.expires_at - link.created == 300
    clock.turn(minutes=5)
    assert sandbox.finish(link.url) == REFRESH


@pytest.mark.parametrize("missing", ["account", "type", "refresh_url", "return_url"])
def test_400_for_a_link_without_a_required_parameter(client: StripeClient, missing: str) -> None:
    with pytest.raises(stripe.InvalidRequestError, match=missing) as refused:
        link_to(client, created(client).id, **{missing: ""})
    assert refused.value.error.code == "parameter_missing"


def test_403_for_a_link_to_another_platforms_account(client: StripeClient) -> None:
    with pytest.raises(stripe.PermissionError):
        link_to(client, "acct_another")


# Stripe's schema ---------------------------------------------------------------------------------


class Schema:
    """A schema of Stripe's document, translated from OpenAPI 3.0 to JSON Schema."""

    document = json.loads((ROOT / "tests/data/stripe-openapi-accounts.json").read_text())

    def __init__(self, name: str) -> None:
        schemas = {"schemas": self._translated(self.document["components"]["schemas"])}
        self.validator = Draft4Validator(
            {"allOf": [{"$ref": f"#/components/schemas/{name}"}], "components": schemas}
        )

    def faults(self, body: Any) -> list[str]:
        return [f"{error.instance_path}: {error.message}" for error in self.validator.iter_errors(body)]

    def _translated(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._translated(item) for item in node]
        if not isinstance(node, dict):
            return node
        schema = {name: self._translated(value) for name, value in node.items()}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            # Stripe allows other properties; an invented name would go unnoticed.
            schema.setdefault("additionalProperties", False)
        return {"anyOf": [schema, {"type": "null"}]} if schema.pop("nullable", False) is True else schema


@pytest.fixture(scope="module")
def account_schema() -> Schema:
    return Schema("account")


@pytest.mark.parametrize("status", Status)
def test_connected_account_fits_the_schema(
    sandbox: Sandbox, client: StripeClient, account_schema: Schema, status: Status
) -> None:
    account = client.v1.accounts.retrieve(connected(sandbox, client, status))
    assert account_schema.faults(account.to_dict()) == []


@pytest.mark.parametrize("status", Status)
def test_created_account_fits_the_schema(
    sandbox: Sandbox, client: StripeClient, account_schema: Schema, status: Status
) -> None:
    account = created(client, business_profile={"name": "Acme"}, metadata={"tenant": "acme"})
    assert account_schema.faults(account.to_dict()) == []
    sandbox.become(account.id, status.value)
    assert account_schema.faults(client.v1.accounts.retrieve(account.id).to_dict()) == []


def test_bare_account_fits_the_schema(sandbox: Sandbox, client: StripeClient, account_schema: Schema) -> None:
    account_id = connected(sandbox, client)
    sandbox.faults.once("retrieve_account", Fault.BARE_ACCOUNT)
    body = client.v1.accounts.retrieve(account_id).to_dict()
    assert body == {"id": account_id, "object": "account"}
    assert account_schema.faults(body) == []


def test_account_link_fits_the_schema(client: StripeClient) -> None:
    assert Schema("account_link").faults(link_to(client, created(client).id).to_dict()) == []


def test_errors_fit_the_schema(sandbox: Sandbox, session: requests.Session) -> None:
    refusals = [session.get(f"{sandbox.url}{path}") for path in ("/v1/accounts/acct_1", "/v1/nothing")]
    sandbox.faults.always("create_account", Fault.RATE_LIMIT)
    refusals.append(session.post(f"{sandbox.url}/v1/accounts"))
    assert [Schema("error").faults(refusal.json()) for refusal in refusals] == [[], [], []]


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"charges_enabled": None}, "charges_enabled"),
        ({"requirements": {"disabled_reason": "mood"}}, "requirements"),
        ({"requirements": {"due": []}}, "requirements"),
        ({"livemode": False}, ""),
    ],
)
def test_schema_reports_a_wrong_account(
    sandbox: Sandbox, client: StripeClient, account_schema: Schema, wrong: dict[str, Any], where: str
) -> None:
    account_id = connected(sandbox, client)
    sandbox.change(account_id, **wrong)
    (fault,) = account_schema.faults(client.v1.accounts.retrieve(account_id).to_dict())
    assert where in fault


# Faults ------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(sandbox: Sandbox, session: requests.Session) -> StripeClient:
    return client_of(sandbox, session, timeout=0.2)


def test_hang_does_not_use_up_the_code(
    sandbox: Sandbox, client: StripeClient, impatient: StripeClient, address: str
) -> None:
    code = code_of(sandbox, address)
    sandbox.faults.once("token", Fault.HANG)
    with pytest.raises(stripe.APIConnectionError):
        redeem(impatient, code)
    assert redeem(client, code)


def test_hang_after_uses_up_the_code(
    sandbox: Sandbox, client: StripeClient, impatient: StripeClient, address: str
) -> None:
    code = code_of(sandbox, address)
    sandbox.faults.once("token", Fault.HANG_AFTER)
    with pytest.raises(stripe.APIConnectionError):
        redeem(impatient, code)
    with pytest.raises(oauth_error.InvalidGrantError, match="already been used"):
        redeem(client, code)


def test_hang_ends_with_504_after_its_seconds(sandbox: Sandbox, session: requests.Session) -> None:
    sandbox.faults.hang_seconds = 0.05
    sandbox.faults.once("retrieve_account", Fault.HANG)
    assert session.get(f"{sandbox.url}/v1/accounts/acct_1").status_code == 504


def test_account_created_without_a_response_is_returned_on_retry(
    sandbox: Sandbox, client: StripeClient, impatient: StripeClient
) -> None:
    sandbox.faults.once("create_account", Fault.HANG_AFTER)
    with pytest.raises(stripe.APIConnectionError):
        impatient.v1.accounts.create({}, {"idempotency_key": "one"})
    (account_id,) = sandbox.accounts
    assert client.v1.accounts.create({}, {"idempotency_key": "one"}).id == account_id


def test_drip_does_not_trigger_a_read_timeout(
    sandbox: Sandbox, client: StripeClient, impatient: StripeClient
) -> None:
    account_id = connected(sandbox, client)
    sandbox.faults.once("retrieve_account", Fault.DRIP)
    sandbox.faults.drip_seconds = 0.0003
    assert impatient.v1.accounts.retrieve(account_id).id == account_id


@pytest.mark.parametrize(
    ("fault", "error", "status"),
    [
        (Fault.SERVER_ERROR, stripe.APIError, 500),
        (Fault.BAD_GATEWAY, stripe.APIError, 502),
        (Fault.RATE_LIMIT, stripe.RateLimitError, 429),
        (Fault.EMPTY, stripe.APIError, 200),
    ],
)
@pytest.mark.parametrize("operation", ["token", "deauthorize", "retrieve_account", "create_account_link"])
def test_server_faults_reach_the_library(
    sandbox: Sandbox,
    client: StripeClient,
    operation: str,
    fault: Fault,
    error: type[stripe.StripeError],
    status: int,
) -> None:
    calls = {
        "token": lambda: redeem(client, "ac_1"),
        "deauthorize": lambda: client.oauth.deauthorize({"stripe_user_id": "acct_1"}),
        "retrieve_account": lambda: client.v1.accounts.retrieve("acct_1"),
        "create_account_link": lambda: link_to(client, "acct_1"),
    }
    sandbox.faults.always(operation, fault)
    with pytest.raises(error) as failed:
        calls[operation]()
    assert failed.value.http_status == status


@pytest.mark.parametrize(
    ("fault", "member", "value"),
    [
        (Fault.WRONG_LIVEMODE, "livemode", True),
        (Fault.READ_ONLY, "scope", "read_only"),
        (Fault.MALFORMED_ACCOUNT, "stripe_user_id", "acct_1/../../v1/charges"),
    ],
)
def test_token_fault_alters_its_member(
    sandbox: Sandbox, client: StripeClient, address: str, fault: Fault, member: str, value: object
) -> None:
    sandbox.faults.once("token", fault)
    assert redeem(client, code_of(sandbox, address))[member] == value


def test_unknown_oauth_error_is_not_handled_by_the_library(sandbox: Sandbox, client: StripeClient) -> None:
    sandbox.faults.once("token", Fault.UNKNOWN_OAUTH_ERROR)
    with pytest.raises(AttributeError):
        redeem(client, "ac_1")


def test_refusal_can_come_without_state(sandbox: Sandbox, address: str) -> None:
    sandbox.faults.once("decide", Fault.NO_STATE)
    assert query_of(sandbox.decline(address)) == {
        "tenant": "acme",
        "error": "access_denied",
        "error_description": "The user denied your request",
    }


def test_no_state_fault_does_not_break_a_refused_page(sandbox: Sandbox, address: str) -> None:
    sandbox.faults.once("decide", Fault.NO_STATE)
    refused = requests.post(address.partition("?")[0], timeout=10, allow_redirects=False)
    assert refused.status_code == 400


def test_token_fault_does_not_alter_a_refusal(sandbox: Sandbox, client: StripeClient) -> None:
    sandbox.faults.once("token", Fault.WRONG_LIVEMODE)
    with pytest.raises(oauth_error.InvalidGrantError):
        redeem(client, "ac_unknown")


def test_once_faults_one_call_and_always_faults_until_cleared(
    sandbox: Sandbox, session: requests.Session
) -> None:
    def statuses() -> list[int]:
        return [session.get(f"{sandbox.url}/v1/accounts/acct_1").status_code for _ in range(3)]

    sandbox.faults.once("retrieve_account", Fault.SERVER_ERROR)
    sandbox.faults.once("retrieve_account", Fault.BAD_GATEWAY)
    assert statuses() == [500, 502, 401]
    sandbox.faults.always("retrieve_account", Fault.RATE_LIMIT)
    assert statuses() == [429, 429, 429]
    sandbox.faults.clear()
    assert statuses() == [401, 401, 401]


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("tokens", Fault.HANG),
        ("retrieve_account", Fault.READ_ONLY),
        ("token", Fault.NO_STATE),
        ("decide", Fault.DRIP),
    ],
)
def test_inapplicable_fault_is_refused(sandbox: Sandbox, operation: str, fault: Fault) -> None:
    with pytest.raises(ValueError, match=operation):
        sandbox.faults.once(operation, fault)


def test_sandbox_stops_while_a_call_hangs() -> None:
    with ExitStack() as stack:
        with Sandbox() as sandbox:
            sandbox.faults.always("retrieve_account", Fault.HANG)
            caller = stack.enter_context(connection(urlsplit(sandbox.url).port))
            caller.sendall(b"GET /v1/accounts/acct_1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await_call(sandbox, "retrieve_account")
            stop_requested = time.monotonic()
        assert time.monotonic() - stop_requested < 5
        assert b" 504 " in caller.recv(1000)


def await_call(sandbox: Sandbox, operation: str) -> None:
    deadline = time.monotonic() + 5
    while not sandbox.called(operation):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Recorded calls ----------------------------------------------------------------------------------


def test_calls_are_recorded_without_the_key(sandbox: Sandbox, client: StripeClient, address: str) -> None:
    code = code_of(sandbox, address)
    redeem(client, code)
    (call,) = sandbox.called("token")
    assert call.form == {"grant_type": "authorization_code", "code": code}
    assert "stripe-version" in call.headers
    assert sandbox.secret_key not in repr(call)
    assert [call.operation for call in sandbox.calls] == ["decide", "token"]


def test_calls_that_fail_are_recorded(sandbox: Sandbox, client: StripeClient) -> None:
    sandbox.faults.once("retrieve_account", Fault.SERVER_ERROR)
    with pytest.raises(stripe.APIError):
        client.v1.accounts.retrieve("acct_1")
    assert len(sandbox.called("retrieve_account")) == 1


def test_misspelt_operation_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="tokens"):
        sandbox.called("tokens")


def test_reset_restores_the_initial_state(sandbox: Sandbox, client: StripeClient) -> None:
    account_id = connected(sandbox, client)
    url, key = sandbox.url, sandbox.secret_key
    sandbox.faults.always("retrieve_account", Fault.SERVER_ERROR)
    sandbox.reset()
    assert (sandbox.calls, sandbox.accounts, sandbox.url, sandbox.secret_key) == ([], {}, url, key)
    assert_out_of_reach(client, account_id)


def test_settings_point_at_the_sandbox(sandbox: Sandbox) -> None:
    assert sandbox.environ == {
        "STRIPE_SECRET_KEY": sandbox.secret_key,
        "STRIPE_CONNECT_CLIENT_ID": sandbox.client_id,
        "STRIPE_API_BASE": sandbox.url,
        "STRIPE_CONNECT_BASE": sandbox.url,
    }
    assert urlsplit(sandbox.url).hostname == "127.0.0.1"


# `python -m sandbox` -----------------------------------------------------------------------------


def run(*arguments: str, directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_production_is_refused(tmp_path: Path) -> None:
    ended = run("serve", directory=tmp_path, ENVIRONMENT="production")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "ENVIRONMENT is production: the Stripe sandbox is for development only.\n"


def test_production_set_in_a_dotenv_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENVIRONMENT")
    (tmp_path / ".env").write_text("ENVIRONMENT=production\n")
    ended = run("serve", directory=tmp_path)
    assert ended.returncode == 1
    assert "the Stripe sandbox is for development only" in ended.stderr


def test_only_the_serve_command_is_accepted(tmp_path: Path) -> None:
    ended = run("migrate", directory=tmp_path)
    assert ended.returncode == 2
    assert "usage: python -m sandbox serve" in ended.stderr


def test_serve_announces_the_sandbox_and_exits_with_the_servers_code(tmp_path: Path) -> None:
    ended = run("serve", "--port", "nonsense", directory=tmp_path)
    assert re.search(r"Stripe is a SANDBOX at http://127\.0\.0\.1:\d+: nothing in it is real", ended.stdout)
    assert "'nonsense' is not a valid integer" in ended.stderr
    assert ended.returncode == 2


@pytest.fixture
def database_url(cluster: embedded.Cluster, worker_id: str) -> str:
    """A database of its own: the server's worker outlasts the test, and must not clean up what others use."""
    name = f"billing_sandbox_{worker_id}"
    clone(cluster, name)
    return database.url(cluster, database.APP, name)


def test_ctrl_c_lets_a_request_in_flight_finish(database_url: str) -> None:
    with sandbox_serving(database_url) as (process, port), connection(port) as caller:
        caller.sendall(HALF_A_LOGIN)
        assert b" 100 " in caller.recv(1000)
        # To the whole group, as a terminal does. A second one would mean to stop at once.
        os.killpg(process.pid, signal.SIGINT)
        assert_free(port)
        time.sleep(DRAIN_NOTICED_SECONDS)
        caller.sendall(b"{}")
        assert caller.recv(1000).startswith(b"HTTP/1.1 4")
        assert process.wait(live.STOP_SECONDS) == 0


@pytest.mark.skipif(not bound_to_parent(), reason="nothing here binds a process to its parent")
def test_server_ends_when_the_sandbox_is_killed(database_url: str) -> None:
    with sandbox_serving(database_url) as (process, port):
        process.kill()
        process.wait()
        assert_free(port)


@contextmanager
def sandbox_serving(database_url: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = live.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox", "serve", "--port", str(port)],
        env={**os.environ, "DATABASE_URL": database_url},
        start_new_session=True,
    )
    try:
        live.await_ready(process, f"http://127.0.0.1:{port}")
        yield process, port
    finally:
        process.terminate()
        process.wait(live.STOP_SECONDS)


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=live.STOP_SECONDS)


def assert_free(port: int) -> None:
    deadline = time.monotonic() + live.STOP_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.02)
    raise AssertionError(f"something still listens on port {port}")
