"""Problem details: one shape for every error, with nothing in it that the client sent."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import orjson
import pytest

from billing import errors
from billing.errors import BillingError, Fault, catalogue
from billing.http import problems
from billing.http.problems import Rendered, render, status_of

LEAVES = sorted(catalogue(), key=lambda error: error.code())


@pytest.fixture(autouse=True)
def base_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "BASE_URL", "https://billing.example")


def rendered(error: BillingError) -> tuple[Rendered, dict[str, Any]]:
    answer = render(error, request_id="request-1")
    return answer, orjson.loads(answer.body)


def header(answer: Rendered, name: bytes) -> bytes | None:
    values = [value for key, value in answer.headers if key == name]
    assert len(values) < 2
    return values[0] if values else None


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: error.code())
def test_every_error_renders_as_a_complete_problem(error: type[BillingError]) -> None:
    answer, body = rendered(error())
    instance = body.pop("instance")
    assert UUID(instance.removeprefix("urn:uuid:")).version == 7
    assert body.pop("errors", None) == ([] if answer.status == 400 else None)
    assert body == {
        "type": f"https://billing.example/problems/{error.code()}",
        "title": error.title(),
        "status": status_of(error),
        "detail": error().detail,
        "code": error.code(),
        "request_id": "request-1",
    }
    assert answer.status == status_of(error)
    assert header(answer, b"content-type") == b"application/problem+json"
    assert header(answer, b"cache-control") == b"no-store"
    assert header(answer, b"content-length") == str(len(answer.body)).encode()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.StateUsed, 400),
        (errors.KeyExpired, 401),
        (errors.WrongPassword, 403),
        (errors.NotFound, 404),
        (errors.EmailTaken, 409),
        (errors.PasswordTooWeak, 422),
        (errors.StripeUnavailable, 502),
        (errors.StripeNotConfigured, 503),
    ],
)
def test_an_error_has_the_status_of_its_family(error: type[BillingError], status: int) -> None:
    assert status_of(error) == status


def test_each_problem_has_its_own_instance() -> None:
    assert rendered(errors.NotFound())[1]["instance"] != rendered(errors.NotFound())[1]["instance"]


def test_faults_are_listed_by_pointer() -> None:
    faults = [Fault("/email", "It is required."), Fault("", "It has a member too many.")]
    _, body = rendered(errors.InvalidRequest(faults=faults))
    assert body["errors"] == [
        {"pointer": "/email", "message": "It is required."},
        {"pointer": "", "message": "It has a member too many."},
    ]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: error.code())
def test_a_challenge_is_sent_on_401_and_for_insufficient_scope(error: type[BillingError]) -> None:
    challenge = header(rendered(error())[0], b"www-authenticate")
    if error in (errors.CredentialsMissing, errors.InvalidCredentials):
        assert challenge == b'Bearer realm="billing"'
    elif status_of(error) == 401:
        assert challenge == b'Bearer realm="billing", error="invalid_token"'
    elif error is errors.InsufficientScope:
        assert challenge == b'Bearer realm="billing", error="insufficient_scope"'
    else:
        assert challenge is None


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.Overloaded(), b"2"),
        (errors.RateLimited(), b"1"),
        (errors.RateLimited(retry_after_seconds=17), b"17"),
        (errors.RateLimited(retry_after_seconds=0), b"0"),
        (errors.DatabaseUnavailable(), b"5"),
        (errors.StripeNotConfigured(), None),
        (errors.NotFound(), None),
    ],
)
def test_retry_after_only_where_waiting_helps(error: BillingError, seconds: bytes | None) -> None:
    assert header(rendered(error)[0], b"retry-after") == seconds


def test_the_cause_of_an_error_is_not_disclosed() -> None:
    error = errors.DatabaseUnavailable()
    error.__cause__ = RuntimeError("password=hunter2")
    assert b"hunter2" not in rendered(error)[0].body


def test_configure_sets_the_base_url_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    problems.configure("https://other.example")
    assert rendered(errors.NotFound())[1]["type"] == "https://other.example/problems/not-found"
