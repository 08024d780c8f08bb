"""The gateway against third-party code: Connexion's mock of Stripe's own OpenAPI document."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from billing.gateway import Gateway
from billing.ids import new_id
from billing.stripe_connect import Account
from billing.tenants import Tenant
from tests import live

DOCUMENT = Path(__file__).parent / "data/stripe-openapi-accounts.json"
START_SECONDS = 30
STOP_SECONDS = 20

ID = "acct_1AcmeExample"
LINK = "https://connect.stripe.example/setup/acme"
NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
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


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway to Connexion's mock, as its command line runs it."""
    folder = tmp_path_factory.mktemp("mock")
    (folder / "stripe.json").write_text(json.dumps(servable(json.loads(DOCUMENT.read_text()))))
    port = live.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "connexion", "run", "stripe.json", "--mock=all", "--port", str(port)]
    # Its reloader has a child: they are stopped together.
    with (folder / "log").open("wb") as log:
        mock = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        await_answer(mock, url, folder / "log")
        key = "sk_test_" + "0" * 24
        yield Gateway(secret_key=key, client_id=None, api_base=url, connect_base=url)
    finally:
        os.killpg(mock.pid, signal.SIGTERM)
        mock.wait(STOP_SECONDS)


def servable(document: dict[str, Any]) -> dict[str, Any]:
    """Stripe's document as Connexion can mock it.

    Its security needs a function that knows our key, or every call is 401. An example comes from `example`s alone,
    and Stripe's document has none: here each leaf gets one of its own type, and an id and a link get their format.
    """
    del document["security"], document["components"]["securitySchemes"]
    schemas = document["components"]["schemas"]
    exemplify(schemas)
    schemas["account"]["properties"]["id"]["example"] = ID
    schemas["account_link"]["properties"]["url"]["example"] = LINK
    return document


def exemplify(node: Any) -> None:
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        exemplify(child)
    if isinstance(node, dict) and isinstance(node.get("type"), str):
        plain = {"boolean": True, "integer": 1768470000, "number": 0.5, "string": "eur"}
        if node["type"] in plain:
            node["example"] = node["enum"][0] if node.get("enum") else plain[node["type"]]


def await_answer(mock: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and mock.poll() is None:
        try:
            requests.get(f"{url}/v1/accounts/{ID}", timeout=START_SECONDS)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError(f"the mock did not start: {log.read_text()}")


def test_an_account_is_returned_as_our_account(gateway: Gateway) -> None:
    account = gateway.account(ID)
    assert account is not None
    assert (account.id, account.charges_enabled, account.details_submitted) == (ID, True, True)
    assert account.business_type == "company"
    assert account.default_currency == "eur"
    assert account.capabilities["card_payments"] == "active"
    assert account.requirements.currently_due == ("eur",)
    assert account.requirements.current_deadline == 1768470000
    assert [error.requirement for error in account.requirements.errors] == ["eur"]
    assert account.requirements.disabled_reason is not None
    assert account.status == "restricted"


def test_a_created_account_is_returned_as_our_account(gateway: Gateway) -> None:
    made = gateway.create_account(ACME, idempotency_key="account-1")
    assert isinstance(made, Account)
    assert made == gateway.account(ID)


def test_an_account_link_is_returned_as_its_url(gateway: Gateway) -> None:
    assert gateway.account_link(ID, return_url="https://billing.example/callback/") == LINK
