"""Swagger UI in a browser: it opens under our CSP, lists every operation, and calls its own origin."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.places import Place
from tests.e2e.tenants import Tenant
from tests.receivers import answers, receiving

pytestmark = pytest.mark.browser


@pytest.fixture
def swagger_ui(page: Page, live_server_url: str) -> Page:
    page.goto(f"{live_server_url}/docs/")
    page.wait_for_selector(".opblock")
    return page


def test_swagger_ui_opens_without_console_errors_and_lists_every_operation(
    swagger_ui: Page, console_problems: list[str]
) -> None:
    assert swagger_ui.locator(".opblock").count() == 18
    swagger_ui.locator(".opblock-summary-control").first.click()
    swagger_ui.wait_for_selector(".opblock.is-open .execute")
    assert console_problems == []


def test_ui_serves_the_same_page(page: Page, live_server_url: str, console_problems: list[str]) -> None:
    page.goto(f"{live_server_url}/ui")
    page.wait_for_selector(".opblock")
    assert page.url == f"{live_server_url}/ui/"
    assert console_problems == []


def test_both_kinds_of_credentials_can_be_entered(swagger_ui: Page) -> None:
    swagger_ui.locator("button.authorize").click()
    schemes = swagger_ui.locator(".dialog-ux .auth-container h4").all_inner_texts()
    assert [scheme.split()[0] for scheme in schemes] == ["bearerAuth", "apiKeyAuth"]


def test_no_parameter_is_prefilled(swagger_ui: Page) -> None:
    # A prefilled Idempotency-Key would make the call a repeat of an earlier one.
    for operation in ("register_tenant", "complete_stripe_connect"):
        swagger_ui.locator(f".opblock[id$={operation}] .opblock-summary-control").click()
    filled_in = swagger_ui.locator(".parameters input[type=text]")
    filled_in.nth(5).wait_for()
    assert {filled_in.nth(n).input_value() for n in range(filled_in.count())} == {""}


def test_operation_ids_are_shown(swagger_ui: Page) -> None:
    names = swagger_ui.locator(".opblock-summary-operation-id").all_inner_texts()
    assert len(names) == 18
    assert "register_tenant" in names


def test_a_call_carries_the_key_and_goes_to_the_origin_of_the_page(page: Page, live_server_url: str) -> None:
    # Not the public host name: a call to the document's first server would be cross-origin here.
    origin = live_server_url.replace("127.0.0.1", "localhost")
    page.goto(f"{origin}/docs/")
    page.locator("button.authorize").click()
    page.locator(".dialog-ux .auth-container", has_text="X-API-Key").get_by_role("textbox").fill(
        "no-such-key"
    )
    page.locator(".dialog-ux .auth-container", has_text="X-API-Key").locator("button.authorize").click()
    page.locator(".dialog-ux .close-modal").click()
    page.locator("#operations-Authentication-verify_api_key .opblock-summary-control").click()
    with page.expect_response("**/verify/") as answer:
        page.locator("#operations-Authentication-verify_api_key .execute").click()
    assert answer.value.url == f"{origin}/api/v1/auth/tenants/verify/"
    assert answer.value.request.headers["x-api-key"] == "no-such-key"


def test_a_new_user_registers_and_calls_with_both_credentials(
    swagger_ui: Page, console_problems: list[str]
) -> None:
    body = {"company_name": "Browser Inc.", "email": f"{uuid4()}@acme.example", "password": "SecurePass123!"}
    open_operation(swagger_ui, "register_tenant").locator("textarea").fill(json.dumps(body))
    status, registered = execute(swagger_ui, "register_tenant")
    assert status == 201
    authorize(swagger_ui, "bearerAuth", registered["tokens"]["access"])
    open_operation(swagger_ui, "list_api_keys")
    status, listed = execute(swagger_ui, "list_api_keys")
    assert (status, len(listed["keys"])) == (200, 4)
    authorize(swagger_ui, "bearerAuth", None)
    authorize(swagger_ui, "apiKeyAuth", registered["tenant"]["api_key_secret"])
    open_operation(swagger_ui, "verify_api_key")
    status, verified = execute(swagger_ui, "verify_api_key")
    assert (status, verified["key"]["type"]) == (200, "live_secret")
    assert swagger_ui.evaluate("localStorage.length + sessionStorage.length") == 0
    assert console_problems == []


def test_the_report_of_a_test_delivery_is_shown(
    page: Page, place: Place, console_problems: list[str]
) -> None:
    with receiving(answers(204, b"")) as receiver:
        tenant = Tenant(place.api)
        tenant.configure(f"http://localhost:{receiver.port}/")
        page.goto(f"{place.api}/docs/")
        authorize(page, "bearerAuth", tenant.access)
        open_operation(page, "send_test_webhook")
        status, report = execute(page, "send_test_webhook")
    assert (status, report["success"], report["event_sent"]) == (200, True, "webhook.test")
    shown = block(page, "send_test_webhook").locator(".live-responses-table .response")
    expect(shown).to_contain_text("The receiver answered 204.")
    sent = json.loads(receiver.last.body)
    assert (sent["type"], sent["data"]) == ("webhook.test", {"greeting": "Hello from Acme"})
    assert console_problems == []


def block(page: Page, operation_id: str) -> Locator:
    return page.locator(f".opblock[id$='-{operation_id}']")


def open_operation(page: Page, operation_id: str) -> Locator:
    block(page, operation_id).locator(".opblock-summary-control").click()
    return block(page, operation_id)


def execute(page: Page, operation_id: str) -> tuple[int, Any]:
    """Press Execute; returns the status and the body."""
    with page.expect_response("**/api/v1/**") as answer:
        block(page, operation_id).locator(".execute").click()
    return answer.value.status, answer.value.json()


def authorize(page: Page, scheme: str, credential: str | None) -> None:
    """Enter a credential in the dialog, or remove it."""
    page.locator("button.authorize").first.click()
    form = page.locator(".dialog-ux .auth-container", has=page.locator("h4", has_text=scheme))
    if credential is None:
        form.locator("button", has_text="Logout").click()
    else:
        form.get_by_role("textbox").fill(credential)
        form.locator("button.authorize").click()
    page.locator(".dialog-ux .close-modal").click()


@pytest.mark.parametrize("path", ["/", "/docs/", "/problems/", "/problems/webhook-not-configured"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_scrolls_sideways(page: Page, live_server_url: str, path: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{live_server_url}{path}")
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
