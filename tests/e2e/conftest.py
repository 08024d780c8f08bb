"""Fixtures: a browser and its console, and a server with a Stripe sandbox and a client's application."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from billing.storage import database, embedded
from sandbox.stripe import Sandbox
from tests import live
from tests.conftest import clone
from tests.e2e.places import Place, opened_shop

# No sandbox, because tests may run as root; and no calls home.
ARGUMENTS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if os.environ.get("BILLING_TESTS_WITHOUT_BROWSER") == "1":
        pytest.skip("BILLING_TESTS_WITHOUT_BROWSER=1")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail(
            "Chromium is not installed: install it, or set BILLING_TESTS_WITHOUT_BROWSER=1 to go without."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def console_problems() -> list[str]:
    """Errors and warnings on the browser's console, including Content-Security-Policy violations."""
    return []


@pytest.fixture
def new_page(browser: Browser, console_problems: list[str]) -> Iterator[Callable[[], Page]]:
    """Opens a page in a browser context of its own: no two pages share cookies."""

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            console_problems.append(message.text)

    with ExitStack() as contexts:

        def open_page() -> Page:
            page = contexts.enter_context(browser.new_context()).new_page()
            page.on("console", note)
            page.on("pageerror", lambda error: console_problems.append(str(error)))
            return page

        yield open_page


@pytest.fixture
def page(new_page: Callable[[], Page]) -> Page:
    return new_page()


@pytest.fixture(scope="session")
def place(cluster: embedded.Cluster, worker_id: str) -> Iterator[Place]:
    """A server, with the sandbox under another host name: going there and back crosses sites, as with Stripe.

    Webhooks may go to loopback.
    """
    name = f"billing_stripe_{worker_id}"
    clone(cluster, name)
    with Sandbox() as stripe, opened_shop() as shop:
        elsewhere = {key: value.replace("127.0.0.1", "localhost") for key, value in stripe.environ.items()}
        environ = {"DATABASE_URL": database.url(cluster, database.APP, name), "CORS_ALLOWED_ORIGINS": shop}
        with live.serving({**environ, **elsewhere, **live.OPEN_LOOPBACK}) as url:
            yield Place(url, shop)
