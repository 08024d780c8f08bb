"""Checks answers against the document: status, media type, headers and body."""

from __future__ import annotations

from typing import Any

import httpx
from jsonschema_rs import Draft202012Validator

from billing.http.document import load, resolve
from billing.http.validation import as_json_schema

DOCUMENT = load()
PROBLEM = "application/problem+json"
CONFIG = "/api/v1/auth/tenants/webhooks/config/"
# Any request can get these: the document says so once, and operations need not list them.
IMPLIED = {404, 405, 408, 415, 431}


class Undocumented(AssertionError):
    """The server gave an answer that its document does not describe."""


def check(response: httpx.Response) -> None:
    """Raises `Undocumented`, unless the document describes this answer."""
    path, method = response.request.url.path, response.request.method.lower()
    operation = DOCUMENT["paths"].get(path, {}).get("get" if method == "head" else method)
    if "x-request-id" not in response.headers:
        raise Undocumented(f"{method} {path} answers without X-Request-Id")
    if operation is None:
        _check_problem(response)
        return
    if response.headers.get("cache-control") != "no-store":
        raise Undocumented(f"{method} {path} answers what a cache may keep")
    said = operation["responses"].get(str(response.status_code))
    if said is None and response.status_code in IMPLIED:
        _check_problem(response)
        return
    if said is None:
        raise Undocumented(f"{method} {path} does not say {response.status_code}: {response.text}")
    if method != "head":
        _check_content(response, resolve(DOCUMENT, said))
    _check_headers(response, resolve(DOCUMENT, said))


def _check_problem(response: httpx.Response) -> None:
    if response.status_code >= 400 and response.request.method != "HEAD":
        _validate({"$ref": "#/components/schemas/Problem"}, response)
        if response.headers["content-type"] != PROBLEM:
            raise Undocumented(f"an error in {response.headers['content-type']}")


def _check_content(response: httpx.Response, said: dict[str, Any]) -> None:
    content = said.get("content", {})
    media_type = response.headers.get("content-type", "").partition(";")[0]
    if bool(content) != bool(response.content) or (content and media_type not in content):
        raise Undocumented(f"{response.status_code} does not say {media_type or 'no body'}")
    if media_type.endswith("json"):
        _validate(content[media_type]["schema"], response)


def _check_headers(response: httpx.Response, said: dict[str, Any]) -> None:
    for name, header in said.get("headers", {}).items():
        header = resolve(DOCUMENT, header)
        if header.get("required", False) and name.lower() not in response.headers:
            raise Undocumented(f"{response.status_code} lacks {name}")


def _validate(schema: dict[str, Any], response: httpx.Response) -> None:
    whole = {**closed(as_json_schema(schema)), "components": COMPONENTS}
    for error in Draft202012Validator(whole, validate_formats=True).iter_errors(response.json()):
        raise Undocumented(f"{response.request.method} {response.request.url.path}: {error}")


def check_event(event: dict[str, Any]) -> None:
    """Raises `Undocumented`, unless the body matches the document's callback for events of that type."""
    operation = DOCUMENT["paths"][CONFIG]["post"]["callbacks"][event["type"]]["{$request.body#/webhook_url}"][
        "post"
    ]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    whole = {**closed(as_json_schema(schema)), "components": COMPONENTS}
    for error in Draft202012Validator(whole, validate_formats=True).iter_errors(event):
        raise Undocumented(f"{event['type']}: {error}")


def closed(node: Any) -> Any:
    """The schema, refusing members that it does not list.

    Clients must ignore members that are new to them, so schemas of answers are open in the document; but a
    member that the current document does not list is a mistake of the current server.
    """
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {name: closed(value) for name, value in node.items()}
    return {"additionalProperties": False, **inner} if "properties" in inner else inner


COMPONENTS = {"schemas": closed(as_json_schema(DOCUMENT["components"]["schemas"]))}
