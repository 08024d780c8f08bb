"""What a Schemathesis run has beside `schemathesis.toml`: callers, valid values, checks of our own.

`st run` loads it in a process of its own, and it reads `BILLING_FUZZ_URL`, `BILLING_FUZZ_AS`,
`BILLING_FUZZ_STRIPE`, which is `sandbox` or `none`, `BILLING_FUZZ_RECEIVER`, the URL of a receiver that
accepts every webhook, `BILLING_FUZZ_NEIGHBOURS`, a file that describes other tenants, and
`BILLING_FUZZ_LEDGER`, a file to write at the end.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlsplit
from uuid import uuid4

import requests
import schemathesis
from jsonschema_rs import Draft4Validator
from schemathesis import AuthContext, Case, CheckContext, DeserializationContext, HookContext, Response
from schemathesis.core.failures import Failure, ServerError
from schemathesis.generation.meta import TestPhase
from schemathesis.openapi.checks import RejectedPositiveData

from billing.http.validation import as_json_schema
from contract import neighbours
from contract.callers import CALLERS
from contract.exercised import Described, Ledger, Sent, described

URL = os.environ["BILLING_FUZZ_URL"]
API = f"{URL}/api/v1/auth/tenants"
CALLER = CALLERS[os.environ["BILLING_FUZZ_AS"]]
HAS_STRIPE = os.environ["BILLING_FUZZ_STRIPE"] == "sandbox"
RECEIVER = os.environ["BILLING_FUZZ_RECEIVER"]
NEIGHBOURS = neighbours.read(Path(os.environ["BILLING_FUZZ_NEIGHBOURS"]))
# As in the document's examples, so that those are valid and not only well-formed.
PASSWORD = "SecurePass123!"
STRONG_PASSWORD = "correct horse battery staple"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
DISTINCTIVE_LENGTH = 8
KEY = "Idempotency-Key"

Json = dict[str, Any]


# Callers -----------------------------------------------------------------------------------------


def register() -> Json:
    """A new tenant: what `register_tenant` answers."""
    body = {"company_name": "Acme Inc.", "email": f"{uuid4().hex}@acme.example", "password": PASSWORD}
    answer = requests.post(f"{API}/register/", json=body, timeout=10)
    answer.raise_for_status()
    registered: Json = answer.json()
    return registered


class FreshTenant:
    """The credentials of a tenant made for the run, and after a 401 those of another.

    A changed password ends the session that the run uses. The run continues as a new tenant, whose password
    is `PASSWORD` again, so that no operation has to be excluded.
    """

    def get(self, _case: Case, _context: AuthContext) -> dict[str, str]:
        return CALLER.credentials(register())

    def set(self, case: Case, data: dict[str, str], _context: AuthContext) -> None:
        case.headers = {**(case.headers or {}), **data}


if CALLER.scheme is not None:
    schemathesis.auth(refresh_interval=600, retry_on=[401])(FreshTenant)


# Valid values ------------------------------------------------------------------------------------


@schemathesis.hook
def before_call(_context: HookContext, case: Case, _kwargs: Json) -> None:
    """Make a merely well-formed body or query a valid one, in the examples and half of the other cases.

    Chance finds no password and no state, and hardly a strong password: the fuzzer would see only refusals.
    The case itself decides which half, so that it can be repeated.
    """
    if not is_valid(case):
        return
    chance = random.Random(zlib.crc32(repr((case.body, case.query)).encode()))
    if is_example(case) or chance.random() < 0.5:
        correct(case)
    if NEIGHBOURS and chance.random() < 0.5:
        send_neighbours_data(case, chance)


def correct(case: Case) -> None:
    operation_id = operation_of(case)
    if case.headers and KEY in case.headers:
        # All examples share one key, and most of them would be refused as another request's.
        case.headers = {**case.headers, KEY: uuid4().hex}
    if operation_id in CORRECTED_BODIES:
        case.body = CORRECTED_BODIES[operation_id](case.body)
    if operation_id in CORRECTED_QUERIES:
        case.query = CORRECTED_QUERIES[operation_id](case.query)


def operation_of(case: Case) -> str:
    operation_id: str = case.operation.definition.raw["operationId"]
    return operation_id


def is_valid(case: Case) -> bool:
    """Whether the case was made to match the document."""
    return case.meta is not None and case.meta.generation.mode.is_positive


def is_example(case: Case) -> bool:
    return case.meta is not None and case.meta.phase.name is TestPhase.EXAMPLES


def as_a_new_tenant(body: Json) -> Json:
    right = with_a_receiver(body) if "webhook_url" in body else body
    return {**right, "email": f"{uuid4().hex}@acme.example", "password": STRONG_PASSWORD}


def with_a_receiver(body: Json) -> Json:
    return {**body, "webhook_url": RECEIVER}


def as_a_known_user(_body: Json) -> Json:
    return {"email": known_email(), "password": PASSWORD}


def with_a_valid_token(_body: Json) -> Json:
    answer = requests.post(f"{API}/login/", json=as_a_known_user({}), timeout=10)
    return {"refresh": answer.json()["tokens"]["refresh"]}


def with_the_right_password(_body: Json) -> Json:
    return {"old_password": PASSWORD, "new_password": STRONG_PASSWORD}


def with_an_allowed_origin(body: Any) -> Json:
    # Allowed by default. Not our own: an error may contain that, in its `type`.
    return {**(body if isinstance(body, dict) else {}), "return_url": "http://localhost:3000/settings"}


def as_stripe_redirects(query: Json) -> Json:
    """The query of the redirect after a new tenant has begun to connect, and agreed at the sandbox."""
    chance = random.Random(repr(query))
    body = {"flow": chance.choice(["oauth", "account_link"])}
    if chance.choice([True, False]):
        body = with_an_allowed_origin(body)
    owner = {"Authorization": f"Bearer {register()['tokens']['access']}"}
    url = requests.post(f"{API}/stripe/connect/", json=body, headers=owner, timeout=10).json()["url"]
    agreed = {"decision": "connect" if body["flow"] == "oauth" else "finish", "account": "active"}
    back = requests.post(url, agreed, allow_redirects=False, timeout=10).headers["Location"]
    return dict(parse_qsl(urlsplit(back).query))


CORRECTED_BODIES = {
    "register_tenant": as_a_new_tenant,
    "log_in": as_a_known_user,
    "refresh_tokens": with_a_valid_token,
    "change_password": with_the_right_password,
    "start_stripe_connect": with_an_allowed_origin,
    "configure_webhook": with_a_receiver,
}
CORRECTED_QUERIES = {"complete_stripe_connect": as_stripe_redirects} if HAS_STRIPE else {}


@cache
def known_email() -> str:
    """The address of a user whose password nothing in the run changes."""
    email: str = register()["user"]["email"]
    return email


# Data of other tenants ---------------------------------------------------------------------------


def send_neighbours_data(case: Case, chance: random.Random) -> None:
    """Put values known of a neighbour wherever the document allows them, in half of the places."""
    if isinstance(case.body, dict):
        case.body = mixed(operation_of(case), "body", case.body, chance)
    if case.query:
        case.query = mixed(operation_of(case), "query", case.query, chance)
    for name, value in mixed(operation_of(case), "header", dict(case.headers or {}), chance).items():
        case.headers[name] = value


def mixed(operation_id: str, place: str, sent: Json, chance: random.Random) -> Json:
    return {
        name: chance.choice(fitting)
        if (fitting := allowed_values(operation_id, place, name)) and chance.random() < 0.5
        else value
        for name, value in sent.items()
    }


@cache
def allowed_values(operation_id: str, place: str, name: str) -> list[str]:
    """The neighbours' values allowed there: those of the same name, or else any."""
    schema = schema_of(operation_id, place, name)
    if schema is None:
        return []
    allowed = Draft4Validator(as_json_schema(schema), validate_formats=True).is_valid
    of_that_name = [text for one in NEIGHBOURS for text in one.known.get(name, ()) if allowed(text)]
    return of_that_name or [text for text in neighbours.all_known(NEIGHBOURS) if allowed(text)]


