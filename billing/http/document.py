"""The OpenAPI document: loaded strictly, listed by operation, served as bytes made once."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")

_PACKAGE = Path(__file__).resolve().parents[1]
# A checkout keeps the contract beside the package; the wheel carries it inside.
_PLACES = (_PACKAGE.parent / "openapi/billing.yaml", _PACKAGE / "openapi/billing.yaml")


class DocumentError(Exception):
    """The OpenAPI document is invalid, or ambiguous."""


# Loading -----------------------------------------------------------------------------------------


def load(path: Path | None = None) -> dict[str, Any]:
    """The document as a dict, `$ref`s kept; `DocumentError` where Connexion would silently pick a meaning."""
    path = path or next((place for place in _PLACES if place.exists()), _PLACES[0])
    document = _parse(path)
    _refuse_duplicate_operation_ids(document)
    _refuse_shadowed_paths(list(document.get("paths", {})))
    return document


def _parse(path: Path) -> dict[str, Any]:
    try:
        # `_Loader` is a CSafeLoader.
        document = yaml.load(path.read_bytes(), _Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise DocumentError(f"{path.name} is not good YAML: {error}") from error
    if not isinstance(document, dict):
        raise DocumentError(f"{path.name} holds no mapping")
    return document


class _Loader(yaml.CSafeLoader):
    """YAML as OpenAPI allows it (3.0.3, Format): JSON's types only, and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise DocumentError(f"Line {_line(key)}: the key {key.value!r} is no text; quote it")
            if key.value in seen:
                raise DocumentError(f"Line {_line(key)}: the key {key.value!r} stands twice in one mapping")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


# YAML 1.2's plain scalars, not 1.1's: `no`, `on`, 1:30 and 2026-01-01 are text, as other tools read them.
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", "null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)(?=[.eE])(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", list("-0123456789")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})\\Z"), _first)


def _refuse_duplicate_operation_ids(document: dict[str, Any]) -> None:
    # Connexion keeps the last of them, with the security of the first.
    counted = Counter(operation.operation_id for operation in operations(document))
    twice = sorted(name for name, times in counted.items() if times > 1)
    if twice:
        raise DocumentError(f"These operationIds stand more than once: {', '.join(twice)}")


def _refuse_shadowed_paths(paths: list[str]) -> None:
    # Connexion's router takes the first match, not the most specific one.
    for place, path in enumerate(paths):
        for earlier in paths[:place]:
            if _template(earlier).fullmatch(path):
                raise DocumentError(f"{path} can never be reached: {earlier} stands before it and matches it")


def _template(path: str) -> re.Pattern[str]:
    literals = re.split(r"\{[^/{}]+\}", path)
    return re.compile("[^/]+".join(map(re.escape, literals)))


# Operations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One method of one path, as our own code needs it.

    `roles` are those of which a user must have one; without any, no user is admitted. `schemes` are the names
    of the security schemes offered; without any, the operation is public. `query` holds its query parameters,
    resolved; an `open_query` accepts others too. `request` is the JSON schema of the body as in the document,
    `None` where there is no body. `no_head` marks a GET with side effects: its path has no HEAD. `headers`
    holds its header parameters.
    """

    operation_id: str
    method: str
    path: str
    tags: tuple[str, ...]
    roles: tuple[str, ...]
    schemes: tuple[str, ...]
    query: tuple[dict[str, Any], ...]
    open_query: bool
    request: dict[str, Any] | None
    body_required: bool
    no_head: bool = False
    headers: tuple[dict[str, Any], ...] = ()


def operations(document: dict[str, Any]) -> tuple[Operation, ...]:
    """Every operation in the document's order."""
    return tuple(_operations(document))


def resolve(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The node itself, or what its local `$ref` points to."""
    while "$ref" in node:
        node = _find(document, node["$ref"])
    return node


def _find(document: dict[str, Any], reference: str) -> dict[str, Any]:
    found = document
    try:
        for member in reference.removeprefix("#/").split("/"):
            found = found[member.replace("~1", "/").replace("~0", "~")]
    except KeyError as error:
        raise DocumentError(f"{reference} points to nothing") from error
    return found


def _operations(document: dict[str, Any]) -> Iterator[Operation]:
    for path, item in document.get("paths", {}).items():
        for method, spec in item.items():
            if method in METHODS:
                yield _operation(document, method, path, spec)


def _operation(document: dict[str, Any], method: str, path: str, spec: dict[str, Any]) -> Operation:
    if "operationId" not in spec:
        raise DocumentError(f"{method.upper()} {path} has no operationId")
    body = resolve(document, spec.get("requestBody", {}))
    parameters = [resolve(document, parameter) for parameter in spec.get("parameters", ())]
    security = spec.get("security", document.get("security", []))
    return Operation(
        operation_id=spec["operationId"],
        method=method.upper(),
        path=path,
        tags=tuple(spec.get("tags", ())),
        roles=tuple(spec.get("x-roles", ())),
        schemes=tuple(dict.fromkeys(name for alternative in security for name in alternative)),
        query=tuple(parameter for parameter in parameters if parameter["in"] == "query"),
        open_query=spec.get("x-open-query", False),
        request=body.get("content", {}).get("application/json", {}).get("schema"),
        body_required=body.get("required", False),
        no_head=spec.get("x-no-head", False),
        headers=tuple(parameter for parameter in parameters if parameter["in"] == "header"),
    )


# Serving -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Representation:
    """Bytes made once, with their media type and entity tag."""

    body: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, body: bytes, media_type: str) -> Representation:
        """With a strong entity tag made from the bytes."""
        return cls(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


@dataclass(frozen=True)
class Served:
    """The document as clients fetch it, and what our own pages show of it."""

    public_base_url: str
    operations: tuple[Operation, ...]
    json: Representation
    yaml: Representation


def served(document: dict[str, Any], public_base_url: str) -> Served:
    """The document with this server first in `servers`, once as JSON and once as YAML.

    Connexion's own copy is dereferenced, so that SDK generators lose the models' names, and is rebuilt on
    every request, on the event loop.
    """
    public_base_url = public_base_url.rstrip("/")
    own = {**document, "servers": _servers(document, public_base_url)}
    return Served(
        public_base_url=public_base_url,
        operations=operations(document),
        json=Representation.of(orjson.dumps(own), "application/json"),
        yaml=Representation.of(_dump(own), "application/yaml"),
    )


def _servers(document: dict[str, Any], public_base_url: str) -> list[dict[str, Any]]:
    listed = document.get("servers", [])
    others = [server for server in listed if server["url"].rstrip("/") != public_base_url]
    own = next((server for server in listed if server not in others), {"description": "This server"})
    return [{**own, "url": public_base_url}, *others]


def _dump(document: dict[str, Any]) -> bytes:
    return yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, encoding="utf-8"
    )


class _Dumper(yaml.CSafeDumper):
    """YAML for people: paragraphs as blocks, and no anchors where one object occurs twice."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
