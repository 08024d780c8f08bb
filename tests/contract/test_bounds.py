"""Bounds of lengths and numbers: those of the document are promises, and the server keeps each exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import API, Account

Json = dict[str, Any]
Rows = list[tuple[str, Callable[[int], Json], int | None, int | None]]
"""A path, how to make a body of a given size, the least allowed, and the most."""
# Not easy to guess, at whatever length it is cut.
STRONG = "correct horse battery staple " * 10


def registration(**more: Any) -> Json:
    return {"company_name": "Acme Inc.", "email": "ada@acme.example", "password": "SecurePass123!", **more}


def keys(**more: Any) -> Json:
    return {"key_type": "test", "confirm": True, **more}


def webhook(**more: Any) -> Json:
    return {"webhook_url": "https://hooks.acme.example/billing", **more}


def email_of(length: int) -> str:
    """An address of that many characters, no part of it longer than that part may be."""
    labels = ("b" * 60 + ".") * 4
    name, end = "a" * 64 + "@", ".example"
    return name + labels[: length - len(name) - len(end)] + end


def url_of(length: int) -> str:
    start = "https://hooks.acme.example/"
    return start + "a" * (length - len(start))


PUBLIC: Rows = [
    ("/register/", lambda n: registration(company_name="a" * n), 1, 255),
    ("/register/", lambda n: registration(password=STRONG[:n]), 12, 128),
    ("/register/", lambda n: registration(email=email_of(n)), None, 254),
    ("/register/", lambda n: registration(first_name="a" * n), None, 150),
    ("/register/", lambda n: registration(last_name="a" * n), None, 150),
]
OWNERS: Rows = [
    ("/change-password/", lambda n: {"old_password": "SecurePass123!", "new_password": STRONG[:n]}, 12, 128),
    ("/api-keys/regenerate/", lambda n: keys(grace_period_seconds=n), 0, 604800),
    ("/api-keys/revoke/", lambda n: keys(reason="a" * n), None, 500),
    ("/webhooks/config/", lambda n: {"webhook_url": url_of(n)}, None, 2048),
    ("/webhooks/config/", lambda n: webhook(secret_grace_seconds=n), 0, 604800),
]


def edges(rows: Rows, *, beyond: int) -> list[tuple[str, Json]]:
    """Bodies at each bound, or beyond it."""
    lower = [(path, body(least - beyond)) for path, body, least, _ in rows if least is not None]
    return lower + [(path, body(most + beyond)) for path, body, _, most in rows if most is not None]


@pytest.mark.parametrize(("path", "body"), edges(PUBLIC, beyond=0))
def test_a_registration_at_a_bound_is_accepted(client: TestClient, path: str, body: Json) -> None:
    assert client.post(f"{API}{path}", json=body).status_code == 201


@pytest.mark.parametrize(("path", "body"), edges(PUBLIC, beyond=1))
def test_a_registration_beyond_a_bound_is_400(client: TestClient, path: str, body: Json) -> None:
    assert client.post(f"{API}{path}", json=body).status_code == 400


@pytest.mark.parametrize(("path", "body"), edges(OWNERS, beyond=0))
def test_an_owners_request_at_a_bound_is_accepted(acme: Account, path: str, body: Json) -> None:
    assert acme.post(path, body).status_code == 200


@pytest.mark.parametrize(("path", "body"), edges(OWNERS, beyond=1))
def test_an_owners_request_beyond_a_bound_is_400(acme: Account, path: str, body: Json) -> None:
    assert acme.post(path, body).status_code == 400
