"""Coverage of the document by the fuzzers: operations, parameters, keywords and statuses, each by name.

A name is `operation kind detail`. An operation is covered once it answered 2xx; a parameter when it was sent, and, if
it is optional, when it was left out; a status when it was answered. A schema keyword of a request counts twice: as
`kept` in a request that was not refused as malformed, and as `broken` in one that was. A request that was refused for
its credentials, or before its parameters were read, covers no parameter and no keyword. Keywords of answers are not
counted, because every answer is validated against its whole schema.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft4Validator

from billing.http.document import METHODS, load, resolve
from contract.programs import ROOT

Json = dict[str, Any]

GAPS = ROOT / "contract/gaps.toml"
KINDS = ("operation", "parameter", "keyword", "status")
# Statuses that come before the parameters and the body are validated. A public operation's own 401 comes after.
TURNED_AWAY = {404, 405, 413, 415, 429}
TURNED_AWAY_BY_NAME = {401, 403}
MALFORMED = 400
# The types to which each keyword applies: a value of any other type keeps it trivially.
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), (str,)),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (int, float)),
    **dict.fromkeys(("minItems", "maxItems", "uniqueItems"), (list,)),
    **dict.fromkeys(("minProperties", "maxProperties", "required", "additionalProperties"), (dict,)),
    **dict.fromkeys(("type", "enum"), (object,)),
}
# Keywords that modify one above, contain other schemas, or constrain nothing.
SILENT = {"properties", "items", "nullable", "exclusiveMinimum", "exclusiveMaximum", "x-secret"}
SILENT |= {
    "title",
    "description",
    "default",
    "example",
    "deprecated",
    "x-format-pattern",
    "x-extensible-enum",
}
FORMATS = {"date", "date-time", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}


# What there is -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A parameter, or the body: where it is, its schema with all references resolved, whether it is required."""

    place: str
    name: str
    schema: Json
    required: bool

    def __str__(self) -> str:
        return f"{self.place} {self.name}".rstrip()


@dataclass(frozen=True)
class Described:
    """What can be exercised of an operation of the document."""

    name: str
    method: str
    inputs: tuple[Input, ...]
    statuses: tuple[str, ...]
    is_public: bool

    def items(self) -> Iterator[str]:
        """The names of all that can be exercised."""
        yield f"{self.name} operation"
        for status in self.statuses:
            yield f"{self.name} status {status}"
        for one in self.inputs:
            yield f"{self.name} parameter {one} sent"
            if not one.required:
                yield f"{self.name} parameter {one} left out"
            for constraint in _all_constraints(one.schema, str(one)):
                yield from (f"{self.name} keyword {constraint.name} {end}" for end in constraint.ends)


def described(document: Json) -> dict[str, Described]:
    """The document's operations by name."""
    return {
        operation["operationId"]: _described(document, method, item, operation)
        for item in document["paths"].values()
        for method, operation in item.items()
        if method in METHODS
    }


def _described(document: Json, method: str, item: Json, operation: Json) -> Described:
    parameters = [
        resolve(document, one) for one in (*item.get("parameters", ()), *operation.get("parameters", ()))
    ]
    inputs = [
        Input(one["in"], one["name"], _as_text(_whole(document, one["schema"])), one.get("required", False))
        for one in parameters
    ]
    if body := resolve(document, operation.get("requestBody", {})):
        schema = _whole(document, body["content"]["application/json"]["schema"])
        inputs.append(Input("body", "", schema, body.get("required", False)))
    public = not operation.get("security", document.get("security", []))
    return Described(
        operation["operationId"], method.upper(), tuple(inputs), tuple(operation["responses"]), public
    )


def _as_text(schema: Json) -> Json:
    """A parameter's schema without `type: string`, which every parameter keeps, as it is sent as text."""
    return {k: v for k, v in schema.items() if k != "type"} if schema.get("type") == "string" else schema


def _whole(document: Json, node: Any) -> Any:
    """The schema with all references in it resolved."""
    if isinstance(node, dict):
        return {name: _whole(document, part) for name, part in resolve(document, node).items()}
    return [_whole(document, part) for part in node] if isinstance(node, list) else node


