"""Rules for our document beyond linters: each is checked at each place, so that a failure names the place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
from jsonschema_rs import Draft4Validator

from billing.errors import catalogue
from billing.http.document import Operation, operations, resolve
from billing.http.problems import status_of
from billing.http.validation import as_json_schema
from billing.http.wiring import handler_of
from tests.answers import DOCUMENT, IMPLIED, PROBLEM, closed
from tests.conftest import API

Node = dict[str, Any]

TEXT = (Path(__file__).parents[2] / "openapi/billing.yaml").read_text(encoding="utf-8")
METHODS = {"get", "post", "delete"}
COMPONENTS = DOCUMENT["components"]

PUBLIC: tuple[str, ...] = ()
OWNERS = ("owner",)
ADMINS = ("admin", "owner")
ANY_USER = ("developer", "admin", "owner")
# The operations as clients know them: nothing here may change without a new version of the API.
OPERATIONS = {
    "register_tenant": ("POST", "/register/", PUBLIC),
    "log_in": ("POST", "/login/", PUBLIC),
    "refresh_tokens": ("POST", "/token/refresh/", PUBLIC),
    "get_current_user": ("GET", "/me/", ANY_USER),
    "change_password": ("POST", "/change-password/", ANY_USER),
    "verify_api_key": ("GET", "/verify/", ANY_USER),
    "get_tenant_details": ("GET", "/details/", ANY_USER),
    "start_stripe_connect": ("POST", "/stripe/connect/", OWNERS),
    "complete_stripe_connect": ("GET", "/stripe/callback/", PUBLIC),
    "get_stripe_status": ("GET", "/stripe/status/", ADMINS),
    "disconnect_stripe": ("DELETE", "/stripe/disconnect/", OWNERS),
    "list_api_keys": ("GET", "/api-keys/", ADMINS),
    "regenerate_api_keys": ("POST", "/api-keys/regenerate/", OWNERS),
    "revoke_api_keys": ("POST", "/api-keys/revoke/", OWNERS),
    "get_webhook_config": ("GET", "/webhooks/config/", ADMINS),
    "configure_webhook": ("POST", "/webhooks/config/", ADMINS),
    "remove_webhook": ("DELETE", "/webhooks/config/", ADMINS),
    "send_test_webhook": ("POST", "/webhooks/test/", ADMINS),
}
FOR_KEYS = {"verify_api_key", "get_tenant_details"}


# Places that the rules apply to ------------------------------------------------------------------


def nodes(node: Any, place: str = "") -> Iterator[tuple[str, Node]]:
    """Every mapping that is part of the document itself, by its JSON Pointer; what examples hold is not."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from nodes(item, f"{place}/{number}")
    elif isinstance(node, dict):
        yield place, node
        for name, value in node.items():
            if name not in ("example", "examples") or place.endswith("/properties"):
                yield from nodes(value, f"{place}/{name.replace('/', '~1')}")


