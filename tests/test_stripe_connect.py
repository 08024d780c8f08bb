"""The rules of Stripe Connect, as tables of cases."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

import pytest

from billing import stripe_connect
from billing.errors import ReturnUrlRefused, StateUnknown, StripeAccountTaken, StripeAlreadyConnected
from billing.ids import new_id
from billing.stripe_connect import (
    Account,
    Connected,
    Connection,
    RequirementError,
    Requirements,
    State,
    hashed,
    next_check,
    require_return_url,
    require_startable,
    returning,
)
from billing.stripe_connections import ConnectStart
from billing.tenants import Tenant

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
ORIGINS = frozenset({"https://app.acme.example", "http://localhost:3000", "https://billing.example"})
ID = "acct_1AcmeExample"


def account(**changes: Any) -> Account:
    """An account with nothing wrong but these changes; `requirements` is a mapping."""
    asked = Requirements(**changes.pop("requirements", {}))
    return replace(
        Account(ID, charges_enabled=True, payouts_enabled=True, details_submitted=True, requirements=asked),
        **changes,
    )


# What an account lacks, by its status.
LACKING: dict[str, dict[str, bool]] = {
    "active": {},
    "pending": {"details_submitted": False},
    "incomplete": {"payouts_enabled": False},
    "restricted": {"charges_enabled": False},
}


def connection(status: str = "active", *, flow: Any = "oauth", ended: bool = False) -> Connection:
    found = account(**LACKING[status])
    assert found.status == status
    return Connection(new_id(), flow, True, found, NOW, NOW, NOW if ended else None)


# What an account's status is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "active"),
        # What is due eventually, or was not accepted, changes nothing by itself.
        ({"requirements": {"eventually_due": ("external_account",)}}, "active"),
        ({"requirements": {"pending_verification": ("company.tax_id",)}}, "active"),
        ({"requirements": {"current_deadline": 1}}, "active"),
        ({"requirements": {"errors": (RequirementError("c", "r", "f"),)}}, "active"),
        ({"capabilities": {"card_payments": "inactive"}}, "active"),
        ({"requirements": {"disabled_reason": ""}}, "active"),
        ({"requirements": {"currently_due": ("external_account",)}}, "incomplete"),
        ({"payouts_enabled": False}, "incomplete"),
        ({"payouts_enabled": None}, "incomplete"),
        ({"charges_enabled": False}, "restricted"),
        ({"charges_enabled": None}, "restricted"),
        ({"requirements": {"past_due": ("external_account",)}}, "restricted"),
        ({"requirements": {"disabled_reason": "requirements.past_due"}}, "restricted"),
        ({"requirements": {"disabled_reason": "platform_paused"}}, "restricted"),
        ({"requirements": {"disabled_reason": "a reason of next year"}}, "restricted"),
        ({"requirements": {"disabled_reason": "rejected"}}, "restricted"),
        ({"requirements": {"disabled_reason": "under_review"}}, "under_review"),
        ({"requirements": {"disabled_reason": "listed"}}, "under_review"),
        ({"requirements": {"disabled_reason": "requirements.pending_verification"}}, "under_review"),
        ({"details_submitted": False}, "pending"),
        ({"details_submitted": None}, "pending"),
        ({"requirements": {"disabled_reason": "rejected.fraud"}}, "rejected"),
        ({"requirements": {"disabled_reason": "rejected.terms_of_service"}}, "rejected"),
    ],
)
def test_the_status_of_an_account(changes: dict[str, Any], status: str) -> None:
    assert account(**changes).status == status


@pytest.mark.parametrize(
    ("disabled_reason", "submitted", "charges", "payouts", "status"),
    [
        ("rejected.other", False, False, False, "rejected"),
        ("under_review", False, False, False, "pending"),
        ("requirements.past_due", False, False, False, "pending"),
        ("under_review", True, False, False, "under_review"),
        ("requirements.past_due", True, False, False, "restricted"),
        (None, True, False, False, "restricted"),
        (None, True, True, False, "incomplete"),
        (None, True, True, True, "incomplete"),
    ],
)
def test_the_first_status_that_applies_wins(
    disabled_reason: str | None, submitted: bool, charges: bool, payouts: bool, status: str
) -> None:
    found = account(
        details_submitted=submitted,
        charges_enabled=charges,
        payouts_enabled=payouts,
        requirements={"disabled_reason": disabled_reason, "currently_due": ("external_account",)},
    )
    assert found.status == status


def test_an_account_known_only_by_its_id_is_pending() -> None:
    assert Account(ID).status == "pending"


def test_every_status_has_a_message() -> None:
    words = {*get_args(stripe_connect.Status), "not_connected", "disconnected"}
    assert stripe_connect.MESSAGES.keys() == words


def test_an_ended_connection_is_disconnected_whatever_its_account_status() -> None:
    assert connection("active").status == "active"
    assert connection("active", ended=True).status == "disconnected"
    assert not connection("pending", ended=True).is_living


# Who may start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "flow", "may_start"),
    [
        (None, "oauth", True),
        (None, "account_link", True),
        (connection(ended=True), "oauth", True),
        (connection(ended=True), "account_link", True),
        (connection("pending", flow="account_link", ended=True), "oauth", True),
        (connection("pending", flow="account_link"), "account_link", True),
        (connection("pending", flow="account_link"), "oauth", False),
        (connection("incomplete", flow="account_link"), "account_link", False),
        (connection("restricted", flow="account_link"), "account_link", False),
        (connection("active", flow="account_link"), "account_link", False),
        (connection("active", flow="account_link"), "oauth", False),
        (connection("pending"), "oauth", False),
        (connection("pending"), "account_link", False),
        (connection("active"), "oauth", False),
        (connection("active"), "account_link", False),
    ],
)
def test_which_flow_may_start_beside_a_connection(
    current: Connection | None, flow: Any, may_start: bool
) -> None:
    if may_start:
        require_startable(current, flow)
    else:
        with pytest.raises(StripeAlreadyConnected):
            require_startable(current, flow)


def test_checks_of_many_accounts_spread_out() -> None:
    waits = {next_check(NOW) - NOW for _ in range(200)}
    assert timedelta(hours=1) <= min(waits)
    assert max(waits) <= timedelta(minutes=75)
    assert len(waits) > 50


# The browser of a state --------------------------------------------------------------------------


def state(browser: str | None) -> State:
    bound = hashed(browser) if browser else None
    return State(new_id(), new_id(), "0" * 64, "oauth", None, bound, NOW, NOW + timedelta(minutes=10))


@pytest.mark.parametrize(
    ("started_by", "brought_by", "is_theirs"),
    [
        (None, None, True),
        (None, "somebody", True),
        ("ada", "ada", True),
        ("ada", "eve", False),
        ("ada", "", False),
        ("ada", "Ada", False),
        ("ada", None, False),
    ],
)
def test_a_state_is_valid_only_for_the_browser_that_started_it(
    started_by: str | None, brought_by: str | None, is_theirs: bool
) -> None:
    assert state(started_by).is_for(brought_by) is is_theirs


def test_a_state_is_hashed_for_storage() -> None:
    assert hashed("a state") != b"a state"
    assert len(hashed("a state")) == 32


def test_a_new_state_is_not_in_a_representation() -> None:
    assert "a state" not in repr(
        ConnectStart("https://connect.example/?state=a+state", "", state(None), "a state")
    )


# Where a browser may return to -------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        None,
        "https://app.acme.example",
        "https://app.acme.example/",
        "https://app.acme.example/settings/payments?tab=stripe#top",
        "https://app.acme.example?tab=stripe",
        "https://app.acme.example//evil.example",
        "https://app.acme.example/?next=https://evil.example",
        "https://app.acme.example/@evil.example",
        "http://localhost:3000/",
        "https://billing.example/ui/",
    ],
)
def test_a_return_url_of_an_allowed_origin_is_accepted(url: str | None) -> None:
    require_return_url(url, ORIGINS)


@pytest.mark.parametrize(
    "url",
    [
        "http://app.acme.example/",
        "ftp://app.acme.example/",
        "javascript:alert(1)",
        "javascript://app.acme.example/%0aalert(1)",
        "data:text/html,x",
        "null",
        "",
        "/settings",
        "//app.acme.example/",
        "https:app.acme.example/",
        "https:/app.acme.example/",
        "https:///app.acme.example/",
        "https://evil.example/",
        "https://app.acme.example.evil.example/",
        "https://app.acme.exampleevil.example/",
        "https://evilapp.acme.example/",
        "https://acme.example/",
        "https://evil.example/https://app.acme.example/",
        "https://evil.example?https://app.acme.example/",
        "https://evil.example#https://app.acme.example/",
        "https://app.acme.example@evil.example/",
        "https://app.acme.example:443@evil.example/",
        "https://evil.example@app.acme.example/",
        "https://@app.acme.example/",
        "https://app.acme.example:443/",
        "https://app.acme.example:8443/",
        "https://app.acme.example:/",
        "http://localhost/",
        "http://localhost:3001/",
        "http://localhost:30000/",
        "http://127.0.0.1:3000/",
        "https://app.acme.example./",
        "https://APP.acme.example/",
        "https://app.acme.example%2eevil.example/",
        "https://app.acme.example%00.evil.example/",
        "https://app.acme.example;evil.example/",
        "https://app.acme.example\\@evil.example/",
        "https://app.acme.example\\.evil.example/",
        "https://evil.example\\@app.acme.example/",
        "https://app.acme.example/\\evil.example",
        "https:\\\\app.acme.example/",
        # A full stop, a dot leader, a fraction slash and capitals that some parsers fold.
        "https://app。acme.example/",
        "https://app․acme.example/",
        "https://app.acme.example⁄.evil.example/",
        "https://ａpp.acme.example/",
        "https://app.acme.example/ſ",
        "https://[app.acme.example/",
        "https://[::1/",
    ],
)
def test_any_other_return_url_is_refused(url: str) -> None:
    with pytest.raises(ReturnUrlRefused):
        require_return_url(url, ORIGINS)


@pytest.mark.parametrize("url", ["null", "null://null/", "://", "http://localhost:3000/"])
def test_without_allowed_origins_every_return_url_is_refused(url: str) -> None:
    with pytest.raises(ReturnUrlRefused):
        require_return_url(url, ())


# What the return URL reports ---------------------------------------------------------------------


def connected() -> Connected:
    tenant = Tenant(
        new_id(),
        "Acme Inc.",
        "acme-inc",
        "ada@acme.example",
        None,
        None,
        ID,
        "active",
        "free",
        True,
        NOW,
        NOW,
    )
    return Connected(connection(), tenant)


@pytest.mark.parametrize(
    ("url", "returned"),
    [
        ("https://app.acme.example", "https://app.acme.example?stripe=connected"),
        ("https://app.acme.example/", "https://app.acme.example/?stripe=connected"),
        ("https://app.acme.example/?", "https://app.acme.example/?stripe=connected"),
        ("https://app.acme.example/a?b=c", "https://app.acme.example/a?b=c&stripe=connected"),
        ("https://app.acme.example/a?b=%26&b=", "https://app.acme.example/a?b=%26&b=&stripe=connected"),
        ("https://app.acme.example/a#b?c", "https://app.acme.example/a?stripe=connected#b?c"),
        ("https://app.acme.example/a?b#c", "https://app.acme.example/a?b&stripe=connected#c"),
        ("https://app.acme.example//a", "https://app.acme.example//a?stripe=connected"),
        ("http://localhost:3000/", "http://localhost:3000/?stripe=connected"),
        # The parameters of an earlier return would be read first.
        (
            "https://app.acme.example/?stripe=error&a=b&code=x&",
            "https://app.acme.example/?a=b&stripe=connected",
        ),
    ],
)
def test_the_return_url_reports_a_connection(url: str, returned: str) -> None:
    assert returning(url, connected()) == returned


@pytest.mark.parametrize(
    ("error", "code"),
    [(StripeAccountTaken(), "stripe-account-taken"), (StateUnknown("why"), "state-unknown")],
)
def test_the_return_url_reports_only_the_code_of_an_error(error: Any, code: str) -> None:
    returned = returning("https://app.acme.example/a?b=c", error)
    assert parse_qsl(urlsplit(returned).query) == [("b", "c"), ("stripe", "error"), ("code", code)]
