"""What a Schemathesis run is told beside `schemathesis.toml`: who calls, good values, and checks of our own.

Loaded by `st run` in a process of its own, which reads `BILLING_FUZZ_URL` and `BILLING_FUZZ_AS`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from uuid import uuid4

import requests
import schemathesis
from schemathesis import AuthContext, Case, CheckContext, HookContext, Response
from schemathesis.core.failures import Failure

from tests.contract.callers import CALLERS

API = f"{os.environ['BILLING_FUZZ_URL']}/api/v1/auth/tenants"
CALLER = CALLERS[os.environ["BILLING_FUZZ_AS"]]
# The one in the document's examples, so that they work: the old password of the tenant of the run too.
PASSWORD = "SecurePass123!"
STRONG = "correct horse battery staple"
PROBLEM = "application/problem+json"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
LONG_ENOUGH_TO_BE_NO_ACCIDENT = 8

Body = dict[str, Any]


# Who calls ---------------------------------------------------------------------------------------


def register() -> Body:
    """A new tenant: what `register_tenant` answers."""
    body = {"company_name": "Acme Inc.", "email": f"{uuid4().hex}@acme.example", "password": PASSWORD}
    answer = requests.post(f"{API}/register/", json=body, timeout=10)
    answer.raise_for_status()
    registered: Body = answer.json()
    return registered


class FreshTenant:
    """The credentials of a tenant of its own, and of another one after a 401.

    A changed password ends the session that the run uses. So the run goes on as somebody new, whose
    password is `PASSWORD` again; nothing has to be left out.
    """

    def get(self, _case: Case, _context: AuthContext) -> dict[str, str]:
        return CALLER.credentials(register())

    def set(self, case: Case, data: dict[str, str], _context: AuthContext) -> None:
        case.headers = {**(case.headers or {}), **data}


if CALLER.has_credentials:
    schemathesis.auth(refresh_interval=600, retry_on=[401])(FreshTenant)


# Good values -------------------------------------------------------------------------------------


def season(operation_id: str) -> Callable[[Callable[[Body], Body]], None]:
    """Register what turns a body that is only well-formed into one that is right, for half of them.

    By chance nobody guesses a password, and hardly a strong one: without this the fuzzer would see refusals
    only. Which half is a matter of the body itself, so that a case can be repeated.
    """

    def register_hook(seasoned: Callable[[Body], Body]) -> None:
        @schemathesis.hook("before_call").apply_to(operation_id=operation_id)
        def before_call(_context: HookContext, case: Case, _kwargs: dict[str, Any]) -> None:
            if is_valid(case) and isinstance(case.body, dict) and zlib.crc32(repr(case.body).encode()) % 2:
                case.body = seasoned(case.body)

    return register_hook


def is_valid(case: Case) -> bool:
    """Whether the case is meant to be accepted."""
    return case.meta is not None and case.meta.generation.mode.is_positive


@season("register_tenant")
def _somebody_new(body: Body) -> Body:
    others = {name: value for name, value in body.items() if name != "webhook_url"}
    return {**others, "email": f"{uuid4().hex}@acme.example", "password": STRONG}


@season("log_in")
def _somebody_known(_body: Body) -> Body:
    return {"email": known_email(), "password": PASSWORD}


@season("refresh_tokens")
def _good_refresh_token(_body: Body) -> Body:
    answer = requests.post(f"{API}/login/", json=_somebody_known({}), timeout=10)
    return {"refresh": answer.json()["tokens"]["refresh"]}


@season("change_password")
def _right_old_password(_body: Body) -> Body:
    return {"old_password": PASSWORD, "new_password": STRONG}


@cache
def known_email() -> str:
    """The address of a user whom nothing in the run touches."""
    email: str = register()["user"]["email"]
    return email


# Our own checks ----------------------------------------------------------------------------------


@schemathesis.check
def every_answer_is_named(_ctx: CheckContext, response: Response, _case: Case) -> None:
    """Whatever is asked and answered bears one safe `X-Request-Id`."""
    names = response.headers.get("x-request-id", [])
    if len(names) != 1 or not REQUEST_ID.fullmatch(names[0]):
        raise Failure(operation=_case.operation.label, title="X-Request-Id is missing or odd", message=str(names))


@schemathesis.check
def every_error_is_a_problem(_ctx: CheckContext, response: Response, case: Case) -> None:
    """Undocumented statuses too, such as 404 and 405, which the built-in checks pass over."""
    if response.status_code < 400 or response.request.method == "HEAD":
        return
    media_types = response.headers.get("content-type", [])
    if media_types != [PROBLEM]:
        raise Failure(operation=case.operation.label, title="An error is no problem", message=str(media_types))
    problem = json.loads(response.content)
    if [problem["request_id"]] != response.headers["x-request-id"]:
        raise Failure(operation=case.operation.label, title="A problem bears another id", message=str(problem))


@schemathesis.check
def no_error_repeats_what_was_sent(_ctx: CheckContext, response: Response, case: Case) -> None:
    """Passwords, tokens and other values must not come back in an error."""
    if response.status_code < 400:
        return
    said = " ".join(texts_in(json.loads(response.content)))
    repeated = [text for text in texts_in([case.body, case.query]) if is_telling(text) and text in said]
    if repeated:
        raise Failure(operation=case.operation.label, title="An error repeats a value", message=str(repeated))


@schemathesis.check
def credentials_open_what_the_document_says(_ctx: CheckContext, response: Response, case: Case) -> None:
    """An API key opens nothing that does not offer it; without credentials only public operations open."""
    definition = case.operation.definition.raw
    schemes = {name for alternative in definition["security"] for name in alternative}
    if response.status_code < 400 and schemes and CALLER.scheme not in schemes:
        raise Failure(operation=case.operation.label, title="It opens to strangers", message=str(schemes))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from texts_in(item)


def is_telling(text: str) -> bool:
    """Whether the text can only have come from the request: neither short nor one of the document's words."""
    return len(text) >= LONG_ENOUGH_TO_BE_NO_ACCIDENT and text not in words_of_the_document()


@cache
def words_of_the_document() -> frozenset[str]:
    """The names of members and parameters, which a pointer may say."""
    components = requests.get(f"{os.environ['BILLING_FUZZ_URL']}/openapi.json", timeout=10).json()["components"]
    members = (name for schema in components["schemas"].values() for name in schema.get("properties", ()))
    return frozenset([*members, *(parameter["name"] for parameter in components["parameters"].values())])