def nested(schema: Node, place: str) -> Iterator[tuple[str, Node]]:
    """A schema and all schemas inside it."""
    yield place, schema
    for name, part in schema.get("properties", {}).items():
        yield from nested(part, f"{place}/{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from nested(schema[name], f"{place}/{name}")


def all_schemas() -> Iterator[tuple[str, Node]]:
    for name, schema in COMPONENTS["schemas"].items():
        yield from nested(schema, f"{name}")
    for place, node in NODES.items():
        if "schema" in node:
            yield from nested(node["schema"], place)


NODES = dict(nodes(DOCUMENT))
SCHEMAS = dict(all_schemas())
INLINE = {place: schema for place, schema in SCHEMAS.items() if "$ref" not in schema}
UNNAMED = {place: schema for place, schema in INLINE.items() if place not in COMPONENTS["schemas"]}
PROPERTIES = {
    f"{place}/{name}": part
    for place, schema in INLINE.items()
    for name, part in schema.get("properties", {}).items()
}
LISTED = {operation.operation_id: operation for operation in operations(DOCUMENT)}
DECLARED: dict[str, Node] = {
    declared["operationId"]: declared
    for item in DOCUMENT["paths"].values()
    for method, declared in item.items()
    if method in METHODS
}
CLOSED_COMPONENTS = closed(as_json_schema(COMPONENTS))
ANSWERS = [(name, status) for name, declared in DECLARED.items() for status in declared["responses"]]
ERRORS = [(name, status) for name, status in ANSWERS if status >= "400"]
SECURED = [name for name, operation in LISTED.items() if operation.schemes]


def of_type(*types: str) -> list[str]:
    return [place for place, schema in INLINE.items() if schema.get("type") in types]


def answer(operation_id: str, status: str) -> Node:
    return resolve(DOCUMENT, DECLARED[operation_id]["responses"][status])


def objects_in(node: Any) -> Iterator[str]:
    """The names of the objects with listed members that can be reached from here."""
    for inner in node if isinstance(node, list) else node.values() if isinstance(node, dict) else ():
        yield from objects_in(inner)
    if isinstance(node, dict) and "$ref" in node:
        target = resolve(DOCUMENT, node)
        if "properties" in target:
            yield node["$ref"].rpartition("/")[2]
        yield from objects_in(target)


SENT = {name for declared in DECLARED.values() for name in objects_in(declared.get("requestBody", {}))}


def faults(schema: Node, value: Any) -> list[str]:
    """The errors of the value, as messages; a member that is not listed is one."""
    whole = {**closed(as_json_schema(schema)), "components": CLOSED_COMPONENTS}
    return [error.message for error in Draft4Validator(whole, validate_formats=True).iter_errors(value)]


def test_the_rules_apply_to_enough_places() -> None:
    assert len(INLINE) > 200
    assert len(PROPERTIES) > 200
    assert len(EXAMPLES) > 200
    assert len(ERRORS) > 100


# The whole document ------------------------------------------------------------------------------


def test_the_document_is_valid_openapi_3_0_3() -> None:
    assert DOCUMENT["openapi"] == "3.0.3"
    openapi_spec_validator.validate(DOCUMENT)


def test_the_description_says_that_no_answer_may_be_cached() -> None:
    # Once for all answers; `tests.answers` checks the header of each of them.
    assert "`Cache-Control: no-store`" in DOCUMENT["info"]["description"]


def test_servers_are_origins_and_the_first_is_https() -> None:
    urls = [server["url"] for server in DOCUMENT["servers"]]
    assert urls[0].startswith("https://")
    assert all(re.fullmatch(r"https?://[a-z0-9.:-]+", url) for url in urls)


@pytest.mark.parametrize(
    "unwanted",
    [
        # Connexion would run it as a template if it read the file itself.
        r"\{\{|\{%|\{#",
        # Internal names of the server.
        r"x-openapi-router-controller|x-body-name|\bbilling\.(http|handlers|storage)\b|\.py\b",
        # What scanners mistake for a secret, and people might try as one.
        r"\b[sp]k_(live|test)_[0-9A-Za-z]{20,}",
        r"\bwhsec_[0-9A-Za-z+/=]{24,}",
        r"\b(ac|acct|ca|rt)_[0-9A-Za-z]{20,}",
        r"\beyJ[0-9A-Za-z_-]{8,}",
        r"\bAKIA[0-9A-Z]{12,}|BEGIN [A-Z ]*PRIVATE KEY",
    ],
)
def test_the_document_contains_no(unwanted: str) -> None:
    assert not re.findall(unwanted, TEXT)


# Operations --------------------------------------------------------------------------------------


def test_the_operations_are_the_eighteen() -> None:
    assert list(LISTED) == list(OPERATIONS)


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_keeps_its_method_path_and_roles(operation_id: str) -> None:
    method, path, roles = OPERATIONS[operation_id]
    operation = LISTED[operation_id]
    assert (operation.method, operation.path, operation.roles) == (method, API + path, roles)


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_security_is_declared_explicitly(operation_id: str) -> None:
    _, _, roles = OPERATIONS[operation_id]
    for_keys = [{"apiKeyAuth": []}] if operation_id in FOR_KEYS else []
    assert DECLARED[operation_id]["security"] == ([{"bearerAuth": []}, *for_keys] if roles else [])


@pytest.mark.parametrize("operation", LISTED.values(), ids=LISTED)
def test_an_operation_has_a_handler_of_its_own(operation: Operation) -> None:
    handler = handler_of(operation)
    module = operation.tags[0].lower().replace(" ", "_")
    assert (handler.__module__, handler.__name__) == (f"billing.handlers.{module}", operation.operation_id)


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_has_a_tag_a_summary_and_a_description(operation_id: str) -> None:
    declared = DECLARED[operation_id]
    assert [tag for tag in DOCUMENT["tags"] if [tag["name"]] == declared["tags"]]
    assert declared["summary"]
    assert "call it" in declared["description"]


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_a_path_ends_in_a_slash(path: str) -> None:
    assert path.startswith(f"{API}/")
    assert path.endswith("/")


@pytest.mark.parametrize("operation_id", SECURED)
def test_a_secured_operation_declares_its_roles(operation_id: str) -> None:
    known = COMPONENTS["schemas"]["Role"]["enum"]
    assert DECLARED[operation_id]["x-roles"]
    assert set(DECLARED[operation_id]["x-roles"]) <= set(known)
    assert DECLARED[operation_id]["responses"].keys() >= {"401", "403"}


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_lists_the_statuses_that_can_always_occur(operation_id: str) -> None:
    with_body = {"415"} if LISTED[operation_id].request else set()
    assert DECLARED[operation_id]["responses"].keys() >= {"400", "413", "429", "500", "503"} | with_body


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_has_one_success_status(operation_id: str) -> None:
    assert len([status for status in DECLARED[operation_id]["responses"] if status.startswith("2")]) == 1


@pytest.mark.parametrize("place", [place for place in NODES if re.search(r"/links/\w+$", place)])
def test_a_link_names_an_operation_and_sends_no_body(place: str) -> None:
    assert NODES[place]["operationId"] in OPERATIONS
    assert "requestBody" not in NODES[place]


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation_id", "status"), ANSWERS)
def test_an_answer_has_a_request_id(operation_id: str, status: str) -> None:
    assert "X-Request-Id" in answer(operation_id, status)["headers"]


PAGES = {"400", "403", "409", "422", "502", "503"}


@pytest.mark.parametrize(("operation_id", "status"), ERRORS)
def test_an_error_is_a_shared_response_with_a_problem(operation_id: str, status: str) -> None:
    assert DECLARED[operation_id]["responses"][status].keys() == {"$ref"}
    content = answer(operation_id, status)["content"]
    # A browser that returns from Stripe is shown a page.
    is_page = operation_id == "complete_stripe_connect" and status in PAGES
    assert content.keys() == ({PROBLEM, "text/html"} if is_page else {PROBLEM})
    assert content[PROBLEM]["schema"] == {"$ref": "#/components/schemas/Problem"}


@pytest.mark.parametrize(("operation_id", "status"), ERRORS)
def test_an_error_names_the_codes_of_its_status(operation_id: str, status: str) -> None:
    error = answer(operation_id, status)
    assert codes_of(error)
    assert {STATUSES[code] for code in codes_of(error)} == {int(status)}
    example = error["content"][PROBLEM]["example"]
    assert (example["code"] in codes_of(error), example["status"]) == (True, int(status))


@pytest.mark.parametrize("operation_id", SECURED)
def test_401_and_403_have_a_challenge(operation_id: str) -> None:
    assert "WWW-Authenticate" in answer(operation_id, "401")["headers"]
    if "insufficient-scope" in codes_of(answer(operation_id, "403")):
        assert "WWW-Authenticate" in answer(operation_id, "403")["headers"]


def codes_of(error: Node) -> list[str]:
    """The codes that a response's description names."""
    _, _, named = error["description"].replace("Codes:", "Code:").partition("Code:")
    return re.findall(r"`([a-z-]+)`", named)


# Problems ----------------------------------------------------------------------------------------

CATALOGUE = {error.code(): error for error in catalogue()}
STATUSES = {code: status_of(error) for code, error in CATALOGUE.items()}
CODE = COMPONENTS["schemas"]["Problem"]["properties"]["code"]


def test_the_codes_are_those_of_the_catalogue() -> None:
    assert CODE["x-extensible-enum"] == list(CATALOGUE)


def test_the_table_of_codes_matches_the_catalogue() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \| (.+) \|$", CODE["description"], re.MULTILINE)
    assert rows == [
        (code, str(STATUSES[code]), error.title().removesuffix(".")) for code, error in CATALOGUE.items()
    ]


@pytest.mark.parametrize("code", CATALOGUE)
def test_a_code_belongs_to_a_response(code: str) -> None:
    named = {code for error in COMPONENTS["responses"].values() for code in codes_of(error)}
    assert code in named or STATUSES[code] in IMPLIED


# Schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PROPERTIES)
def test_a_property_has_a_description_and_an_example(place: str) -> None:
    schema = resolve(DOCUMENT, PROPERTIES[place])
    assert schema["description"]
    assert {"example", "enum", "properties"} & schema.keys() or "$ref" in schema["items"]


@pytest.mark.parametrize("place", of_type("string"))
def test_a_string_has_a_bound(place: str) -> None:
    assert {"maxLength", "enum"} & INLINE[place].keys()
    assert {"pattern", "enum", "format"} & INLINE[place].keys()


@pytest.mark.parametrize("place", of_type("array"))
def test_an_array_has_a_bound(place: str) -> None:
    assert INLINE[place]["maxItems"] > 0


@pytest.mark.parametrize("place", of_type("integer", "number"))
def test_a_number_has_bounds(place: str) -> None:
    assert INLINE[place]["minimum"] < INLINE[place]["maximum"] <= 2**53 - 1
    assert INLINE[place]["format"] in ("int32", "int64")


@pytest.mark.parametrize("place", of_type("object"))
def test_only_requests_forbid_additional_members(place: str) -> None:
    schema = INLINE[place]
    if "properties" not in schema:
        assert schema["maxProperties"] > 0
    elif place in SENT:
        assert schema["additionalProperties"] is False
    else:
        assert "additionalProperties" not in schema


def test_requests_and_answers_share_no_object() -> None:
    assert len(SENT) >= 9
    assert SENT.isdisjoint(
        name for declared in DECLARED.values() for name in objects_in(declared["responses"])
    )


@pytest.mark.parametrize("place", of_type("object"))
def test_a_required_member_is_a_listed_property(place: str) -> None:
    assert set(INLINE[place].get("required", ())) <= INLINE[place].get("properties", {}).keys()


@pytest.mark.parametrize("place", UNNAMED)
def test_no_object_and_no_enum_is_inline(place: str) -> None:
    schema = UNNAMED[place]
    assert schema["type"] != "object"
    assert not {"enum", "oneOf", "anyOf", "allOf", "properties"} & schema.keys()


@pytest.mark.parametrize("place", [place for place, node in NODES.items() if "nullable" in node])
def test_nullable_is_used_only_where_every_generator_supports_it(place: str) -> None:
    schema = NODES[place]
    assert not {"$ref", "enum", "allOf", "oneOf", "anyOf", "properties"} & schema.keys()
    assert schema["type"] in ("string", "integer", "number", "boolean", "array")
    assert not re.fullmatch("/components/schemas/[^/]+", place)


def test_a_reference_has_no_siblings() -> None:
    assert [place for place, node in NODES.items() if "$ref" in node and len(node) > 1] == []


@pytest.mark.parametrize("place", [place for place, schema in INLINE.items() if "pattern" in schema])
def test_a_pattern_uses_only_portable_syntax(place: str) -> None:
    pattern = INLINE[place]["pattern"]
    assert pattern.startswith("^")
    assert pattern.endswith("$")
    assert not re.search(r"\\[pPdDwWsSbBuAzZ]|\(\?|(?<!\\)\.[*+]", pattern)


@pytest.mark.parametrize("place", [place for place, schema in INLINE.items() if "pattern" in schema])
def test_a_pattern_admits_no_nul(place: str) -> None:
    schema = {"type": "string", "pattern": INLINE[place]["pattern"]}
    assert [text for text in ("\0", "a\0", "\0a", "a\0a\n") if not faults(schema, text)] == []


# By name, what only its holder may see; by place, what is masked although its name says secret.
SECRET_NAME = re.compile(r"(password|secret|token)$|^(access|refresh|state|key)$|^api_key_(?!.*public)")
MASKED = ("ApiKey/key", "WebhookConfig/webhook_secret")


@pytest.mark.parametrize("place", [place for place in PROPERTIES if place not in MASKED])
def test_a_secret_is_marked(place: str) -> None:
    schema, name = PROPERTIES[place], place.rpartition("/")[2]
    is_secret = schema.get("type") == "string" and bool(SECRET_NAME.search(name))
    assert schema.get("x-secret", False) == (is_secret or schema.get("format") == "password")


@pytest.mark.parametrize("place", MASKED)
def test_a_masked_property_is_not_marked_as_secret(place: str) -> None:
    assert "x-secret" not in PROPERTIES[place]
    assert r"\*{4}" in PROPERTIES[place]["pattern"]


def test_the_secrets_of_the_callback_are_marked() -> None:
    marked = {p["name"] for p in COMPONENTS["parameters"].values() if p.get("x-secret", False)}
    assert marked == {"code", "state"}


# Names -------------------------------------------------------------------------------------------

GROUPS: dict[str, Iterable[str]] = {
    **{section: members for section, members in COMPONENTS.items() if section != "headers"},
    **{place: schema["properties"] for place, schema in INLINE.items() if "properties" in schema},
    "operations": [node["operationId"] for node in NODES.values() if "responses" in node and "tags" in node],
}
RESERVED = {"date", "set", "list", "error", "response", "file", "map", "object", "d"}


@pytest.mark.parametrize("group", GROUPS)
def test_names_differ_in_more_than_case_and_separators(group: str) -> None:
    folded = Counter(re.sub("[_-]", "", name).lower() for name in GROUPS[group])
    assert [name for name, times in folded.items() if times > 1] == []


@pytest.mark.parametrize("name", COMPONENTS["schemas"])
def test_a_schema_has_an_unreserved_name_and_a_description(name: str) -> None:
    assert re.fullmatch("([A-Z][a-z0-9]+)+", name)
    assert name.lower() not in RESERVED
    assert COMPONENTS["schemas"][name]["description"]


@pytest.mark.parametrize("place", PROPERTIES)
def test_a_property_is_in_snake_case(place: str) -> None:
    name = place.rpartition("/")[2]
    assert re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert len(name) > 1


# Examples ----------------------------------------------------------------------------------------


def all_examples() -> Iterator[tuple[str, Node, Any]]:
    """Each example and each default: where it stands, its schema, and itself."""
    for place, schema in INLINE.items():
        for name in ("example", "default"):
            if name in schema:
                yield f"{place}/{name}", schema, schema[name]
    for place, node in NODES.items():
        if "schema" in node:
            named = {name: example["value"] for name, example in node.get("examples", {}).items()}
            unnamed = {"example": node["example"]} if "example" in node else {}
            for name, value in (unnamed | named).items():
                yield f"{place}/{name}", node["schema"], value


EXAMPLES = {place: (schema, value) for place, schema, value in all_examples()}


@pytest.mark.parametrize("place", EXAMPLES)
def test_an_example_matches_its_schema(place: str) -> None:
    assert faults(*EXAMPLES[place]) == []


@pytest.mark.parametrize("place", [place for place in NODES if re.search(r"/content/[^/]+$", place)])
def test_a_body_has_an_example(place: str) -> None:
    assert {"example", "examples"} & NODES[place].keys()
