"""What every other test relies on: an answer that the document does not allow is detected."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.answers import DOCUMENT, PROBLEM, Undocumented, check
from tests.conftest import API

HEADERS = {"X-Request-Id": "request-1", "Cache-Control": "no-store"}
USER_AND_TENANT = DOCUMENT["paths"][f"{API}/me/"]["get"]["responses"]["200"]["content"]["application/json"]
ME = USER_AND_TENANT["example"]
CHALLENGE = {"WWW-Authenticate": "Bearer"}
NO_CREDENTIALS = DOCUMENT["components"]["responses"]["Unauthorized"]["content"][PROBLEM]["example"]


def answer(
    body: Any,
    *,
    method: str = "GET",
    path: str = "/me/",
    status: int = 200,
    media_type: str = "application/json",
    headers: dict[str, str] = HEADERS,
) -> httpx.Response:
    request = httpx.Request(method, f"http://testserver{API}{path}")
    return httpx.Response(status, json=body, headers={"Content-Type": media_type, **headers}, request=request)


def problem(status: int, code: str, *, headers: dict[str, str] = HEADERS, **more: Any) -> httpx.Response:
    body = {**NO_CREDENTIALS, "status": status, "code": code}
    return answer(body, status=status, media_type=PROBLEM, headers=headers, **more)


def without(members: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in members.items() if other != name}


@pytest.mark.parametrize(
    "response",
    [
        answer(ME),
        problem(401, "credentials-missing", headers={**HEADERS, **CHALLENGE}),
        problem(404, "not-found", path="/nowhere/"),
        # Any request can meet these; a GET with a body of another media type, for one.
        problem(405, "method-not-allowed", method="PUT"),
        problem(415, "unsupported-media-type"),
    ],
)
def test_documented_answers_pass(response: httpx.Response) -> None:
    check(response)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(answer({**ME, "extra": 1}), id="a surplus member"),
        pytest.param(answer({**ME, "user": {**ME["user"], "extra": 1}}), id="a nested surplus member"),
        pytest.param(answer(without(ME, "tenant")), id="a missing member"),
        pytest.param(answer({**ME, "user": without(ME["user"], "role")}), id="a nested missing member"),
        pytest.param(answer({**ME, "user": {**ME["user"], "role": "king"}}), id="a value outside its enum"),
        pytest.param(answer(ME, status=201), id="another status"),
        pytest.param(problem(409, "email-taken"), id="an error of another operation"),
        pytest.param(answer(ME, media_type="text/plain"), id="another media type"),
        pytest.param(answer(ME, status=405), id="an error that is not problem+json"),
        pytest.param(answer(ME, headers=without(HEADERS, "X-Request-Id")), id="no X-Request-Id"),
        pytest.param(answer(ME, headers=without(HEADERS, "Cache-Control")), id="no Cache-Control"),
        pytest.param(problem(401, "credentials-missing"), id="no challenge"),
    ],
)
def test_undocumented_answers_are_detected(response: httpx.Response) -> None:
    with pytest.raises(Undocumented):
        check(response)
