"""Cross-origin requests, as a browser makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.types import Receive, Scope, Send

from billing.http.cors import Cors
from billing.http.edge import Edge
from tests.rawhttp import Address, Answer, exchange, request, serving

ALLOWED = "https://app.acme.example"
OTHER_ORIGINS = [
    "https://evil.example",
    "http://app.acme.example",
    "https://app.acme.example.evil.example",
    "https://APP.acme.example",
    "https://app.acme.example:8443",
    "null",
    "*",
]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/broken/":
        raise RuntimeError
    status = 404 if scope["path"] == "/missing/" else 200
    headers = [(b"content-length", b"0"), (b"vary", b"Accept")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body"})


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with serving(Edge(Cors(app, [ALLOWED, "http://localhost:3000"])), lifespan="off") as address:
        yield address


def preflight(address: Address, origin: str, *headers: str, method: str = "POST") -> Answer:
    sent = [f"Origin: {origin}", f"Access-Control-Request-Method: {method}", *headers]
    return exchange(address, request("OPTIONS", "/", *sent))


def names(value: str | None) -> set[str]:
    return {name.strip().lower() for name in (value or "").split(",")}


def cors_headers(answer: Answer) -> list[str]:
    return [name for name in answer.headers if name.lower().startswith("access-control-")]


def varies(answer: Answer) -> set[str]:
    return {name for value in answer.headers.get_all("vary", []) for name in names(value)}


def test_a_preflight_from_an_allowed_origin_is_granted(address: Address) -> None:
    answer = preflight(address, ALLOWED, "Access-Control-Request-Headers: authorization,content-type")
    assert (answer.status, answer.body) == (204, b"")
    assert answer["access-control-allow-origin"] == ALLOWED
    assert answer["access-control-allow-credentials"] == "true"
    assert names(answer["access-control-allow-methods"]) == {"get", "post", "delete"}
    assert names(answer["access-control-allow-headers"]) == {
        "authorization",
        "x-api-key",
        "content-type",
        "idempotency-key",
        "x-request-id",
    }
    assert answer["access-control-max-age"] == "600"
    assert "origin" in varies(answer)
    assert answer["x-request-id"]


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_a_preflight_from_another_origin_allows_nothing(address: Address, origin: str) -> None:
    answer = preflight(address, origin)
    assert (answer.status, cors_headers(answer), varies(answer)) == (204, [], {"origin"})


def test_a_preflight_does_not_allow_an_unsupported_method(address: Address) -> None:
    assert "put" not in names(preflight(address, ALLOWED, method="PUT")["access-control-allow-methods"])


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/missing/", 404), ("/broken/", 500)])
def test_responses_and_errors_to_an_allowed_origin_have_cors_headers(
    address: Address, path: str, status: int
) -> None:
    answer = exchange(address, request("GET", path, f"Origin: {ALLOWED}"))
    assert answer.status == status
    assert answer["access-control-allow-origin"] == ALLOWED
    assert answer["access-control-allow-credentials"] == "true"
    assert names(answer["access-control-expose-headers"]) == {
        "x-request-id",
        "x-key-expires-at",
        "idempotent-replayed",
        "retry-after",
        "ratelimit",
        "ratelimit-policy",
    }
    assert "origin" in varies(answer)


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_responses_to_another_origin_have_no_cors_headers(address: Address, origin: str) -> None:
    answer = exchange(address, request("GET", "/", f"Origin: {origin}"))
    assert (answer.status, cors_headers(answer), varies(answer)) == (200, [], {"origin", "accept"})


def test_a_response_without_an_origin_still_varies_by_origin(address: Address) -> None:
    answer = exchange(address, request())
    assert (cors_headers(answer), varies(answer)) == ([], {"origin", "accept"})


@pytest.mark.parametrize("headers", [[], [f"Origin: {ALLOWED}"], ["Access-Control-Request-Method: POST"]])
def test_an_options_request_that_is_no_preflight_reaches_the_application(
    address: Address, headers: list[str]
) -> None:
    assert exchange(address, request("OPTIONS", "/missing/", *headers)).status == 404


def test_only_options_is_a_preflight(address: Address) -> None:
    headers = [f"Origin: {ALLOWED}", "Access-Control-Request-Method: POST"]
    assert exchange(address, request("GET", "/missing/", *headers)).status == 404


def test_a_wildcard_origin_is_refused() -> None:
    with pytest.raises(ValueError, match="by name"):
        Cors(app, ["*"])
