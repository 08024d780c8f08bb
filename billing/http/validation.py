"""Validation against the document: strict JSON, compiled schemas, faults by pointer that repeat no value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

import orjson
from jsonschema_rs import Draft4Validator, ValidationError, ValidationErrorKind
from starlette.types import Receive, Scope

from billing.errors import Fault, InvalidRequest, MalformedBody
from billing.http.document import Operation
from billing.http.headers import Headers, texts

MASK = "The value"
# The document limits how many an answer lists.
MAX_FAULTS = 100
# jsonschema_rs finds all faults before it yields the first: a second, where each of 31,000 parts has one.
MAX_PARTS = 500
# jsonschema_rs raises beyond 255 levels, and orjson writes 254 but reads a thousand.
MAX_DEPTH = 128


class Rules:
    """What one operation takes: its query parameters, its headers and its body.

    `components` are those of the document, converted by `as_json_schema` once for all operations.
    """

    def __init__(self, components: Mapping[str, Any], operation: Operation) -> None:
        parameters = operation.query
        self._query = {p["name"]: Schema(components, p["schema"]) for p in parameters}
        self._required_query = {p["name"] for p in parameters if p.get("required", False)}
        self._open_query = operation.open_query
        self._headers = {
            p["name"]: (p["name"].lower().encode(), Schema(components, p["schema"]))
            for p in operation.headers
        }
        self._body = operation.request and Schema(components, operation.request)
        self._body_required = operation.body_required

    def query(self, query_string: bytes) -> dict[str, str]:
        """The query's parameters; raises `InvalidRequest`."""
        if not query_string and not self._required_query:
            return {}
        pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
        names = [name for name, _ in pairs if name in self._query or not self._open_query]
        given = dict(pairs)
        faults = [Fault(f"/query/{name}", "It is required.") for name in self._required_query - given.keys()]
        if len(set(names)) < len(names):
            faults.append(Fault("/query", "A parameter is repeated."))
        if given.keys() - self._query.keys() and not self._open_query:
            faults.append(Fault("/query", _unknown("parameter", self._query)))
        for name in given.keys() & self._query.keys():
            faults.extend(self._query[name].faults(given[name], at=f"/query/{name}"))
        _refuse(faults)
        return given

    def headers(self, raw: Headers) -> dict[str, str]:
        """The header parameters present, by their names in the document; raises `InvalidRequest`."""
        given: dict[str, str] = {}
        for name, (wanted, schema) in self._headers.items():
            found = texts(raw, wanted)
            if len(found) > 1:
                _refuse([Fault(f"/header/{name}", "The header is repeated.")])
            for value in found:
                _refuse(schema.faults(value, at=f"/header/{name}"))
                given[name] = value
        return given

    def body(self, raw: bytes) -> Any:
        """The body's JSON, None where there is none; raises `MalformedBody` or `InvalidRequest`."""
        if not raw:
            _refuse([Fault("", "A body is required.")] if self._body_required else [])
            return None
        body = parse_json(raw)
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deep(body):
            raise MalformedBody(f"The body is nested more than {MAX_DEPTH} deep.")
        if self._body:
            has_many_parts = raw.count(b",") >= MAX_PARTS
            _refuse(self._body.first_fault(body) if has_many_parts else self._body.faults(body))
        return body


def parse_json(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no lone surrogates, no bottomless nesting; and no NUL."""
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise MalformedBody from None
    # PostgreSQL cannot store NUL, and few bodies contain what could be its escape.
    if b"\\u0000" in raw and _has_nul(parsed):
        raise MalformedBody("The body has text with a NUL character.")
    return parsed


def _has_nul(value: Any) -> bool:
    # No recursion: orjson reads a thousand levels, and Python's stack has room for hardly more.
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and "\0" in part:
            return True
    return False


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
    return any(isinstance(part, dict | list) for part in level)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse(faults: Sequence[Fault]) -> None:
    if faults:
        places = f"{len(faults)} place{'s' if len(faults) > 1 else ''}"
        raise InvalidRequest(
            f"The request does not match the document in {places}.",
            faults=sorted(faults, key=lambda fault: fault.pointer),
        )


class Schema:
    """A compiled schema of the document, and what is wrong with a value by it, without repeating the value."""

    def __init__(self, components: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
        # OpenAPI 3.0 schemas are draft 4 with `nullable`; the references point into the components.
        self._whole = {**as_json_schema(schema), "components": components}
        self._validator = Draft4Validator(self._whole, validate_formats=True, mask=MASK)

    def faults(self, value: Any, *, at: str = "") -> list[Fault]:
        """The first `MAX_FAULTS` faults."""
        return [self._fault(error, at) for error in islice(self._validator.iter_errors(value), MAX_FAULTS)]

    def first_fault(self, value: Any) -> list[Fault]:
        """The first fault, if there is any."""
        try:
            self._validator.validate(value)
        except ValidationError as error:
            return [self._fault(error)]
        return []

    def _fault(self, error: ValidationError, at: str = "") -> Fault:
        pointer = at + _pointer(error.instance_path)
        match error.kind:
            case ValidationErrorKind.Required(property=missing):
                return Fault(pointer + _pointer([missing]), "It is required.")
            case ValidationErrorKind.AdditionalProperties():
                # The library's message names the unknown member, which the client sent.
                *place, _ = error.schema_path
                known = reduce(_part_of, place, self._whole).get("properties", {})
                return Fault(pointer, _unknown("member", known))
        return Fault(pointer, f"{error.message}.")


def _part_of(schema: Any, part: str | int) -> Any:
    # jsonschema_rs makes a number of a name of digits.
    return schema[int(part)] if isinstance(schema, list) else schema[str(part)]


def _unknown(kind: str, known: Iterable[str]) -> str:
    listed = ", ".join(known)
    return f"It has a {kind} that is not in the document." + (f" Known: {listed}." if listed else "")


def _pointer(path: Sequence[str | int]) -> str:
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)


def as_json_schema(node: Any) -> Any:
    """An OpenAPI 3.0 schema in JSON Schema draft 4: `nullable` becomes a second type."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {name: as_json_schema(value) for name, value in node.items()}
    if plain.get("nullable") is True and isinstance(plain.get("type"), str):
        plain["type"] = [plain["type"], "null"]
    return plain


def validator_map(rules: Mapping[str, Rules]) -> dict[str, Any]:
    """Connexion's two validators. They store what they parse in the state: `query`, `headers` and `body`."""

    class Parameters:
        def __init__(self, *_: object, **__: object) -> None: ...

        def validate(self, scope: Scope) -> None:
            rules = _rules_of(scope)
            scope["state"]["query"] = rules.query(scope["query_string"])
            scope["state"]["headers"] = rules.headers(scope["headers"])

    class Body:
        def __init__(self, *_: object, **__: object) -> None: ...

        async def wrap_receive(self, receive: Receive, *, scope: Scope) -> tuple[Receive, Scope]:
            message = await receive()  # The guard has made it one message.
            scope["state"]["body"] = _rules_of(scope).body(message.get("body", b""))
            return receive, scope

    def _rules_of(scope: Scope) -> Rules:
        return rules[scope["extensions"]["connexion_routing"]["operation_id"]]

    return {"parameter": Parameters, "body": {"application/json": Body}}
