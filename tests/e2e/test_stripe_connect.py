"""Connecting a Stripe account in a browser, from our page over the sandbox's and back."""

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
# Chromium notes each page with an error's status, and a refusal is one.
STATUS_NOTED = "Failed to load resource: the server responded with a status of"

Json = dict[str, Any]


# Who connects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """Somebody who has registered a tenant, and calls with a program."""

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
        said: Json = answer.json()
        return said


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


# What is done in the browser ---------------------------------------------------------------------


def connect_from_page(page: Page, owner: Owner, **body: str) -> Json:
    """Connect as a program in the page that is open does."""
    script = """async ([url, access, body]) => (await fetch(url, {
        method: "POST",
        headers: {"Authorization": `Bearer ${access}`, "Content-Type": "application/json"},
        body: body,
    })).json()"""
    url = f"{owner.place.api}{API}/stripe/connect/"
    said: Json = page.evaluate(script, [url, owner.access, json.dumps(body)])
    return said


def bound(page: Page, owner: Owner, **body: str) -> Json:
    """Connect from a page of our own."""
    page.goto(owner.place.api)
    started = connect_from_page(page, owner, **body)
    assert [cookie["name"] for cookie in page.context.cookies()] == [COOKIE]
    return started


def decided(page: Page, started: Json, button: str, account: str = "Active") -> Response:
    """Open the address, choose at the sandbox, and come back: what the callback answered."""
    page.goto(started["url"])
    expect(page.get_by_role("note")).to_contain_text("This is not Stripe.")
    page.get_by_label(account).check()
    with page.expect_navigation(), page.expect_response(f"{started['redirect_uri']}?**") as answer:
        page.get_by_role("button", name=button, exact=True).click()
    return answer.value


def heading(page: Page) -> str:
    return page.get_by_role("heading", level=1).inner_text()


def code_of(page: Page, callback: str) -> str:
    """What a program is told at a callback's address, by the browser that has the page open."""
    answer = page.context.request.get(callback, headers={"Accept": "application/json"})
    code: str = answer.json()["code"]
    return code


# A connection ------------------------------------------------------------------------------------


def test_an_account_is_connected_and_disconnected(owner: Owner, page: Page, complaints: list[str]) -> None:
    answer = decided(page, owner.connect(), "Connect")
    assert (answer.status, heading(page)) == (200, CONNECTED)
    expect(page.locator(".lead")).to_contain_text(MESSAGES["active"])
    status = owner.status()
    assert (status["status"], status["source"], status["livemode"]) == ("active", "live", False)
    assert owner.disconnect()["tenant"]["stripe_connect_account_id"] is None
    assert owner.status()["status"] == "disconnected"
    assert complaints == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_at_the_end_fits(owner: Owner, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    decided(page, owner.connect(), "Connect", "Under review")
    expect(page.locator(".lead")).to_contain_text(MESSAGES["under_review"])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The address has the state and the code, and nothing on the page may learn it.
    assert page.evaluate("document.querySelectorAll('a, img, script').length") == 0


def test_an_account_is_connected_from_swagger_ui(owner: Owner, page: Page, complaints: list[str]) -> None:
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
    decided(page, started, "Connect")
    assert heading(page) == CONNECTED
    assert owner.status()["status"] == "active"
    assert complaints == []


def test_a_person_who_declines_is_told_so(owner: Owner, page: Page, complaints: list[str]) -> None:
    answer = decided(page, bound(page, owner), "Decline")
    assert (answer.status, heading(page)) == (403, "The connection was refused at Stripe.")
    expect(page.locator(".lead")).to_contain_text("Nothing was changed.")
    assert owner.status()["status"] == "not_connected"
    assert all(complaint.startswith(STATUS_NOTED) for complaint in complaints)


# A return URL ------------------------------------------------------------------------------------


def test_a_page_of_another_origin_connects_and_gets_its_browser_back(
    owner: Owner, page: Page, complaints: list[str]
) -> None:
    page.goto(owner.place.shop)
    started = connect_from_page(page, owner, return_url=f"{owner.place.shop}/settings?tab=money#stripe")
    # The browser would not bring back a cookie that came with a fetch from another site.
    assert page.context.cookies() == []
    assert decided(page, started, "Connect").status == 303
    assert page.url == f"{owner.place.shop}/settings?tab=money&stripe=connected#stripe"
    assert owner.status()["status"] == "active"
    assert complaints == []


def test_the_return_url_tells_of_a_refusal(owner: Owner, page: Page, complaints: list[str]) -> None:
    decided(page, bound(page, owner, return_url=f"{owner.place.shop}/settings"), "Decline")
    assert page.url == f"{owner.place.shop}/settings?stripe=error&code=access-denied"
    assert complaints == []


# A state -----------------------------------------------------------------------------------------


def test_a_state_works_once(owner: Owner, page: Page) -> None:
    callback = decided(page, bound(page, owner), "Connect").url
    page.goto(callback)
    assert heading(page) == "The state was used already."
    assert code_of(page, callback) == "state-used"
    assert owner.status()["status"] == "active"


def test_starting_anew_ends_the_state_before(owner: Owner, page: Page) -> None:
    first, second = owner.connect(), owner.connect()
    answer = decided(page, first, "Connect")
    assert (answer.status, heading(page)) == (400, "The state has expired.")
    assert code_of(page, answer.url) == "state-expired"
    assert owner.status()["status"] == "not_connected"
    decided(page, second, "Connect")
    assert owner.status()["status"] == "active"


@pytest.mark.parametrize("begin", [None, bound], ids=["has begun nothing", "has begun a connection too"])
def test_a_browser_cannot_finish_what_another_began(
    begin: Callable[[Page, Owner], Json] | None,
    new_owner: Callable[[], Owner],
    new_page: Callable[[], Page],
) -> None:
    ada, ada_page = new_owner(), new_page()
    mallory, mallory_page = new_owner(), new_page()
    started = bound(ada_page, ada, return_url=f"{ada.place.shop}/settings")
    if begin is not None:
        begin(mallory_page, mallory)
    answer = decided(mallory_page, started, "Connect")
    assert (answer.status, heading(mallory_page)) == (400, "The state is not one of ours.")
    assert code_of(mallory_page, answer.url) == "state-unknown"
    assert [ada.status()["status"], mallory.status()["status"]] == ["not_connected"] * 2
    # And it has not used the state up.
    decided(ada_page, started, "Connect")
    assert ada_page.url.endswith("?stripe=connected")
    assert [ada.status()["status"], mallory.status()["status"]] == ["active", "not_connected"]


# An account link ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Owner.connect, None], ids=["by a program", "by our page"])
def test_an_account_is_made_and_its_form_finished_in_two_visits(
    start: Callable[..., Json] | None, owner: Owner, page: Page, complaints: list[str]
) -> None:
    connect = partial(start, owner) if start else partial(bound, page, owner)
    first = connect(flow="account_link")
    account = owner.status()["account_id"]
    assert decided(page, first, "Leave unfinished").status == 200
    expect(page.locator(".lead")).to_contain_text(MESSAGES["pending"])
    assert owner.status()["status"] == "pending"
    renewed = connect(flow="account_link", return_url=f"{owner.place.shop}/settings")
    assert renewed["url"] != first["url"]
    decided(page, renewed, "Finish")
    assert page.url == f"{owner.place.shop}/settings?stripe=connected"
    assert (owner.status()["status"], owner.status()["account_id"]) == ("active", account)
    owner.disconnect()
    assert owner.status()["status"] == "disconnected"
    assert complaints == []
