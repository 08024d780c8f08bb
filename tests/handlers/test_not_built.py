"""Operations 15–18, until they are built: the only place where 501 may stand."""

from __future__ import annotations

import pytest

from tests.answers import DOCUMENT
from tests.conftest import API, Account

NOT_BUILT = {
    "get_webhook_config": ("GET", "/webhooks/config/"),
    "configure_webhook": ("POST", "/webhooks/config/"),
    "remove_webhook": ("DELETE", "/webhooks/config/"),
    "send_test_webhook": ("POST", "/webhooks/test/"),
}


@pytest.mark.parametrize("operation_id", NOT_BUILT)
def test_501(acme: Account, operation_id: str) -> None:
    method, path = NOT_BUILT[operation_id]
    body = {"webhook_url": "https://hooks.acme.example/"} if operation_id == "configure_webhook" else None
    headers = {"Authorization": f"Bearer {acme.tokens['access']}"}
    answer = acme.client.request(method, f"{API}{path}", headers=headers, json=body)
    assert (answer.status_code, answer.json()["code"]) == (501, "not-built")


def test_the_document_says_501_of_these_alone() -> None:
    said = {
        operation["operationId"]
        for item in DOCUMENT["paths"].values()
        for operation in item.values()
        if "501" in operation["responses"]
    }
    assert said == NOT_BUILT.keys()
