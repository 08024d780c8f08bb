"""Requests against the document: validated strictly, without echoing what was sent."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.errors import InvalidRequest, MalformedBody
from billing.http.document import Operation, load, operations
from billing.http.validation import Rules, as_json_schema, parse_json

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", {}),
        (b" \t\r\n[1, 2.5, true, null] ", [1, 2.5, True, None]),
        ('"é😀"'.encode(), "é😀"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b"9007199254740993", 9007199254740993),
        (b"18446744073709551615", 2**64 - 1),
        (b"-0", 0),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'"\\\\u0000"', "\\u0000"),
        (b"[" * 1000 + b"]" * 1000, "deep"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "deep"),
        (b"[" * 1000 + b'"\\\\u0000"' + b"]" * 1000, "deep"),
    ],
)
def test_valid_json_is_parsed(raw: bytes, value: Any) -> None:
    parsed = parse_json(raw)
    assert value == "deep" or parsed == value


MALFORMED = [
    b"",
    b" ",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b'{"a": NaN}',
    b"1e400",
    b"-1e400",
    b"1" * 400,
    b"01",
    b"+1",
    b"1.",
    b".5",
    b"0x1",
    b"'a'",
    b"{a: 1}",
    b"[1,]",
    b'{"a": 1,}',
    b"1 2",
    b"{} x",
    b"// comment\n{}",
    b"True",
    b"undefined",
    b'"unfinished',
    b'"tab\there"',
    b'"nul\x00here"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\x41"',
    b'"\xed\xa0\x80"',
    b'"\xc0\x80"',
    b'"\xff"',
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    "{}".encode("utf-32-le"),
    b"[" * 1100 + b"]" * 1100,
    b"[" * 60_000,
    b"{" * 60_000,
]


@pytest.mark.parametrize("raw", MALFORMED, ids=lambda raw: ascii(raw[:24]))
def test_invalid_json_is_malformed_and_not_echoed(raw: bytes) -> None:
    with pytest.raises(MalformedBody) as caught:
        parse_json(raw)
    assert caught.value.detail == MalformedBody().detail
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


WITH_NUL = [
    b'"\\u0000"',
    b'{"\\u0000": 1}',
    b'["deep", {"a": [{"b": "x\\u0000y"}]}]',
    b"[" * 1000 + b'"\\u0000"' + b"]" * 1000,
    b'{"a":' * 1000 + b'"\\u0000"' + b"}" * 1000,
]


@pytest.mark.parametrize("raw", WITH_NUL, ids=lambda raw: ascii(raw[:24]))
def test_text_with_nul_is_refused_with_its_own_message(raw: bytes) -> None:
    with pytest.raises(MalformedBody, match=r"^The body has text with a NUL character\.$"):
        parse_json(raw)


@UNHURRIED
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_json_or_malformed(raw: bytes) -> None:
    try:
        parse_json(raw)
    except MalformedBody:
        return
    raw.decode()


# Bodies ------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8, "pattern": "^[a-z]*$"},
        "email": {"type": "string", "format": "email"},
        "url": {"type": "string", "format": "uri"},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "confirm": {"type": "boolean", "enum": [True]},
        "kind": {"type": "string", "enum": ["live", "test"]},
        "note": {"type": "string", "nullable": True},
        "nullable": {"type": "string"},
        "a/b~c": {"type": "string"},
        "list": {"type": "array", "maxItems": 2, "uniqueItems": True, "items": {"type": "string"}},
        "inner": {"$ref": "#/components/schemas/Inner"},
        "0": {"type": "object", "additionalProperties": False, "properties": {"known": {}}},
        "any": {"type": "object", "additionalProperties": True},
        "either": {"oneOf": [{"type": "string", "enum": ["x"]}, {"type": "integer"}]},
    },
}
UNKNOWN_MEMBER = f"It has a member that is not in the document. Known: {', '.join(SCHEMA['properties'])}."
COMPONENTS = {
    "schemas": {
        "Inner": {
            "type": "object",
            "required": ["must"],
            "additionalProperties": False,
            "properties": {"must": {"type": "string", "nullable": True}},
        }
    }
}


def rules(
    *, required: bool = True, query: tuple[dict[str, Any], ...] = (), open_query: bool = False
) -> Rules:
    operation = Operation(
        operation_id="make_thing",
        method="POST",
        path="/things/",
        tags=(),
        roles=(),
        schemes=(),
        query=query,
        open_query=open_query,
        request=SCHEMA,
        body_required=required,
    )
    return Rules(as_json_schema(COMPONENTS), operation)


RULES = rules()


def faults(raw: bytes | str, by: Rules = RULES) -> set[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        by.body(raw.encode() if isinstance(raw, str) else raw)
    listed = [(fault.pointer, fault.message) for fault in caught.value.faults]
    assert listed == sorted(listed, key=lambda fault: fault[0])
    return set(listed)


@pytest.mark.parametrize(
    "raw",
    [
        '{"name": "abc"}',
        '{"name": "abc", "note": null}',
        '{"name": "abc", "note": "x", "nullable": "x", "a/b~c": "x"}',
        '{"name": "abc", "count": 9, "confirm": true, "kind": "test"}',
        '{"name": "abc", "inner": {"must": null}, "any": {"x": [1]}, "either": 5, "list": ["a", "b"]}',
        '{"name": "abc", "email": "ada@acme.example", "url": "https://a.example/"}',
    ],
)
def test_a_valid_body_is_returned_parsed(raw: str) -> None:
    assert RULES.body(raw.encode()) == parse_json(raw.encode())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("{}", {("/name", "It is required.")}),
        ('{"name": "ab"}', {("/name", "The value is shorter than 3 characters.")}),
        ('{"name": "abcdefghi"}', {("/name", "The value is longer than 8 characters.")}),
        ('{"name": "Hunter"}', {("/name", 'The value does not match "^[a-z]*$".')}),
        ('{"name": "abc\\n"}', {("/name", 'The value does not match "^[a-z]*$".')}),
        ('{"name": 5}', {("/name", 'The value is not of type "string".')}),
        ('{"name": null}', {("/name", 'The value is not of type "string".')}),
        ('{"name": "abc", "hunter2": 1}', {("", UNKNOWN_MEMBER)}),
        ('{"name": "abc", "count": 0}', {("/count", "The value is less than the minimum of 1.")}),
        ('{"name": "abc", "count": 1e30}', {("/count", "The value is greater than the maximum of 9.")}),
        ('{"name": "abc", "count": "5"}', {("/count", 'The value is not of type "integer".')}),
        ('{"name": "abc", "count": true}', {("/count", 'The value is not of type "integer".')}),
        ('{"name": "abc", "count": 5.0}', {("/count", 'The value is not of type "integer".')}),
        ('{"name": "abc", "confirm": false}', {("/confirm", "The value is not one of true.")}),
        ('{"name": "abc", "kind": "hunter2"}', {("/kind", 'The value is not one of "live" or "test".')}),
        ('{"name": "abc", "email": "hunter2"}', {("/email", 'The value is not a "email".')}),
        ('{"name": "abc", "url": "hunter2"}', {("/url", 'The value is not a "uri".')}),
        ('{"name": "abc", "note": 5}', {("/note", 'The value is not of types "null", "string".')}),
        ('{"name": "abc", "nullable": null}', {("/nullable", 'The value is not of type "string".')}),
        ('{"name": "abc", "a/b~c": 5}', {("/a~1b~0c", 'The value is not of type "string".')}),
        ('{"name": "abc", "inner": {}}', {("/inner/must", "It is required.")}),
        ('{"name": "abc", "inner": null}', {("/inner", 'The value is not of type "object".')}),
        (
            '{"name": "abc", "inner": {"must": "x", "hunter2": 1}}',
            {("/inner", "It has a member that is not in the document. Known: must.")},
        ),
        (
            '{"name": "abc", "0": {"hunter2": 1}}',
            {("/0", "It has a member that is not in the document. Known: known.")},
        ),
        ('{"name": "abc", "list": ["a", 5]}', {("/list/1", 'The value is not of type "string".')}),
        (
            '{"name": "abc", "list": ["hunter2", "hunter2"]}',
            {("/list", "The value has non-unique elements.")},
        ),
        ('{"name": "abc", "list": ["a", "b", "hunter2"]}', {("/list", "The value has more than 2 items.")}),
        (
            '{"count": 0}',
            {("/name", "It is required."), ("/count", "The value is less than the minimum of 1.")},
        ),
        ('"hunter2"', {("", 'The value is not of type "object".')}),
        ("null", {("", 'The value is not of type "object".')}),
        ("[]", {("", 'The value is not of type "object".')}),
    ],
)
def test_each_fault_is_reported_by_its_pointer(raw: str, expected: set[tuple[str, str]]) -> None:
    assert_same_places(faults(raw), expected)
    assert "unter" not in str(faults(raw))


def assert_same_places(found: set[tuple[str, str]], expected: set[tuple[str, str]]) -> None:
    # The library may report more than one fault at a place.
    assert {pointer for pointer, _ in found} == {pointer for pointer, _ in expected}
    assert found >= expected


SECRET = "hunter2hunter2"
LEAKY = st.recursive(
    st.just(SECRET),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.just(SECRET), inner),
)


@UNHURRIED
@given(value=LEAKY, name=st.sampled_from([*SCHEMA["properties"], SECRET]))  # type: ignore[misc]
def test_no_fault_repeats_a_value(value: Any, name: str) -> None:
    if name == "any":
        return  # Free-form: everything is valid.
    try:
        RULES.body(orjson.dumps({"name": value, name: value}))
    except InvalidRequest as refused:
        assert SECRET not in str(refused.faults) + refused.detail
    else:
        raise AssertionError("a name of fourteen characters passed")


def test_an_empty_body_counts_as_missing() -> None:
    assert rules(required=False).body(b"") is None
    assert faults(b"") == {("", "A body is required.")}


def test_an_optional_body_that_is_sent_must_match() -> None:
    assert faults(b"{}", rules(required=False)) == {("/name", "It is required.")}
    with pytest.raises(MalformedBody):
        rules(required=False).body(b" ")


def test_an_operation_without_a_body_takes_any_json() -> None:
    plain = Operation("get", "GET", "/", (), (), (), (), False, None, False)
    assert Rules({}, plain).body(b'{"a": 1}') == {"a": 1}
    with pytest.raises(MalformedBody):
        Rules({}, plain).body(b"{")


# Queries -----------------------------------------------------------------------------------------

UNKNOWN = "It has a parameter that is not in the document. Known: state, code."
TWICE = "A parameter is repeated."
QUERY = (
    {"name": "state", "in": "query", "required": True, "schema": {"type": "string", "maxLength": 5}},
    {"name": "code", "in": "query", "schema": {"type": "string", "pattern": "^[a-z]*$"}},
)


@pytest.mark.parametrize(
    ("raw", "given_"),
    [
        (b"state=x", {"state": "x"}),
        (b"state=", {"state": ""}),
        (b"state", {"state": ""}),
        (b"&state=x&", {"state": "x"}),
        (b"st%61te=%C3%A9+b", {"state": "é b"}),
        (b"code=a&state=b", {"code": "a", "state": "b"}),
        (b"state=a;b=c", {"state": "a;b=c"}),
    ],
)
def test_a_valid_query_is_returned_parsed(raw: bytes, given_: dict[str, str]) -> None:
    assert rules(query=QUERY).query(raw) == given_


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", {("/query/state", "It is required.")}),
        (
            b"State=x",
            {
                ("/query/state", "It is required."),
                ("/query", UNKNOWN),
            },
        ),
        (b"state=x&hunter2=1", {("/query", UNKNOWN)}),
        (b"state=x&state=x", {("/query", TWICE)}),
        (b"state=x&st%61te=y", {("/query", TWICE)}),
        (
            b"state=x&hunter2&hunter2",
            {
                ("/query", TWICE),
                ("/query", UNKNOWN),
            },
        ),
        (b"state=hunter2", {("/query/state", "The value is longer than 5 characters.")}),
        (b"state=x&code=Hunter2", {("/query/code", 'The value does not match "^[a-z]*$".')}),
    ],
)
def test_each_fault_of_a_query_is_reported_without_its_value(
    raw: bytes, expected: set[tuple[str, str]]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rules(query=QUERY).query(raw)
    assert {(fault.pointer, fault.message) for fault in caught.value.faults} == expected
    assert "unter" not in str(caught.value.faults)


def test_an_operation_without_parameters_takes_none() -> None:
    assert rules().query(b"") == {}
    with pytest.raises(InvalidRequest):
        rules().query(b"a")


def test_an_open_query_accepts_unknown_parameters_and_its_own_once() -> None:
    assert rules(query=QUERY, open_query=True).query(b"state=x&more=y&more=z")["state"] == "x"
    with pytest.raises(InvalidRequest):
        rules(query=QUERY, open_query=True).query(b"state=x&state=y")


@pytest.mark.parametrize(("parts", "faults"), [(30, 60), (400, 100), (1_000, 1), (31_000, 1)])
def test_faults_are_capped_at_the_documented_maximum_and_at_one_for_a_large_body(
    parts: int, faults: int
) -> None:
    contract = load()
    configure = next(o for o in operations(contract) if o.operation_id == "configure_webhook")
    unknown = {"webhook_url": "https://hooks.acme.example/", "event_types": list(range(parts))}
    with pytest.raises(InvalidRequest) as refused:
        Rules(as_json_schema(contract["components"]), configure).body(json.dumps(unknown).encode())
    documented = contract["components"]["schemas"]["Problem"]["properties"]["errors"]
    assert len(refused.value.faults) == faults <= documented["maxItems"]


# Schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "nullable": True}, ["string", "null"]),
        ({"type": "string", "nullable": False}, "string"),
        ({"type": "string"}, "string"),
    ],
)
def test_nullable_becomes_a_second_type_at_any_depth(schema: dict[str, Any], expected: object) -> None:
    nested = {"anyOf": [{"properties": {"a": schema}}]}
    assert as_json_schema(schema)["type"] == expected
    assert as_json_schema(nested)["anyOf"][0]["properties"]["a"]["type"] == expected


def test_a_property_may_be_called_nullable() -> None:
    schema = {"type": "object", "properties": {"nullable": {"type": "string"}, "type": {"type": "string"}}}
    assert as_json_schema(schema) == schema