# Keywords ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraint:
    """One constraint of a schema: its name, a schema of it alone, and the outcomes that are counted."""

    name: str
    keyword: str
    schema: str
    ends: tuple[str, ...] = ("kept", "broken")

    def end(self, value: Any) -> str | None:
        """`kept` or `broken`; None if it does not apply to such a value."""
        if not isinstance(value, TYPES[self.keyword]):
            return None
        end = "kept" if _compiled(self.schema).is_valid(value) else "broken"
        return end if end in self.ends else None


@cache
def _compiled(schema: str) -> Draft4Validator:
    return Draft4Validator(json.loads(schema), validate_formats=True)


def _all_constraints(schema: Json, at: str) -> Iterator[Constraint]:
    """The constraints of a schema and of those in it; `at` is its place, as in the document."""
    yield from _constraints(schema, at)
    for inner, place in _inner(schema, at):
        yield from _all_constraints(inner, place)


def _inner(schema: Json, at: str) -> Iterator[tuple[Json, str]]:
    yield from ((inner, f"{at}/{name}") for name, inner in schema.get("properties", {}).items())
    if "items" in schema:
        yield schema["items"], f"{at}/*"


def _constraints(schema: Json, at: str) -> Iterator[Constraint]:
    for keyword, argument in schema.items():
        if keyword in SILENT or _asks_nothing(keyword, argument):
            continue
        # Better to fail than to skip a keyword that is new in the document, and has to be counted too.
        assert keyword in TYPES, f"{at}: it is not known how to count {keyword}"
        yield from _constraints_of(schema, keyword, argument, at)


def _asks_nothing(keyword: str, argument: Any) -> bool:
    match keyword:
        case "minLength" | "minItems" | "minProperties":
            return bool(argument == 0)
        case "additionalProperties":
            return argument is True
        case "format":
            return argument not in FORMATS
    return False


def _constraints_of(schema: Json, keyword: str, argument: Any, at: str) -> Iterator[Constraint]:
    match keyword:
        case "required":
            yield from (_one(schema, keyword, [name], f"{at}/{name}") for name in argument)
        case "enum":
            yield Constraint(f"{at} enum", keyword, json.dumps({"enum": argument}), ("broken",))
            for value in argument:
                yield Constraint(f"{at} enum {value}", keyword, json.dumps({"enum": [value]}), ("kept",))
        case _:
            yield _one(schema, keyword, argument, at)


def _one(schema: Json, keyword: str, argument: Any, at: str) -> Constraint:
    alone: Json = {keyword: argument}
    match keyword:
        case "type" if schema.get("nullable"):
            alone = {"type": [argument, "null"]}
        case "additionalProperties":
            alone["properties"] = {name: {} for name in schema.get("properties", ())}
        case "minimum" | "maximum":
            exclusive = f"exclusive{keyword.capitalize()}"
            alone |= {exclusive: schema[exclusive]} if exclusive in schema else {}
    return Constraint(f"{at} {keyword}", keyword, json.dumps(alone))