def schema_of(operation_id: str, place: str, name: str) -> Json | None:
    for one in document()[operation_id].inputs:
        if one.place == place == "body":
            found: Json | None = one.schema.get("properties", {}).get(name)
            return found
        if one.place == place and one.name.lower() == name.lower():
            return one.schema
    return None


# Results -----------------------------------------------------------------------------------------

LEDGER = Ledger()
atexit.register(LEDGER.write, Path(os.environ["BILLING_FUZZ_LEDGER"]))
# Values known of the neighbours that the API has accepted from this tenant, and may return to it.
LENT: set[str] = set()


@schemathesis.hook
def after_call(_context: HookContext, case: Case, response: Response) -> None:
    """Record what the case has exercised. A case of another method tests the path, not its operation."""
    operation = document()[operation_of(case)]
    if response.request.method == operation.method:
        LEDGER.note(operation, sent_in(response), response.status_code)
    if response.status_code < 300 and not operation.is_public:
        LENT.update(text for text in neighbours.all_known(NEIGHBOURS) if text in text_of_request(response))


def sent_in(response: Response) -> Sent:
    request = response.request
    query = dict(parse_qsl(urlsplit(str(request.url)).query, keep_blank_values=True))
    try:
        body = (json.loads(request.body),) if request.body else ()
    except ValueError:
        body = ()
    return Sent(query, request.headers, body)


