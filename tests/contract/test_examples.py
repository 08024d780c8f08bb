"""The document's examples are what the server really takes and answers."""

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


def said(operation_id: str) -> dict[str, Any]:
    operation = LISTED[operation_id]
    found: dict[str, Any] = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return found


def example_of(content: dict[str, Any], name: str | None) -> Json:
    """The example by that name, or the only one, which has none."""
    return content[JSON]["examples"][name]["value"] if name else content[JSON]["example"]


def sent(operation_id: str, name: str | None = None) -> Json:
    return example_of(said(operation_id)["requestBody"]["content"], name)


def answered(operation_id: str, name: str | None = None) -> Json:
    responses = said(operation_id)["responses"]
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
    """Where the two are not of one shape, or not of the same words for people.

    What may be null may be so in one of them; whether it may, the schemas say.
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
    in_words = place.endswith(("/message", "/warning", "/type", "/mode", "/status"))
    return [f"{place} says {real!r}"] if in_words and example != real else []


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
    real = performed(client, "register_tenant", sent("register_tenant", name))
    assert differences(answered("register_tenant"), real) == []


def test_log_in(acme: Account) -> None:
    real = performed(acme.client, "log_in", sent("log_in"))
    assert differences(answered("log_in"), real) == []


def test_refresh_tokens(acme: Account) -> None:
    assert sent("refresh_tokens").keys() == {"refresh"}
    real = performed(acme.client, "refresh_tokens", {"refresh": acme.tokens["refresh"]})
    assert differences(answered("refresh_tokens"), real) == []


def test_get_current_user(acme: Account) -> None:
    real = performed(acme.client, "get_current_user", **as_user(acme))
    assert differences(answered("get_current_user"), real) == []


def test_change_password(acme: Account) -> None:
    real = performed(acme.client, "change_password", sent("change_password"), **as_user(acme))
    assert differences(answered("change_password"), real) == []


@pytest.mark.parametrize("operation_id", ["verify_api_key", "get_tenant_details"])
@pytest.mark.parametrize(
    ("name", "member"), [("secret_key", "api_key_secret"), ("publishable_key", "api_key_test_public")]
)
def test_what_a_key_may_see(acme: Account, operation_id: str, name: str, member: str) -> None:
    real = performed(acme.client, operation_id, **{"X-API-Key": acme.tenant[member]})
    assert differences(answered(operation_id, name), real) == []


def test_list_api_keys(acme: Account) -> None:
    # The example is what an owner sees who has replaced the live keys and left the old ones a day.
    with_grace = sent("regenerate_api_keys", "with_grace")
    performed(acme.client, "regenerate_api_keys", with_grace, **as_user(acme))
    real = performed(acme.client, "list_api_keys", **as_user(acme))
    assert differences(answered("list_api_keys"), real) == []


def test_regenerate_api_keys(acme: Account) -> None:
    at_once = sent("regenerate_api_keys", "at_once")
    real = performed(acme.client, "regenerate_api_keys", at_once, **as_user(acme))
    assert differences(answered("regenerate_api_keys"), real) == []


def test_revoke_api_keys(acme: Account) -> None:
    real = performed(acme.client, "revoke_api_keys", sent("revoke_api_keys"), **as_user(acme))
    assert real == answered("revoke_api_keys")


def test_differences_are_seen() -> None:
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
# Their detail is found when they happen: the number of faults, the roles it takes, the variable to set.
SAID_AT_RUN_TIME = {"invalid-request", "insufficient-scope", "stripe-not-configured"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_what_the_server_makes_of_the_error(name: str) -> None:
    example = PROBLEMS[name]
    faults = [Fault(**fault) for fault in example.get("errors", ())]
    detail = example["detail"] if example["code"] in SAID_AT_RUN_TIME else None
    error = CATALOGUE[example["code"]](detail, faults=faults)
    made = orjson.loads(render(error, request_id=example["request_id"]).body)
    assert without_origin(made) == without_origin(example)


def test_a_missing_member_is_answered_as_the_example_says(client: TestClient) -> None:
    whole = sent("register_tenant", "minimal")
    body = {name: value for name, value in whole.items() if name != "company_name"}
    real = perform(client, "register_tenant", body).json()
    assert [real[name] for name in ("detail", "errors")] == [
        PROBLEMS["BadRequest"][name] for name in ("detail", "errors")
    ]


def without_origin(problem: dict[str, Any]) -> dict[str, Any]:
    """All but what each server, and each occurrence, has of its own."""
    _, _, path = problem["type"].partition("/problems/")
    return {**problem, "type": path, "instance": ""}
