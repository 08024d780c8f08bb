"""Connecting a Stripe account in a browser, from our page through the sandbox's pages and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
import requests
from playwright.sync_api import Page, Response, expect

from billing.stripe_connect import MESSAGES
from tests.conftest import API, PASSWORD, bearer
from tests.e2e.places import Place

pytestmark = pytest.mark.browser

COOKIE = "__Host-connect"
CONNECTED = "The Stripe account is connected."
# Chromium logs each page with an error status, and a refusal is one.
STATUS_LOGGED = "Failed to load resource: the server responded with a status of"

Json = dict[str, Any]


# Owners ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """The owner of a registered tenant, who calls the API from a program."""

    place: Place
    access: str

    def connect(self, **body: str) -> Json:
        return self._called("POST", "connect", json=body or None)

    def status(self) -> Json:
        return self._called("GET", "status")

    def disconnect(self) -> Json:
        return self._called("DELETE", "disconnect")

    def _called(self, method: str, action: str, **more: Any) -> Json:
        url = f"{self.place.api}{API}/stripe/{action}/"
        answer = requests.request(method, url, headers=bearer(self.access), timeout=10, **more)
        answer.raise_for_status()
        parsed: Json = answer.json()
        return parsed


@pytest.fixture
def new_owner(place: Place) -> Callable[[], Owner]:
    def register() -> Owner:
        body = {"company_name": "Acme Inc.", "email": f"{uuid4()}@acme.example", "password": PASSWORD}
        answer = requests.post(f"{place.api}{API}/register/", json=body, timeout=10)
        answer.raise_for_status()
        return Owner(place, answer.json()["tokens"]["access"])

    return register


@pytest.fixture
def owner(new_owner: Callable[[], Owner]) -> Owner:
    return new_owner()


# Steps in the browser ----------------------------------------------------------------------------


def connect_from_page(page: Page, owner: Owner, **body: str) -> Json:
    """Start connecting by a script in the open page."""
    script = """async ([url, access, body]) => (await fetch(url, {
        method: "POST",
        headers: {"Authorization": `Bearer ${access}`, "Content-Type": "application/json"},
        body: body,
    })).json()"""
    url = f"{owner.place.api}{API}/stripe/connect/"
    parsed: Json = page.evaluate(script, [url, owner.access, json.dumps(body)])
    return parsed


def connect_from_own_page(page: Page, owner: Owner, **body: str) -> Json:
    """Start connecting from our own page, which sets the cookie."""
    page.goto(owner.place.api)
    started = connect_from_page(page, owner, **body)
    assert [cookie["name"] for cookie in page.context.cookies()] == [COOKIE]
    return started


def decide(page: Page, started: Json, button: str, account: str = "Active") -> Response:
    """Open the URL, decide at the sandbox, and return; returns the callback's response."""
    page.goto(started["url"])
    expect(page.get_by_role("note")).to_contain_text("This is not Stripe.")
    page.get_by_label(account).check()
    with page.expect_navigation(), page.expect_response(f"{started['redirect_uri']}?**") as answer:
        page.get_by_role("button", name=button, exact=True).click()
    return answer.value


def heading(page: Page) -> str:
    return page.get_by_role("heading", level=1).inner_text()


def code_of(page: Page, callback: str) -> str:
    """The error code that this browser gets from a callback URL as JSON."""
    answer = page.context.request.get(callback, headers={"Accept": "application/json"})
    code: str = answer.json()["code"]
    return code


# A connection ------------------------------------------------------------------------------------