def text_of_request(response: Response) -> str:
    request = response.request
    body = request.body or b""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    return " ".join([unquote_plus(str(request.url)), str(dict(request.headers)), text])


@cache
def document() -> dict[str, Described]:
    return described(requests.get(f"{URL}/openapi.json", timeout=10).json())


# Pages -------------------------------------------------------------------------------------------


@schemathesis.deserializer("text/html")
def text_of(_context: DeserializationContext, response: Response) -> str:
    return response.text


# Excused failures --------------------------------------------------------------------------------

# Refusals of requests that match the document, by code, so that no other answer of the same status passes.
# They are excused from two checks only: the answer must still be listed, match its schema, and so on.
EXCUSED = {
    # No schema can say which states there are.
    "complete_stripe_connect": {"state-missing", "state-unknown", "state-expired", "state-used"},
    # A 5xx because only the operator can fix it, and without Stripe there is no other answer. The statuses
    # that `schemathesis.toml` could allow would let any 503 pass, also one for an unavailable database.
    "start_stripe_connect": set() if HAS_STRIPE else {"stripe-not-configured"},
}


@schemathesis.hook
def filter_failure(_context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """Whether the failure counts; False drops it."""
    if not isinstance(failure, ServerError | RejectedPositiveData):
        return True
    code = json.loads(response.content).get("code")
    if code == "malformed-body" and has_nul_in_free_object(case):
        return False
    return code not in EXCUSED.get(operation_of(case), ())


def has_nul_in_free_object(case: Case) -> bool:
    """Whether NUL is in the one object where no schema of OpenAPI 3.0 can forbid it: the description does."""
    is_test = operation_of(case) == "send_test_webhook" and isinstance(case.body, dict)
    return is_test and any("\0" in text for text in texts_in(case.body.get("test_data")))


# Checks ------------------------------------------------------------------------------------------


@schemathesis.check
def every_answer_has_a_request_id(_context: CheckContext, response: Response, _case: Case) -> None:
    names = response.headers.get("x-request-id", [])
    assert len(names) == 1 and REQUEST_ID.fullmatch(names[0]), f"X-Request-Id: {names}"


@schemathesis.check
def every_error_is_a_problem(_context: CheckContext, response: Response, _case: Case) -> None:
    """Also where the document lists no status, as for 404 and 405, which the built-in checks skip."""
    if is_error(response):
        assert response.headers.get("content-type") == ["application/problem+json"]
        said = json.loads(response.content)
        assert said["status"] == response.status_code
        # A replayed answer is repeated byte for byte, with its first id.
        if "idempotent-replayed" not in response.headers:
            assert [said["request_id"]] == response.headers.get("x-request-id")


@schemathesis.check
def no_error_repeats_what_was_sent(_context: CheckContext, response: Response, case: Case) -> None:
    if is_error(response):
        problem = json.loads(response.content)
        # It begins with the server's own address, and `http://1` may have been sent.
        problem["type"] = problem["type"].removeprefix(URL)
        said = " ".join(texts_in(problem))
        assert not [
            text for text in texts_in([case.body, case.query]) if is_distinctive(text) and text in said
        ]


@schemathesis.check
def only_documented_credentials_are_accepted(_context: CheckContext, response: Response, case: Case) -> None:
    schemes = {name for alternative in case.operation.definition.raw["security"] for name in alternative}
    assert response.status_code >= 400 or not schemes or CALLER.scheme in schemes


@schemathesis.check
def no_answer_holds_a_neighbours_data(_context: CheckContext, response: Response, _case: Case) -> None:
    """Neither its mark, which no other tenant was given, nor known values that the caller did not send."""
    answer = f"{response.headers} {response.content.decode(errors='replace')}"
    own = text_of_request(response)
    found = neighbours.seen_in(answer, NEIGHBOURS, own=own, lent=LENT)
    assert not found, f"of a neighbour: {found}"


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


def is_distinctive(text: str) -> bool:
    """Whether the text can come only from the request: it is neither short nor a name in the document."""
    return len(text) >= DISTINCTIVE_LENGTH and text not in names_in_the_document()


@cache
def names_in_the_document() -> frozenset[str]:
    """Members and parameters, which a pointer may contain, and values of enums, which a message may."""
    components = requests.get(f"{URL}/openapi.json", timeout=10).json()["components"]
    schemas = components["schemas"].values()
    said = [name for schema in schemas for name in (*schema.get("properties", ()), *schema.get("enum", ()))]
    return frozenset([*said, *(parameter["name"] for parameter in components["parameters"].values())])
