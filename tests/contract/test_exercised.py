"""Which parts of a document count as exercised, shown on one small enough to count by hand; and the gaps."""

from __future__ import annotations

from typing import Any

import pytest

from contract.exercised import Described, Ledger, Reason, Sent, account, described, exercised, reasons
from tests.answers import DOCUMENT

BODY = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 0, "maxLength": 3, "description": "What it is called."},
        "kind": {"$ref": "#/components/schemas/Kind"},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 1}},
    },
}
SMALL = {
    "paths": {
        "/things/": {
            "post": {
                "operationId": "make",
                "security": [{"bearer": []}],
                "parameters": [
                    {"name": "n", "in": "query", "schema": {"type": "integer", "maximum": 9}},
                    {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 5}},
                ],
                "requestBody": {"required": True, "content": {"application/json": {"schema": BODY}}},
                "responses": {"201": {}, "400": {}},
            },
            "get": {"operationId": "look", "security": [], "responses": {"200": {}}},
        }
    },
    "components": {"schemas": {"Kind": {"type": "string", "enum": ["old", "new"], "nullable": True}}},
}
MAKE: Described = described(SMALL)["make"]


def keywords(body: Any, status: int) -> set[str]:
    done = exercised(MAKE, Sent(body=(body,)), status)
    return {name.removeprefix("make keyword body") for name in done if " keyword body" in name}


def test_each_item_has_a_unique_name() -> None:
    names = [name for operation in described(SMALL).values() for name in operation.items()]
    assert len(names) == len(set(names))
    assert set(described(SMALL)["look"].items()) == {"look operation", "look status 200"}
    # Not `type: string`, which every header satisfies; not `minLength: 0`, which nothing breaks.
    assert {name for name in names if "Idempotency" in name or "minLength" in name} == {
        "make parameter header Idempotency-Key sent",
        "make parameter header Idempotency-Key left out",
        "make keyword header Idempotency-Key maxLength kept",
        "make keyword header Idempotency-Key maxLength broken",
    }


def test_an_accepted_body_keeps_keywords() -> None:
    assert keywords({"name": "abc", "kind": "old", "tags": [1]}, 201) == {
        " type kept",
        " additionalProperties kept",
        "/name required kept",
        "/name type kept",
        "/name maxLength kept",
        "/kind type kept",
        "/kind enum old kept",
        "/tags type kept",
        "/tags/* type kept",
        "/tags/* minimum kept",
    }


@pytest.mark.parametrize(
    ("body", "broken"),
    [
        ([], {" type broken"}),
        ({}, {"/name required broken"}),
        ({"name": "abcd"}, {"/name maxLength broken"}),
        ({"name": "a", "more": 1}, {" additionalProperties broken"}),
        ({"name": "a", "kind": "odd"}, {"/kind enum broken"}),
        ({"name": 1, "tags": [1, 0]}, {"/name type broken", "/tags/* minimum broken"}),
    ],
)
def test_a_refused_invalid_body_breaks_keywords(body: Any, broken: set[str]) -> None:
    assert keywords(body, 400) == broken


def test_an_accepted_invalid_body_breaks_no_keywords() -> None:
    # The checks of a run report that.
    assert not [name for name in keywords({"name": "abcd"}, 201) if "broken" in name]


def test_parameters_are_counted_as_sent_or_left_out() -> None:
    done = set(exercised(MAKE, Sent(query={"n": "9"}), 201))
    assert {
        "make parameter query n sent",
        "make keyword query n type kept",
        "make keyword query n maximum kept",
    } <= done
    assert "make parameter header Idempotency-Key left out" in done
    assert "make keyword query n type broken" in set(exercised(MAKE, Sent(query={"n": "many"}), 400))


@pytest.mark.parametrize("status", [401, 403, 415, 429, 503])
def test_a_refusal_before_validation_exercises_only_a_status(status: int) -> None:
    assert list(exercised(MAKE, Sent(body=({"name": "a"},)), status)) == [f"make status {status}"]


def test_a_keyword_that_cannot_be_counted_is_reported() -> None:
    schema = {"type": "object", "patternProperties": {}}
    body = {"content": {"application/json": {"schema": schema}}}
    operation = {"operationId": "put", "requestBody": body, "responses": {}, "security": []}
    with pytest.raises(AssertionError, match="patternProperties"):
        list(described({"paths": {"/": {"put": operation}}})["put"].items())


def test_all_of_our_document_can_be_counted() -> None:
    names = [name for operation in described(DOCUMENT).values() for name in operation.items()]
    assert len(names) == len(set(names)) > 400


# Gaps --------------------------------------------------------------------------------------------


def all_but(*names: str) -> set[str]:
    every = {name for operation in described(SMALL).values() for name in operation.items()}
    assert every >= set(names)
    return every - set(names)


def test_a_gap_needs_a_reason() -> None:
    report = account(SMALL, all_but("make status 400"), [])
    assert report.complaints == ["not exercised, and without a reason: make status 400"]
    assert report.counted["status"] == (2, 3)
    assert account(SMALL, all_but("make status 400"), [Reason("make status 4..", "-")]).complaints == []


def test_a_reason_needs_a_gap() -> None:
    assert account(SMALL, all_but(), [Reason("make status 400", "-")]).complaints
    # Part of what the reason covers is no gap.
    assert account(SMALL, all_but("make status 400"), [Reason("make status .*", "-")]).complaints
    assert account(SMALL, all_but(), [Reason("no such thing", "-", is_luck=True)]).complaints


def test_a_reason_of_luck_is_accepted_with_or_without_a_gap() -> None:
    luck = [Reason("make status 400", "-", is_luck=True)]
    assert account(SMALL, all_but(), luck).complaints == []
    assert account(SMALL, all_but("make status 400"), luck).complaints == []


def test_the_reasons_in_the_table_cover_something() -> None:
    names = {name for operation in described(DOCUMENT).values() for name in operation.items()}
    assert [reason for reason in reasons() if not any(map(reason.covers, names))] == []
    assert all(reason.why for reason in reasons())


def test_a_ledger_can_be_written_read_and_added_to(tmp_path: Any) -> None:
    ledger = Ledger()
    ledger.note(MAKE, Sent(), 201)
    ledger.write(tmp_path / "ledger")
    both = Ledger.read(tmp_path / "ledger")
    both.add(ledger)
    assert both.statuses == {"201": 2}
    assert "make operation" in both.names
