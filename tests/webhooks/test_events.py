"""Events: the types and the envelope, checked against the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any, get_args
from uuid import UUID

import pytest
from jsonschema_rs import Draft202012Validator

from billing.http.document import operations
from billing.webhooks.events import API_VERSION, EventType, envelope
from tests.answers import COMPONENTS, DOCUMENT

(CONFIGURE,) = [one for one in operations(DOCUMENT) if one.operation_id == "configure_webhook"]
CALLBACKS: dict[str, Any] = DOCUMENT["paths"][CONFIGURE.path]["post"]["callbacks"]
NAMES = list(get_args(EventType))


def callback(name: str) -> dict[str, Any]:
    said: dict[str, Any] = CALLBACKS[name]["{$request.body#/webhook_url}"]["post"]
    return said


def content(name: str) -> dict[str, Any]:
    said: dict[str, Any] = callback(name)["requestBody"]["content"]["application/json"]
    return said


def enveloped(example: Mapping[str, Any], **changes: Any) -> bytes:
    """The envelope built from an example of the document."""
    given = {
        "id": UUID(example["id"]),
        "type": example["type"],
        "created_at": datetime.fromisoformat(example["created_at"]),
        "tenant_id": UUID(example["tenant_id"]),
        "livemode": example["livemode"],
        "sequence": example["sequence"],
        "data": example["data"],
    }
    return envelope(**{**given, **changes})


EXAMPLE = content("webhook.test")["example"]


# The types ---------------------------------------------------------------------------------------


def test_event_types_match_the_documents_enum_and_callbacks() -> None:
    assert DOCUMENT["components"]["schemas"]["EventType"]["enum"] == NAMES
    assert list(CALLBACKS) == NAMES


# The envelope ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_envelope_reproduces_each_documented_example(name: str) -> None:
    example = content(name)["example"]
    body = enveloped(example)
    assert json.loads(body) == example
    assert list(json.loads(body)) == list(example), "another order of members"
    validator = Draft202012Validator(
        {**content(name)["schema"], "components": COMPONENTS}, validate_formats=True
    )
    assert [error.message for error in validator.iter_errors(json.loads(body))] == []
    assert not validator.is_valid({**example, "of_later": 1}), "the schema lets everything pass"


def test_the_examples_have_the_current_api_version() -> None:
    assert {content(name)["example"]["api_version"] for name in NAMES} == {API_VERSION}


def test_the_same_event_serializes_to_the_same_bytes() -> None:
    assert enveloped(EXAMPLE) == enveloped(EXAMPLE)
    assert b"\n" not in enveloped(EXAMPLE)


@pytest.mark.parametrize(
    ("moment", "written"),
    [
        (datetime(2026, 1, 15, 10, 2, 11, tzinfo=UTC), "2026-01-15T10:02:11Z"),
        (datetime(2026, 1, 15, 10, 2, 11, 500000, tzinfo=UTC), "2026-01-15T10:02:11.500000Z"),
        (datetime(2026, 1, 15, 10, 2, 11, tzinfo=timezone(timedelta(0), "London")), "2026-01-15T10:02:11Z"),
    ],
)
def test_timestamps_end_in_z_in_the_envelope_and_the_data(moment: datetime, written: str) -> None:
    event = json.loads(enveloped(EXAMPLE, created_at=moment, data={"at": [moment]}))
    assert (event["created_at"], event["data"]) == (written, {"at": [written]})


def test_the_data_may_be_any_mapping_and_contain_uuids() -> None:
    data = MappingProxyType({"user_id": UUID(EXAMPLE["id"]), "name": "Zoë 🦉", "nothing": None})
    event = json.loads(enveloped(EXAMPLE, data=data))
    assert event["data"] == {"user_id": EXAMPLE["id"], "name": "Zoë 🦉", "nothing": None}


def test_a_custom_event_type_is_kept() -> None:
    assert json.loads(enveloped(EXAMPLE, type="invoice.paid"))["type"] == "invoice.paid"
