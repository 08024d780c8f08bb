"""The document's examples are what the server really accepts and answers."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from starlette.testclient import TestClient

from billing.errors import Fault, catalogue
from billing.http.document import operations
from billing.http.problems import render
from tests.answers import DOCUMENT, PROBLEM
from tests.conftest import Account, bearer

Json = Any

LISTED = {operation.operation_id: operation for operation in operations(DOCUMENT)}
JSON = "application/json"


def declared(operation_id: str) -> dict[str, Any]:
    operation = LISTED[operation_id]
    found: dict[str, Any] = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return found


def example_of(content: dict[str, Any], name: str | None) -> Json:
    """The example by that name, or the only one, which has none."""
    return content[JSON]["examples"][name]["value"] if name else content[JSON]["example"]


def example_request(operation_id: str, name: str | None = None) -> Json:
    return example_of(declared(operation_id)["requestBody"]["content"], name)


def example_answer(operation_id: str, name: str | None = None) -> Json:
    responses = declared(operation_id)["responses"]
    success = next(status for status in responses if status.startswith("2"))
    return example_of(responses[success]["content"], name)


def perform(client: TestClient, operation_id: str, body: Json = None, **headers: str) -> httpx.Response:
    operation = LISTED[operation_id]
    return client.request(operation.method, operation.path, json=body, headers=headers)


def performed(client: TestClient, operation_id: str, body: Json = None, **headers: str) -> Json:
    answer = perform(client, operation_id, body, **headers)
    assert answer.is_success, answer.text
    return answer.json()


def differences(example: Json, real: Json, place: str = "") -> list[str]:
    """Where the two differ in shape, or in texts for people.

    A value may be null in only one of them; the schemas say where null is allowed.
    """
    if example is None or real is None:
        return []
    if type(example) is not type(real):
        return [f"{place} is {type(real).__name__}, not {type(example).__name__}"]
    if isinstance(example, dict):
        return differing_members(example, real, place)
    if isinstance(example, list):
        longer = [f"{place} holds {len(real)}, not {len(example)}"] if len(example) != len(real) else []
        pairs = enumerate(zip(example, real, strict=False))
        return longer + [text for n, (a, b) in pairs for text in differences(a, b, f"{place}/{n}")]
    is_fixed_text = place.endswith(("/message", "/warning", "/type", "/mode", "/status"))
    return [f"{place} says {real!r}"] if is_fixed_text and example != real else []


def differing_members(example: dict[str, Json], real: dict[str, Json], place: str) -> list[str]:
    others = [f"{place}/{name} is only in one" for name in sorted(example.keys() ^ real.keys())]
    both = [name for name in example if name in real]
    return others + [
        text for name in both for text in differences(example[name], real[name], f"{place}/{name}")
    ]


def as_user(acme: Account) -> dict[str, str]:
    return bearer(acme.tokens["access"])


# Operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimal", "complete"])
def test_register_tenant(client: TestClient, name: str) -> None:
    real = performed(client, "register_tenant", example_request("register_tenant", name))
    assert differences(example_answer("register_tenant"), real) == []


def test_log_in(acme: Account) -> None:
    real = performed(acme.client, "log_in", example_request("log_in"))
    assert differences(example_answer("log_in"), real) == []


def test_refresh_tokens(acme: Account) -> None:
    assert example_request("refresh_tokens").keys() == {"refresh"}
    real = performed(acme.client, "refresh_tokens", {"refresh": acme.tokens["refresh"]})
    assert differences(example_answer("refresh_tokens"), real) == []


def test_get_current_user(acme: Account) -> None:
    real = performed(acme.client, "get_current_user", **as_user(acme))
    assert differences(example_answer("get_current_user"), real) == []


def test_change_password(acme: Account) -> None:
    real = performed(acme.client, "change_password", example_request("change_password"), **as_user(acme))
    assert differences(example_answer("change_password"), real) == []


@pytest.mark.parametrize("operation_id", ["verify_api_key", "get_tenant_details"])
@pytest.mark.parametrize(
    ("name", "member"), [("secret_key", "api_key_secret"), ("publishable_key", "api_key_test_public")]
)
def test_a_key_sees_what_the_example_shows(acme: Account, operation_id: str, name: str, member: str) -> None:
    real = performed(acme.client, operation_id, **{"X-API-Key": acme.tenant[member]})
    assert differences(example_answer(operation_id, name), real) == []


def test_list_api_keys(acme: Account) -> None:
    # The example is what an owner sees after replacing the live keys with a day of grace for the old ones.
    with_grace = example_request("regenerate_api_keys", "with_grace")
    performed(acme.client, "regenerate_api_keys", with_grace, **as_user(acme))
    real = performed(acme.client, "list_api_keys", **as_user(acme))
    assert differences(example_answer("list_api_keys"), real) == []


def test_regenerate_api_keys(acme: Account) -> None:
    at_once = example_request("regenerate_api_keys", "at_once")
    real = performed(acme.client, "regenerate_api_keys", at_once, **as_user(acme))
    assert differences(example_answer("regenerate_api_keys"), real) == []


def test_revoke_api_keys(acme: Account) -> None:
    real = performed(acme.client, "revoke_api_keys", example_request("revoke_api_keys"), **as_user(acme))
    assert real == example_answer("revoke_api_keys")


def test_differences_are_detected() -> None:
    example = {"keys": [{"id": "1", "mode": "live"}], "at": None, "message": "Done."}
    assert differences(example, {**example, "at": "now"}) == []
    assert differences(example, {**example, "message": "Made."}) == ["/message says 'Made.'"]
    assert differences(example, {**example, "keys": []}) == ["/keys holds 0, not 1"]
    assert differences(example, {**example, "keys": [{"id": 1}]}) == [
        "/keys/0/mode is only in one",
        "/keys/0/id is int, not str",
    ]


# Problems ----------------------------------------------------------------------------------------

PROBLEMS = {
    name: response["content"][PROBLEM]["example"]
    for name, response in DOCUMENT["components"]["responses"].items()
    if "content" in response
}
CATALOGUE = {error.code(): error for error in catalogue()}
# Their detail is known only when they occur: the number of faults, the roles required, the variable to set.
DETAILED_AT_RUN_TIME = {"invalid-request", "insufficient-scope", "stripe-not-configured"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_example_matches_the_rendered_error(name: str) -> None:
    example = PROBLEMS[name]
    faults = [Fault(**fault) for fault in example.get("errors", ())]
    detail = example["detail"] if example["code"] in DETAILED_AT_RUN_TIME else None
    error = CATALOGUE[example["code"]](detail, faults=faults)
    made = orjson.loads(render(error, request_id=example["request_id"]).body)
    assert without_origin(made) == without_origin(example)


def test_a_missing_member_is_answered_as_in_the_example(client: TestClient) -> None:
    whole = example_request("register_tenant", "minimal")
    body = {name: value for name, value in whole.items() if name != "company_name"}
    real = perform(client, "register_tenant", body).json()
    assert [real[name] for name in ("detail", "errors")] == [
        PROBLEMS["BadRequest"][name] for name in ("detail", "errors")
    ]


def without_origin(problem: dict[str, Any]) -> dict[str, Any]:
    """The problem without what differs by server and by occurrence."""
    _, _, path = problem["type"].partition("/problems/")
    return {**problem, "type": path, "instance": ""}
