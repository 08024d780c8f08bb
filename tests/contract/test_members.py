"""Required members: what clients may leave out of a request, and rely on in an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.answers import DOCUMENT
from tests.conftest import API, Account

SCHEMAS = DOCUMENT["components"]["schemas"]

# The members that each operation requires, repeated here so that nobody loosens the document by accident.
REQUIRED: dict[str, dict[str, Any]] = {
    "/register/": {
        "company_name": "Acme Inc.",
        "email": "grace@acme.example",
        "password": "correct horse battery staple",
    },
    "/login/": {"email": "ada@acme.example", "password": "SecurePass123!"},
    "/token/refresh/": {"refresh": "acme.example.refresh"},
    "/change-password/": {
        "old_password": "SecurePass123!",
        "new_password": "correct horse battery staple",
    },
    "/api-keys/regenerate/": {"key_type": "test", "confirm": True},
    "/api-keys/revoke/": {"key_type": "test", "confirm": True},
    "/webhooks/config/": {"webhook_url": "https://hooks.acme.example/billing"},
}
# What an answer may lack, and when: no other member of any answer is optional.
OPTIONAL = {
    "KeyVerification": {"mode", "key"},  # for a user's token
    "TenantDetails": {"mode"},  # for a user's token
    "TenantView": {  # for a publishable key
        "email",
        "domain",
        "webhook_url",
        "stripe_connect_account_id",
        "stripe_connect_status",
        "subscription_tier",
        "updated_at",
    },
    "NewKeys": {"live_public", "live_secret", "test_public", "test_secret"},  # those not asked for
    "WebhookConfigured": {"webhook_secret", "warning"},  # where none was made
    "Problem": {"errors"},  # except for 400
}


@pytest.mark.parametrize(
    ("path", "member"), [(path, name) for path, body in REQUIRED.items() for name in body]
)
def test_400_without_a_required_member(acme: Account, path: str, member: str) -> None:
    answer = acme.post(path, {name: value for name, value in REQUIRED[path].items() if name != member})
    assert answer.status_code == 400
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [f"/{member}"]


def test_no_other_member_of_a_request_is_required() -> None:
    operations = {
        path.removeprefix(API): item["post"] for path, item in DOCUMENT["paths"].items() if "post" in item
    }
    bodies = {
        path: declared["requestBody"] for path, declared in operations.items() if "requestBody" in declared
    }
    references = {
        path: body["content"]["application/json"]["schema"]["$ref"] for path, body in bodies.items()
    }
    required = {
        path: SCHEMAS[name.rpartition("/")[2]].get("required", []) for path, name in references.items()
    }
    assert {path: set(names) for path, names in required.items() if names} == {
        path: set(body) for path, body in REQUIRED.items()
    }


def test_no_other_member_of_an_answer_is_optional() -> None:
    answered = answered_schemas()
    optional = {
        name: set(s.get("properties", {})) - set(s.get("required", ())) for name, s in answered.items()
    }
    assert {name: members for name, members in optional.items() if members} == OPTIONAL


def answered_schemas() -> dict[str, dict[str, Any]]:
    """The schemas that answers refer to."""
    found: set[str] = set()
    waiting: list[Any] = [
        declared["responses"] for item in DOCUMENT["paths"].values() for declared in item.values()
    ]
    while waiting:
        node = waiting.pop()
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        if isinstance(node, dict) and "$ref" in node and node["$ref"] not in found:
            found.add(node["$ref"])
            _, kind, name = node["$ref"].removeprefix("#/").split("/")
            waiting.append(DOCUMENT["components"][kind][name])
    return {
        name.rpartition("/")[2]: SCHEMAS[name.rpartition("/")[2]] for name in found if "/schemas/" in name
    }
