"""Compiled operations and Connexion's own stack: the same request, the same answer.

Two servers run side by side, one of them with `COMPILED_OPERATIONS=off`, and are sent the same requests. What
differs between any two answers (ids, times, secrets, the servers' addresses) is masked, and the rest has to
be the same: status, headers, body. `BILLING_STACK_EXAMPLES` sets the number of generated cases an operation
instead of 40.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.config import SchemathesisConfig

from billing.http.document import Operation, operations
from billing.storage import database, embedded
from tests import live
from tests.answers import DOCUMENT
from tests.conftest import API, PASSWORD, clone
from tests.contract import test_probes as probes
from tests.rawhttp import Address, Connection, request

EXAMPLES = int(os.environ.get("BILLING_STACK_EXAMPLES", "40"))
LISTED = operations(DOCUMENT)
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig())
GENERATED = {found.ok().definition.raw["operationId"]: found.ok() for found in SCHEMA.get_all_operations()}

# What differs between any two answers, by pattern.
MASKS = [
    (re.compile(form), mask)
    for form, mask in [
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>"),
        (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "<time>"),
        (r'("last_used_at": ?)(?:null|"<time>")', r"\1<time>"),
        (r"\b([sp]k_(?:live|test)_)[0-9A-Za-z]{38}", r"\1<key>"),
        (r"(\*{4}\.\.\.)[0-9A-Za-z+/=]{4}", r"\1<last4>"),
        (r'("last4": ?")[0-9A-Za-z]{4}', r"\1<last4>"),
        (r"whsec_[0-9A-Za-z+/=]+", "whsec_<secret>"),
        (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<token>"),
        (r"http://127\.0\.0\.1:\d+", "<origin>"),
        (r'("slug": ?"[a-z0-9-]+-)[0-9a-f]{6}"', r'\1<other>"'),  # of a name that was taken
        (r'("response_time_ms": ?)\d+', r"\1<ms>"),
    ]
]
IGNORED_HEADERS = {"date", "x-request-id", "content-length"}


@dataclass(frozen=True)
class Server:
    """One of the two, and its answer to a registration."""

    url: str
    registered: dict[str, Any]

    @property
    def address(self) -> Address:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def credentials(self, who: str) -> dict[str, str]:
        tenant, tokens = self.registered["tenant"], self.registered["tokens"]
        return {
            "nobody": {},
            "owner": {"Authorization": f"Bearer {tokens['access']}"},
            "secret key": {"X-API-Key": tenant["api_key_secret"]},
            "publishable key": {"X-API-Key": tenant["api_key_public"]},
            "key as a token": {"Authorization": f"Bearer {tenant['api_key_secret']}"},
            "token and bad key": {"Authorization": f"Bearer {tokens['access']}", "X-API-Key": "sk_live_x"},
            "bad token and key": {"Authorization": "Bearer x", "X-API-Key": tenant["api_key_secret"]},
        }[who]


CALLERS = (
    "nobody",
    "owner",
    "secret key",
    "publishable key",
    "key as a token",
    "token and bad key",
    "bad token and key",
)
# Callers with valid credentials; the examples that come before leave them valid.
WITH_VALID_CREDENTIALS = ("owner", "secret key", "publishable key", "key as a token", "token and bad key")


@pytest.fixture(scope="module")
def both(cluster: embedded.Cluster, worker_id: str) -> Iterator[tuple[Server, Server]]:
    """The server with compiled operations, and the one without."""

    def environ(compiled: str) -> dict[str, str]:
        # A database each: neither may see what the other has done.
        name = f"billing_stacks_{compiled}_{worker_id}"
        clone(cluster, name)
        address = database.url(cluster, database.APP, name)
        return {"DATABASE_URL": address, "RATE_LIMITS": "off", "COMPILED_OPERATIONS": compiled}

    with (
        live.serving(environ("on"), "--no-worker") as compiled,
        live.serving(environ("off"), "--no-worker") as stock,
    ):
        yield registered(compiled), registered(stock)


def registered(url: str) -> Server:
    body = {"company_name": "Stacks", "email": "ada@stacks.example", "password": PASSWORD}
    answer = requests.post(f"{url}{API}/register/", json=body, timeout=10)
    assert answer.status_code == 201
    return Server(url, answer.json())


@dataclass(frozen=True)
class Comparable:
    """An answer without what differs between any two."""

    status: int
    headers: list[tuple[str, str]]
    body: str


def comparable(status: int, headers: Any, body: bytes) -> Comparable:
    named = sorted((name.lower(), masked(value)) for name, value in headers.items())
    return Comparable(
        status, [pair for pair in named if pair[0] not in IGNORED_HEADERS], masked(body.decode())
    )


def masked(text: str) -> str:
    for form, mask in MASKS:
        text = form.sub(mask, text)
    return text


def sent_raw(server: Server, packets: bytes) -> Comparable:
    with Connection(server.address, timeout_seconds=15) as connection:
        connection.send(packets)
        answer = connection.receive(to_head=packets.startswith(b"HEAD "))
    return comparable(answer.status, answer.headers, answer.body)


def sent(server: Server, method: str, path: str, **options: Any) -> Comparable:
    answer = requests.request(method, f"{server.url}{path}", timeout=15, allow_redirects=False, **options)
    return comparable(answer.status_code, answer.headers, answer.content)


# Every probe -------------------------------------------------------------------------------------

PROBES: dict[str, bytes] = {
    **{
        f"a body of {name}": probes.log_in(probes.JSON, body=body)
        for name, (body, _) in probes.BODIES.items()
    },
    **{f"a type of {name}": probes.log_in(*lines) for name, (lines, _) in probes.CONTENT_TYPES.items()},
    **{f"a message with {name}": packets for name, (packets, _) in probes.FRAMINGS.items()},
    **{f"a target with {name}": probes.get(target) for name, (target, _) in probes.TARGETS.items()},
    **{f"headers with {name}": probes.get(probes.ME, *lines) for name, (lines, _) in probes.HEADERS.items()},
    **{f"a key that is {name}": probes.get(f"{API}/verify/", *lines) for name, lines in probes.KEYS.items()},
    **{f"{method} of me": request(method, probes.ME) for method in ("PUT", "HEAD", "OPTIONS", "TRACE")},
    "HEAD of the callback": request("HEAD", f"{API}/stripe/callback/"),
    "a body on GET": request("GET", probes.ME, body=b"{}"),
    "a preflight": request(
        "OPTIONS", probes.ME, "Origin: http://localhost:3000", "Access-Control-Request-Method: GET"
    ),
    "an origin": request("GET", probes.ME, "Origin: http://localhost:3000"),
}


@pytest.mark.parametrize("packets", PROBES.values(), ids=PROBES)
def test_both_stacks_answer_a_probe_alike(both: tuple[Server, Server], packets: bytes) -> None:
    compiled, stock = both
    assert sent_raw(compiled, packets) == sent_raw(stock, packets)


# Every operation, as every caller ----------------------------------------------------------------


def example_of(operation: Operation) -> Any:
    """The body that the document shows, None where there is none."""
    content = (
        DOCUMENT["paths"][operation.path][operation.method.lower()].get("requestBody", {}).get("content")
    )
    if content is None:
        return None
    shown = content["application/json"]
    return shown["example"] if "example" in shown else next(iter(shown["examples"].values()))["value"]


@pytest.mark.parametrize("who", CALLERS)
@pytest.mark.parametrize("operation", LISTED, ids=lambda operation: operation.operation_id)
def test_both_stacks_answer_every_caller_alike(
    both: tuple[Server, Server], operation: Operation, who: str
) -> None:
    compiled, stock = both
    # The body of change_password stays invalid: it would end the session, and nothing could be compared then.
    for body in (
        None,
        {},
        {"unknown": 1},
        [] if operation.operation_id == "change_password" else example_of(operation),
    ):
        first, second = (
            sent(server, operation.method, operation.path, json=body, headers=server.credentials(who))
            for server in (compiled, stock)
        )
        assert first == second
        if operation.operation_id == "verify_api_key" and body is None:
            assert (first.status == 200) == (who in WITH_VALID_CREDENTIALS)


# Generated cases ---------------------------------------------------------------------------------


def cases(operation_id: str) -> st.SearchStrategy[Case]:
    """Requests that match the document, and requests that do not."""
    generated = GENERATED[operation_id]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    return st.one_of([generated.as_strategy(generation_mode=mode) for mode in modes])


def repeated(server: Server, case: Case) -> Comparable:
    options = case.as_transport_kwargs(base_url=server.url)
    options["headers"] = {**options["headers"], **server.credentials("owner")}
    answer = requests.request(timeout=15, allow_redirects=False, **options)
    return comparable(answer.status_code, answer.headers, answer.content)


@pytest.mark.parametrize("operation_id", GENERATED)
def test_both_stacks_answer_a_generated_request_alike(both: tuple[Server, Server], operation_id: str) -> None:
    compiled, stock = both

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(operation_id))
    def story(case: Case) -> None:
        assert repeated(compiled, case) == repeated(stock, case)

    check: Callable[[], None] = story
    check()