def _ends(schema: Json, value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Each constraint on a value, or on a part of it, and its outcome."""
    for constraint in _constraints(schema, at):
        if end := constraint.end(value):
            yield constraint.name, end
    for inner, place in _inner(schema, at):
        for part in _parts(value, place):
            yield from _ends(inner, part, place)


def _parts(value: Any, place: str) -> Iterable[Any]:
    name = place.rpartition("/")[2]
    if isinstance(value, list) and name == "*":
        return value
    return [value[name]] if isinstance(value, dict) and name in value else []


# What was done -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A request as it was sent. `body` is empty if there was none, or none that is JSON."""

    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[Any, ...] = ()

    def values(self, one: Input) -> tuple[Any, ...]:
        """The values sent for an input: none, or one."""
        if one.place == "body":
            return self.body
        texts = {"query": self.query, "header": self.headers}.get(one.place, {})
        return (_typed(one.schema, texts[one.name]),) if one.name in texts else ()


def _typed(schema: Json, text: str) -> Any:
    if schema.get("type") in ("integer", "number", "boolean"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def exercised(operation: Described, sent: Sent, status: int) -> Iterator[str]:
    """The names of what one request and its answer exercise."""
    yield f"{operation.name} status {status}"
    if status < 300:
        yield f"{operation.name} operation"
    if status in TURNED_AWAY or status >= 500 or (status in TURNED_AWAY_BY_NAME and not operation.is_public):
        return
    for one in operation.inputs:
        values = sent.values(one)
        yield f"{operation.name} parameter {one} {'sent' if values else 'left out'}"
        for value in values:
            for name, end in _ends(one.schema, value, str(one)):
                if (end == "broken") == (status == MALFORMED):
                    yield f"{operation.name} keyword {name} {end}"


@dataclass
class Ledger:
    """The names of what the runs have exercised so far, and how often each status was answered."""

    names: set[str] = field(default_factory=set)
    statuses: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        stored = json.loads(path.read_bytes())
        return cls(set(stored["names"]), Counter(stored["statuses"]))

    def write(self, path: Path) -> None:
        path.write_text(
            json.dumps({"names": sorted(self.names), "statuses": self.statuses}), encoding="utf-8"
        )

    def note(self, operation: Described, sent: Sent, status: int) -> None:
        self.statuses[str(status)] += 1
        self.names.update(exercised(operation, sent, status))

    def add(self, other: Ledger) -> None:
        self.names |= other.names
        self.statuses += other.statuses


# What was not ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """Why no run exercises what a pattern covers. With `is_luck` a run may exercise it, by chance, or not."""

    pattern: str
    why: str
    is_luck: bool = False

    def covers(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def reasons(path: Path = GAPS) -> list[Reason]:
    """The table of what is not exercised, and why."""
    gaps = tomllib.loads(path.read_text(encoding="utf-8"))["gap"]
    return [Reason(one["what"], one["why"], one.get("luck", False)) for one in gaps]


@dataclass(frozen=True)
class Account:
    """How much of the document was exercised, and what is wrong with the reasons for the rest."""

    counted: dict[str, tuple[int, int]]
    gaps: dict[Reason, list[str]]
    unexplained: list[str]
    stale: list[str]

    @property
    def complaints(self) -> list[str]:
        return [
            *(f"not exercised, and without a reason: {name}" for name in self.unexplained),
            *(f"a reason for what is no gap: {pattern}" for pattern in self.stale),
        ]

    @property
    def summary(self) -> str:
        """`18 of 18 operations, 31 of 31 parameters, …`, in one line."""
        plural = {"status": "statuses"}
        return ", ".join(
            f"{done} of {all_} {plural.get(kind, kind + 's')}" for kind, (done, all_) in self.counted.items()
        )

    def lines(self) -> Iterator[str]:
        """The count, and each gap below its reason."""
        yield f"exercised: {self.summary}"
        for reason, names in self.gaps.items():
            yield f"  {len(names):3} not, {reason.pattern}: {reason.why}"
        yield from self.complaints


def account(document: Json, done: set[str], table: list[Reason]) -> Account:
    items = [item for operation in described(document).values() for item in operation.items()]
    gaps = [item for item in items if item not in done]
    return Account(
        counted={kind: _counted(kind, items, done) for kind in KINDS},
        gaps={reason: [gap for gap in gaps if reason.covers(gap)] for reason in table},
        unexplained=[gap for gap in gaps if not any(reason.covers(gap) for reason in table)],
        stale=[reason.pattern for reason in table if _is_stale(reason, items, done)],
    )


def _counted(kind: str, items: list[str], done: set[str]) -> tuple[int, int]:
    of_kind = [item for item in items if item.split()[1] == kind]
    return sum(item in done for item in of_kind), len(of_kind)


def _is_stale(reason: Reason, items: list[str], done: set[str]) -> bool:
    """Whether it covers nothing, or something that was exercised."""
    covered = [item for item in items if reason.covers(item)]
    return not covered or (not reason.is_luck and any(item in done for item in covered))


def account_of(ledger: Ledger) -> Account:
    """The account of a ledger, by our document and our table of reasons."""
    return account(load(), ledger.names, reasons())
