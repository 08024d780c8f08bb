"""The OpenAPI document: refused if invalid, listed by operation, served as fixed bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from billing.http import document
from billing.http.document import DocumentError, Operation

SMALL = """
openapi: 3.0.3
info: {title: Billing, version: "1"}
servers:
  - {url: https://billing.example, description: Production}
  - {url: https://sandbox.example}
security: [{bearerAuth: []}]
paths:
  /things/:
    parameters: []
    get:
      operationId: list_things
      tags: [Things]
      summary: List things
      x-roles: [admin, owner]
      parameters: [{$ref: "#/components/parameters/Limit"}, {name: X-Request-Id, in: header}]
    post:
      operationId: make_thing
      requestBody: {$ref: "#/components/requestBodies/Thing"}
      security: [{bearerAuth: []}, {apiKeyAuth: []}]
  /login/:
    post: {operationId: log_in, security: [], requestBody: {content: {application/json: {schema: {}}}}}
components:
  parameters:
    Limit: {name: limit, in: query}
  requestBodies:
    Thing: {required: true, content: {application/json: {schema: {$ref: "#/components/schemas/Thing"}}}}
  schemas:
    Thing: {type: object, description: "First paragraph.\\n\\nSecond."}
"""


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    return loaded(tmp_path, SMALL)


def loaded(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return document.load(path)


# Loading


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("info: {title: A, title: B}", "'title' stands twice"),
        ("paths:\n  /a/: {}\n  /a/: {}", "Line 3: the key '/a/' stands twice"),
        ("responses: {200: {}}", "'200' is no text"),
        ("a: {<<: {b: c}}", "'<<' is no text"),
        ("a: [", "not good YAML"),
        ("a: !!python/name:os.system", "not good YAML"),
        ("- a", "holds no mapping"),
        ("paths: {/a/: {get: {}}}", "GET /a/ has no operationId"),
        ("paths: {/a/: {get: {operationId: x, requestBody: {$ref: '#/components/b'}}}}", "points to nothing"),
        ("paths: {/a/: {get: {operationId: x}}, /b/: {get: {operationId: x}}}", "more than once: x"),
        ("paths: {'/{id}/': {}, /me/: {}}", "/me/ can never be reached: /{id}/"),
        ("paths: {'/{a}/x/': {}, '/{b}/x/': {}}", "can never be reached"),
    ],
)
def test_an_invalid_document_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(DocumentError) as refusal:
        loaded(tmp_path, text)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    "paths", ["{/me/: {}, '/{id}/': {}}", "{'/{id}/': {}, /me/keys/: {}}", "{/a.b/: {}, /axb/: {}}"]
)
def test_paths_that_do_not_shadow_each_other_are_accepted(tmp_path: Path, paths: str) -> None:
    assert loaded(tmp_path, f"paths: {paths}")


@pytest.mark.parametrize(
    "word", ["no", "on", "2026-01-01", "2026-01-01T00:00:00Z", "1:30", "012", "0x1f", "1_000"]
)
def test_words_that_yaml_1_1_misread_stay_text(tmp_path: Path, word: str) -> None:
    assert loaded(tmp_path, f"a: {word}") == {"a": word}


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("null", None), ("", None), ("-3", -3), ("1.5", 1.5), ("1e3", 1000.0)]
)
def test_json_values_keep_their_types(tmp_path: Path, word: str, value: object) -> None:
    assert loaded(tmp_path, f"a: {word}") == {"a": value}


def test_the_contract_itself_loads_and_has_eighteen_operations() -> None:
    assert len(document.operations(document.load())) == 18


# Operations


def test_an_operation_lists_its_roles_schemes_and_parameters(small: dict[str, Any]) -> None:
    list_things = document.operations(small)[0]
    assert list_things == Operation(
        operation_id="list_things",
        method="GET",
        path="/things/",
        tags=("Things",),
        roles=("admin", "owner"),
        schemes=("bearerAuth",),
        query=({"name": "limit", "in": "query"},),
        open_query=False,
        request=None,
        body_required=False,
        headers=({"name": "X-Request-Id", "in": "header"},),
    )


def test_an_operation_has_its_own_security_and_request_body(small: dict[str, Any]) -> None:
    make_thing = document.operations(small)[1]
    assert make_thing.schemes == ("bearerAuth", "apiKeyAuth")
    assert make_thing.request == {"$ref": "#/components/schemas/Thing"}
    assert make_thing.body_required


def test_empty_security_makes_an_operation_public(small: dict[str, Any]) -> None:
    log_in = document.operations(small)[2]
    assert log_in.schemes == ()
    assert not log_in.body_required


# Serving


def test_this_server_is_listed_first(small: dict[str, Any]) -> None:
    served = document.served(small, "http://127.0.0.1:8000/")
    assert [server["url"] for server in orjson.loads(served.json.body)["servers"]] == [
        "http://127.0.0.1:8000",
        "https://billing.example",
        "https://sandbox.example",
    ]


def test_a_server_already_listed_is_moved_to_the_front(small: dict[str, Any]) -> None:
    small["servers"].reverse()
    served = document.served(small, "https://billing.example")
    assert orjson.loads(served.json.body)["servers"] == [
        {"url": "https://billing.example", "description": "Production"},
        {"url": "https://sandbox.example"},
    ]


def test_serving_keeps_references_and_does_not_modify_the_document(small: dict[str, Any]) -> None:
    before = orjson.dumps(small)
    copy = orjson.loads(document.served(small, "http://127.0.0.1:8000").json.body)
    assert {**copy, "servers": small["servers"]} == small
    assert orjson.dumps(small) == before


def test_the_json_and_yaml_copies_are_equal(tmp_path: Path) -> None:
    served = document.served(document.load(), "http://127.0.0.1:8000")
    # Read back by the strict loader, so that nothing in the YAML copy changes its type on the way.
    assert loaded(tmp_path, served.yaml.body.decode()) == orjson.loads(served.json.body)


def test_yaml_is_human_readable(small: dict[str, Any]) -> None:
    shared = {"type": "object"}
    small["components"]["schemas"] |= {"One": shared, "Two": shared}
    text = document.served(small, "http://127.0.0.1:8000").yaml.body.decode()
    assert "description: |-\n        First paragraph.\n\n        Second." in text
    assert "&id" not in text
    assert list(yaml.safe_load(text)) == list(small)


def test_entity_tags_are_strong_and_follow_the_bytes(small: dict[str, Any]) -> None:
    here = document.served(small, "https://here.example")
    there = document.served(small, "https://there.example")
    assert here == document.served(small, "https://here.example")
    assert here.json.etag.startswith('"')
    assert len({here.json.etag, here.yaml.etag, there.json.etag, there.yaml.etag}) == 4