def test_an_account_is_connected_and_disconnected(
    owner: Owner, page: Page, console_problems: list[str]
) -> None:
    answer = decide(page, owner.connect(), "Connect")
    assert (answer.status, heading(page)) == (200, CONNECTED)
    expect(page.locator(".lead")).to_contain_text(MESSAGES["active"])
    status = owner.status()
    assert (status["status"], status["source"], status["livemode"]) == ("active", "live", False)
    assert owner.disconnect()["tenant"]["stripe_connect_account_id"] is None
    assert owner.status()["status"] == "disconnected"
    assert console_problems == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_final_page_fits_and_loads_or_links_nothing(owner: Owner, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    decide(page, owner.connect(), "Connect", "Under review")
    expect(page.locator(".lead")).to_contain_text(MESSAGES["under_review"])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The URL contains the state and the code, and nothing on the page may learn it.
    assert page.evaluate("document.querySelectorAll('a, img, script').length") == 0


def test_an_account_is_connected_from_swagger_ui(
    owner: Owner, page: Page, console_problems: list[str]
) -> None:
    page.goto(f"{owner.place.api}/docs/")
    page.locator("button.authorize").first.click()
    form = page.locator(".dialog-ux .auth-container", has=page.locator("h4", has_text="bearerAuth"))
    form.get_by_role("textbox").fill(owner.access)
    form.locator("button.authorize").click()
    page.locator(".dialog-ux .close-modal").click()
    block = page.locator(".opblock[id$='-start_stripe_connect']")
    block.locator(".opblock-summary-control").click()
    block.locator("textarea").fill("{}")
    with page.expect_response("**/stripe/connect/") as answer:
        block.locator(".execute").click()
    started = answer.value.json()
    (cookie,) = page.context.cookies()
    assert (cookie["name"], cookie["path"], cookie["sameSite"]) == (COOKIE, "/", "Lax")
    assert cookie["secure"] and cookie["httpOnly"]
    decide(page, started, "Connect")
    assert heading(page) == CONNECTED
    assert owner.status()["status"] == "active"
    assert console_problems == []


def test_a_declined_connection_is_reported_on_a_page(
    owner: Owner, page: Page, console_problems: list[str]
) -> None:
    answer = decide(page, connect_from_own_page(page, owner), "Decline")
    assert (answer.status, heading(page)) == (403, "The connection was refused at Stripe.")
    expect(page.locator(".lead")).to_contain_text("Nothing was changed.")
    assert owner.status()["status"] == "not_connected"
    assert all(problem.startswith(STATUS_LOGGED) for problem in console_problems)


# A return URL ------------------------------------------------------------------------------------


def test_a_page_of_another_origin_connects_and_gets_the_browser_back(
    owner: Owner, page: Page, console_problems: list[str]
) -> None:
    page.goto(owner.place.shop)
    started = connect_from_page(page, owner, return_url=f"{owner.place.shop}/settings?tab=money#stripe")
    # The browser would not return a cookie set in a fetch from another site.
    assert page.context.cookies() == []
    assert decide(page, started, "Connect").status == 303
    assert page.url == f"{owner.place.shop}/settings?tab=money&stripe=connected#stripe"
    assert owner.status()["status"] == "active"
    assert console_problems == []


def test_the_return_url_reports_a_refusal(owner: Owner, page: Page, console_problems: list[str]) -> None:
    decide(page, connect_from_own_page(page, owner, return_url=f"{owner.place.shop}/settings"), "Decline")
    assert page.url == f"{owner.place.shop}/settings?stripe=error&code=access-denied"
    assert console_problems == []


# A state -----------------------------------------------------------------------------------------


def test_a_state_works_once(owner: Owner, page: Page) -> None:
    callback = decide(page, connect_from_own_page(page, owner), "Connect").url
    page.goto(callback)
    assert heading(page) == "The state was used already."
    assert code_of(page, callback) == "state-used"
    assert owner.status()["status"] == "active"


def test_a_new_start_ends_the_earlier_state(owner: Owner, page: Page) -> None:
    first, second = owner.connect(), owner.connect()
    answer = decide(page, first, "Connect")
    assert (answer.status, heading(page)) == (400, "The state has expired.")
    assert code_of(page, answer.url) == "state-expired"
    assert owner.status()["status"] == "not_connected"
    decide(page, second, "Connect")
    assert owner.status()["status"] == "active"


@pytest.mark.parametrize(
    "begin", [None, connect_from_own_page], ids=["without a flow of its own", "with a flow of its own"]
)
def test_a_browser_cannot_finish_a_flow_that_another_started(
    begin: Callable[[Page, Owner], Json] | None,
    new_owner: Callable[[], Owner],
    new_page: Callable[[], Page],
) -> None:
    ada, ada_page = new_owner(), new_page()
    mallory, mallory_page = new_owner(), new_page()
    started = connect_from_own_page(ada_page, ada, return_url=f"{ada.place.shop}/settings")
    if begin is not None:
        begin(mallory_page, mallory)
    answer = decide(mallory_page, started, "Connect")
    assert (answer.status, heading(mallory_page)) == (400, "The state is not one of ours.")
    assert code_of(mallory_page, answer.url) == "state-unknown"
    assert [ada.status()["status"], mallory.status()["status"]] == ["not_connected"] * 2
    # And the attempt has not used the state up.
    decide(ada_page, started, "Connect")
    assert ada_page.url.endswith("?stripe=connected")
    assert [ada.status()["status"], mallory.status()["status"]] == ["active", "not_connected"]


# An account link ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Owner.connect, None], ids=["by a program", "by our page"])
def test_an_account_link_is_finished_in_two_visits(
    start: Callable[..., Json] | None, owner: Owner, page: Page, console_problems: list[str]
) -> None:
    connect = partial(start, owner) if start else partial(connect_from_own_page, page, owner)
    first = connect(flow="account_link")
    account = owner.status()["account_id"]
    assert decide(page, first, "Leave unfinished").status == 200
    expect(page.locator(".lead")).to_contain_text(MESSAGES["pending"])
    assert owner.status()["status"] == "pending"
    renewed = connect(flow="account_link", return_url=f"{owner.place.shop}/settings")
    assert renewed["url"] != first["url"]
    decide(page, renewed, "Finish")
    assert page.url == f"{owner.place.shop}/settings?stripe=connected"
    assert (owner.status()["status"], owner.status()["account_id"]) == ("active", account)
    owner.disconnect()
    assert owner.status()["status"] == "disconnected"
    assert console_problems == []
