"""The requests to every server: the same four operations, as raw requests that wrk sends in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from benchmarks.requests.population import Population

BASE = "/api/v1/auth/tenants"
# Six fields, of which the fourth and the last are wrong: no server gets as far as the password or the database.
REFUSED = {
    "company_name": "Acme Inc.",
    "email": "ada@acme.example",
    "password": "SecurePass123!",
    "first_name": "A" * 151,
    "last_name": "Example",
    "domain": "-",
}
# Registrations are limited by address: with so many, none exceeds its limit before the end.
ADDRESSES = [IPv4Address("10.0.0.0") + n for n in range(60_000)]
WEBHOOK_URLS = ("https://hooks.acme.example/billing", "https://hooks.acme.example/other")
EVENT_TYPES = ["api_key.regenerated", "api_key.revoked"]


@dataclass(frozen=True)
class Request:
    """One request, before it is serialised."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: object = None

    def raw(self) -> str:
        body = "" if self.body is None else json.dumps(self.body)
        headers = {"Host": "127.0.0.1", "Accept": "application/json", **self.headers}
        if body:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [
            f"{self.method} {self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", body])


@dataclass(frozen=True)
class Case:
    """An operation, the statuses that are right for it, and its requests for given tokens."""

    name: str
    says: str
    statuses: tuple[int, ...]
    requests: Callable[[Population, list[str]], list[Request]]


def _verify(population: Population, _tokens: list[str]) -> list[Request]:
    return [Request("GET", f"{BASE}/verify/", {"X-API-Key": member.key}) for member in population.members]


def _me(_population: Population, tokens: list[str]) -> list[Request]:
    return [Request("GET", f"{BASE}/me/", _bearer(token)) for token in tokens]


def _register(_population: Population, _tokens: list[str]) -> list[Request]:
    return [
        Request("POST", f"{BASE}/register/", {"X-Forwarded-For": address}, REFUSED)
        for address in map(str, ADDRESSES)
    ]


def _configure(_population: Population, tokens: list[str]) -> list[Request]:
    # Each tenant's URL changes every time, so that there is something to store.
    bodies = [{"webhook_url": url, "event_types": EVENT_TYPES} for url in reversed(WEBHOOK_URLS)]
    return [
        Request("POST", f"{BASE}/webhooks/config/", _bearer(token), body)
        for body in bodies
        for token in tokens
    ]


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


CASES = {
    case.name: case
    for case in (
        Case("verify", "an API key to its tenant", (200,), _verify),
        Case("me", "a JWT to its user and tenant", (200,), _me),
        Case(
            "refused",
            "a POST of six fields, two of them wrong: validated, no database",
            (400, 422),
            _register,
        ),
        Case("configure", "a POST that writes: where a tenant's webhooks go", (200,), _configure),
    )
}
