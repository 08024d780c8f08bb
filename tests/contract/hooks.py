"""What a Schemathesis run is told beside `schemathesis.toml`: who calls, good values, checks of our own.

`st run` loads it in a process of its own, and it reads `BILLING_FUZZ_URL` and `BILLING_FUZZ_AS`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from uuid import uuid4

import requests
import schemathesis
from schemathesis import AuthContext, Case, CheckContext, HookContext, Response

from tests.contract.callers import CALLERS

URL = os.environ["BILLING_FUZZ_URL"]
API = f"{URL}/api/v1/auth/tenants"
CALLER = CALLERS[os.environ["BILLING_FUZZ_AS"]]
# As in the document's examples, so that they are right and not only well-formed.
PASSWORD = "SecurePass123!"
STRONG_PASSWORD = "correct horse battery staple"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
TELLING_LENGTH = 8

Json = dict[str, Any]


# Who calls ---------------------------------------------------------------------------------------


def register() -> Json:
    """A new tenant: what `register_tenant` answers."""
    body = {"company_name": "Acme Inc.", "email": f"{uuid4().hex}@acme.example", "password": PASSWORD}
    answer = requests.post(f"{API}/register/", json=body, timeout=10)
    answer.raise_for_status()
    registered: Json = answer.json()
    return registered


class FreshTenant:
    """The credentials of a tenant of the run's own, and after a 401 those of another.

    A changed password ends the session that the run uses. It goes on as somebody new, whose password is
    `PASSWORD` again, so that nothing needs to be left out.
    """

    def get(self, _case: Case, _context: AuthContext) -> dict[str, str]:
        return CALLER.credentials(register())

    def set(self, case: Case, data: dict[str, str], _context: AuthContext) -> None:
        case.headers = {**(case.headers or {}), **data}


if CALLER.scheme is not None:
    schemathesis.auth(refresh_interval=600, retry_on=[401])(FreshTenant)


# Good values -------------------------------------------------------------------------------------


@schemathesis.hook
def before_call(_context: HookContext, case: Case, _kwargs: Json) -> None:
    """Make a body that is only well-formed a right one, in half of the cases.

    Nobody guesses a password by chance, and hardly a strong one: the fuzzer would see refusals alone. Which
    half is a matter of the body, so that a case can be repeated.
    """
    corrected = CORRECTED.get(case.operation.definition.raw["operationId"])
    if corrected and is_valid(case) and zlib.crc32(repr(case.body).encode()) % 2:
        case.body = corrected(case.body)


def is_valid(case: Case) -> bool:
    """Whether the case was made to match the document."""
    return case.meta is not None and case.meta.generation.mode.is_positive


def as_somebody_new(body: Json) -> Json:
    others = {name: value for name, value in body.items() if name != "webhook_url"}
    return {**others, "email": f"{uuid4().hex}@acme.example", "password": STRONG_PASSWORD}


def as_somebody_known(_body: Json) -> Json:
    return {"email": known_email(), "password": PASSWORD}


def with_a_good_token(_body: Json) -> Json:
    answer = requests.post(f"{API}/login/", json=as_somebody_known({}), timeout=10)
    return {"refresh": answer.json()["tokens"]["refresh"]}


def with_the_right_password(_body: Json) -> Json:
    return {"old_password": PASSWORD, "new_password": STRONG_PASSWORD}


CORRECTED = {
    "register_tenant": as_somebody_new,
    "log_in": as_somebody_known,
    "refresh_tokens": with_a_good_token,
    "change_password": with_the_right_password,
}


@cache
def known_email() -> str:
    """The address of a user whose password nothing in the run changes."""
    email: str = register()["user"]["email"]
    return email


# Checks ------------------------------------------------------------------------------------------


@schemathesis.check
def every_answer_is_named(_context: CheckContext, response: Response, _case: Case) -> None:
    names = response.headers.get("x-request-id", [])
    assert len(names) == 1 and REQUEST_ID.fullmatch(names[0]), f"X-Request-Id: {names}"


@schemathesis.check
def every_error_is_a_problem(_context: CheckContext, response: Response, _case: Case) -> None:
    """Also where the document lists no status, as for 404 and 405, which the built-in checks pass over."""
    if is_error(response):
        assert response.headers.get("content-type") == ["application/problem+json"]
        said = json.loads(response.content)
        assert said["status"] == response.status_code
        assert [said["request_id"]] == response.headers.get("x-request-id")


@schemathesis.check
def no_error_repeats_what_was_sent(_context: CheckContext, response: Response, case: Case) -> None:
    if is_error(response):
        said = " ".join(texts_in(json.loads(response.content)))
        assert not [text for text in texts_in([case.body, case.query]) if is_telling(text) and text in said]


@schemathesis.check
def credentials_open_what_the_document_says(_context: CheckContext, response: Response, case: Case) -> None:
    schemes = {name for alternative in case.operation.definition.raw["security"] for name in alternative}
    assert response.status_code >= 400 or not schemes or CALLER.scheme in schemes


def is_error(response: Response) -> bool:
    """Whether the answer is an error with a body."""
    return response.status_code >= 400 and response.request.method != "HEAD"


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        yield from texts_in([*value.keys(), *value.values()])


def is_telling(text: str) -> bool:
    """Whether only the request can have brought the text: it is neither short nor a name in the document."""
    return len(text) >= TELLING_LENGTH and text not in names_in_the_document()


@cache
def names_in_the_document() -> frozenset[str]:
    """Members and parameters: a pointer may say them."""
    components = requests.get(f"{URL}/openapi.json", timeout=10).json()["components"]
    members = [name for schema in components["schemas"].values() for name in schema.get("properties", ())]
    return frozenset([*members, *(parameter["name"] for parameter in components["parameters"].values())])
