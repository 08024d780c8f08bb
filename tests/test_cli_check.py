"""`billing check` against servers of ours, against ours spoilt on the way, and against something else."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result

from billing.cli import main
from billing.cli.check import STEPS
from billing.http.document import operations
from billing.storage import database, embedded
from sandbox.stripe import Sandbox
from tests import live
from tests.answers import DOCUMENT
from tests.conftest import API, clone
from tests.receivers import answers, receiving

# A key, a webhook secret, a token, or anything as long and as random.
SECRET = re.compile(r"(?:sk|pk)_(?:live|test)_|whsec_|eyJ|[A-Za-z0-9_-]{30}")
STRIPE = {"start_stripe_connect", "complete_stripe_connect"}
LOOPBACK = {"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128", "WEBHOOK_ALLOW_HTTP": "on", "RATE_LIMITS": "off"}


def check(url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["check", url, *options])


def verdicts(url: str, *options: str) -> dict[str, str]:
    lines = json.loads(check(url, "--json", *options).stdout)
    return {line["operation"]: line["verdict"] for line in lines}


@pytest.fixture(scope="module")
def environ(cluster: embedded.Cluster, worker_id: str) -> dict[str, str]:
    name = f"billing_check_{worker_id}"
    clone(cluster, name)
    return {"DATABASE_URL": database.url(cluster, database.APP, name), **LOOPBACK}


@pytest.fixture(scope="module")
def server_url(environ: dict[str, str]) -> Iterator[str]:
    """A server that takes the sandbox for Stripe, and sends webhooks to this machine."""
    with Sandbox() as stripe, live.serving({**environ, **stripe.environ}, "--no-worker") as url:
        yield url


# Ours --------------------------------------------------------------------------------------------


def test_every_operation_of_the_document_has_its_line() -> None:
    assert {step.__name__ for step in STEPS} == {o.operation_id for o in operations(DOCUMENT)}


def test_all_pass(server_url: str) -> None:
    with receiving(answers(204)) as receiver:
        done = check(server_url, "--webhook-url", f"http://localhost:{receiver.port}/in")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "18 passed, 0 failed, 0 skipped")
    assert len(receiver.received) == 1
    assert not SECRET.search(done.output)


def test_without_stripe_what_cannot_be_done_is_skipped(environ: dict[str, str]) -> None:
    nothing = {"STRIPE_SECRET_KEY": "", "STRIPE_CONNECT_CLIENT_ID": ""}
    with live.serving({**environ, **nothing}, "--no-worker") as url:
        done = check(f"{url}/", "--json")
    lines = json.loads(done.stdout)
    assert done.exit_code == 0
    assert {line["operation"] for line in lines if line["verdict"] == "SKIP"} == STRIPE
    assert {line["operation"] for line in lines if line["verdict"] == "FAIL"} == set()
    assert not SECRET.search(done.output)


def test_a_receiver_that_was_named_must_be_reached(server_url: str) -> None:
    with receiving(answers(500)) as receiver:
        done = check(server_url, "--webhook-url", f"http://localhost:{receiver.port}/in")
    assert done.exit_code == 1
    assert re.search(r"^FAIL +send_test_webhook +200 .*\(bad_status\)$", done.stdout, re.MULTILINE)


# Ours, spoilt ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """An answer on its way."""

    status: int
    headers: dict[str, str]
    body: bytes

    def with_member(self, name: str, value: object) -> Said:
        return replace(self, body=json.dumps({**json.loads(self.body), name: value}).encode())

    def without(self, header: str) -> Said:
        return replace(self, headers={k: v for k, v in self.headers.items() if k.lower() != header.lower()})


Spoil = Callable[[Said], Said]


class Meddler(BaseHTTPRequestHandler):
    """Hands everything on, and spoils some of what comes back."""

    upstream: str
    spoil: Callable[[str, str, Said], Said]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        url = self.upstream + self.path
        got = requests.request(
            self.command, url, data=body, headers=headers, allow_redirects=False, timeout=30
        )
        kept = {
            name: value
            for name, value in got.headers.items()
            if name.lower() not in ("content-length", "date", "connection", "keep-alive")
        }
        said = type(self).spoil(self.command, self.path, Said(got.status_code, kept, got.content))
        self.send_response_only(said.status)
        for name, value in {**said.headers, "Content-Length": str(len(said.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.body)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def spoilt(upstream: str, action: str, spoil: Spoil, *, only: int) -> type[Meddler]:
    """Spoils the answers of one operation that have this status."""
    method, path = action.split()

    def meddle(command: str, target: str, said: Said) -> Said:
        is_it = (command, target.partition("?")[0], said.status) == (method, f"{API}{path}", only)
        return spoil(said) if is_it else said

    return type("Spoilt", (Meddler,), {"upstream": upstream, "spoil": staticmethod(meddle)})


@pytest.mark.parametrize(
    ("action", "only", "spoil", "failed"),
    [
        ("GET /details/", 401, lambda said: said.without("WWW-Authenticate"), "get_tenant_details"),
        ("GET /details/", 401, lambda said: replace(said, status=200), "get_tenant_details"),
        ("GET /me/", 200, lambda said: said.with_member("user", None), "get_current_user"),
        (
            "GET /api-keys/",
            401,
            lambda said: replace(said, headers={**said.headers, "Content-Type": "application/json"}),
            "list_api_keys",
        ),
        ("GET /api-keys/", 401, lambda said: said.with_member("code", "key-unknown"), "list_api_keys"),
        ("GET /api-keys/", 200, lambda said: replace(said, status=206), "list_api_keys"),
        ("GET /stripe/status/", 200, lambda said: said.without("X-Request-Id"), "get_stripe_status"),
        ("GET /stripe/status/", 200, lambda said: said.with_member("connected", True), "get_stripe_status"),
        ("GET /webhooks/config/", 200, lambda said: replace(said, body=b"[]"), "get_webhook_config"),
        (
            "GET /webhooks/config/",
            200,
            lambda said: said.with_member("webhook_url", None),
            "get_webhook_config",
        ),
        ("DELETE /webhooks/config/", 200, lambda said: replace(said, body=b"{"), "remove_webhook"),
    ],
)
def test_what_is_wrong_fails_and_nothing_else(
    server_url: str, action: str, only: int, spoil: Spoil, failed: str
) -> None:
    with serving(spoilt(server_url, action, spoil, only=only)) as url:
        done = check(url, "--json")
    lines = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [line["operation"] for line in lines if line["verdict"] != "PASS"] == [failed]
    assert not SECRET.search(done.output)


def test_keys_that_outlive_their_end_are_noticed(server_url: str) -> None:
    def forgive(said: Said) -> Said:
        return said.with_member("code", "key-unknown")

    with serving(spoilt(server_url, "GET /verify/", forgive, only=401)) as url:
        found = verdicts(url)
    # Without a key, with a replaced one, with a revoked one.
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {
        "verify_api_key",
        "regenerate_api_keys",
        "revoke_api_keys",
    }


def test_what_depends_on_a_failure_is_skipped(server_url: str) -> None:
    with serving(
        spoilt(server_url, "POST /register/", lambda said: replace(said, body=b"{}"), only=201)
    ) as url:
        found = verdicts(url)
    assert found.pop("register_tenant") == "FAIL"
    assert set(found.values()) == {"SKIP"}


# Something else ----------------------------------------------------------------------------------


class Yes(BaseHTTPRequestHandler):
    """Has our document, and says yes to everything."""

    document: Any = DOCUMENT

    def do_GET(self) -> None:
        is_document = self.path == "/openapi.json"
        body = json.dumps(self.document if is_document else {"message": "Yes."}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.do_GET()

    do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Empty(Yes):
    document = {"openapi": "3.0.3", "paths": {}}  # noqa: RUF012


class Strange(Yes):
    document = {  # noqa: RUF012
        "paths": {API: {"post": {"operationId": "register_tenant", "responses": {"200": {"$ref": "#/no"}}}}}
    }


class Text(Yes):
    document = "Welcome."


@pytest.mark.parametrize("handler", [Empty, Strange])
def test_a_document_that_is_not_ours_fails(handler: type[Yes]) -> None:
    with serving(handler) as url:
        done = check(url)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (1, "0 passed, 18 failed, 0 skipped")


def test_a_server_that_says_yes_to_everything_passes_nothing() -> None:
    with serving(Yes) as url:
        done = check(url)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1].startswith("0 passed")


def test_no_document_is_one_sentence() -> None:
    with serving(Text) as url:
        done = check(url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no OpenAPI document" in done.stderr
    gone = check(url)
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert "There is no document at" in gone.stderr


@pytest.mark.parametrize(
    "url", ["billing.example.com", "ftp://billing.example.com", "https://", "http://a.example/?q=1"]
)
def test_what_is_no_base_url_is_refused(url: str) -> None:
    done = check(url)
    assert done.exit_code == 2
    assert "https://billing.example.com" in done.stderr
