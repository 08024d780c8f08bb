"""`billing check` against our servers, against our servers behind a tampering proxy, and against other servers."""

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
    """A server that uses the sandbox as Stripe, and may send webhooks to this machine."""
    with Sandbox() as stripe, live.serving({**environ, **stripe.environ}, "--no-worker") as url:
        yield url


# Our server --------------------------------------------------------------------------------------


def test_every_documented_operation_has_a_step() -> None:
    assert {step.__name__ for step in STEPS} == {o.operation_id for o in operations(DOCUMENT)}


def test_every_operation_passes(server_url: str) -> None:
    with receiving(answers(204)) as receiver:
        done = check(server_url, "--webhook-url", f"http://localhost:{receiver.port}/in")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "18 passed, 0 failed, 0 skipped")
    assert len(receiver.received) == 1
    assert not SECRET.search(done.output)


def test_stripe_operations_are_skipped_where_stripe_is_not_configured(environ: dict[str, str]) -> None:
    nothing = {"STRIPE_SECRET_KEY": "", "STRIPE_CONNECT_CLIENT_ID": ""}
    with live.serving({**environ, **nothing}, "--no-worker") as url:
        done = check(f"{url}/", "--json")
    lines = json.loads(done.stdout)
    assert done.exit_code == 0
    assert {line["operation"] for line in lines if line["verdict"] == "SKIP"} == STRIPE
    assert {line["operation"] for line in lines if line["verdict"] == "FAIL"} == set()
    assert not SECRET.search(done.output)


def test_a_given_webhook_url_must_accept_the_test_event(server_url: str) -> None:
    with receiving(answers(500)) as receiver:
        done = check(server_url, "--webhook-url", f"http://localhost:{receiver.port}/in")
    assert done.exit_code == 1
    assert re.search(r"^FAIL +send_test_webhook +200 .*\(bad_status\)$", done.stdout, re.MULTILINE)


# A tampering proxy -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer on its way through the proxy."""

    status: int
    headers: dict[str, str]
    body: bytes

    def with_member(self, name: str, value: object) -> Answer:
        return replace(self, body=json.dumps({**json.loads(self.body), name: value}).encode())

    def without(self, header: str) -> Answer:
        return replace(self, headers={k: v for k, v in self.headers.items() if k.lower() != header.lower()})


Tamper = Callable[[Answer], Answer]


class TamperingProxy(BaseHTTPRequestHandler):
    """Forwards every request, and changes some of the answers."""

    upstream: str
    tamper: Callable[[str, str, Answer], Answer]

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
        answer = type(self).tamper(self.command, self.path, Answer(got.status_code, kept, got.content))
        self.send_response_only(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

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


def tampering(upstream: str, action: str, tamper: Tamper, *, only: int | None) -> type[TamperingProxy]:
    """Change the answers of one operation that have this status, or any if it is None."""
    method, path = action.split()

    def tamper_with_one(command: str, target: str, answer: Answer) -> Answer:
        is_it = (command, target.partition("?")[0]) == (method, f"{API}{path}")
        return tamper(answer) if is_it and only in (answer.status, None) else answer

    return type(
        "Tampered", (TamperingProxy,), {"upstream": upstream, "tamper": staticmethod(tamper_with_one)}
    )


@pytest.mark.parametrize(
    ("action", "only", "tamper", "failed"),
    [
        ("GET /details/", 401, lambda answer: answer.without("WWW-Authenticate"), "get_tenant_details"),
        ("GET /details/", 401, lambda answer: replace(answer, status=200), "get_tenant_details"),
        ("GET /me/", 200, lambda answer: answer.with_member("user", None), "get_current_user"),
        (
            "GET /api-keys/",
            401,
            lambda answer: replace(answer, headers={**answer.headers, "Content-Type": "application/json"}),
            "list_api_keys",
        ),
        ("GET /api-keys/", 401, lambda answer: answer.with_member("code", "key-unknown"), "list_api_keys"),
        ("GET /api-keys/", 200, lambda answer: replace(answer, status=206), "list_api_keys"),
        ("GET /stripe/status/", 200, lambda answer: answer.without("X-Request-Id"), "get_stripe_status"),
        (
            "GET /stripe/status/",
            200,
            lambda answer: answer.with_member("connected", True),
            "get_stripe_status",
        ),
        ("GET /webhooks/config/", 200, lambda answer: replace(answer, body=b"[]"), "get_webhook_config"),
        (
            "GET /webhooks/config/",
            200,
            lambda answer: answer.with_member("webhook_url", None),
            "get_webhook_config",
        ),
        ("DELETE /webhooks/config/", 200, lambda answer: replace(answer, body=b"{"), "remove_webhook"),
    ],
)
def test_a_wrong_answer_fails_its_operation_alone(
    server_url: str, action: str, only: int, tamper: Tamper, failed: str
) -> None:
    with serving(tampering(server_url, action, tamper, only=only)) as url:
        done = check(url, "--json")
    lines = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [line["operation"] for line in lines if line["verdict"] != "PASS"] == [failed]
    assert not SECRET.search(done.output)


@pytest.mark.parametrize(("retry_after", "passes"), [("1", True), ("61", False), ("soon", False)])
def test_a_rate_limited_call_is_repeated_if_that_is_soon(
    server_url: str, retry_after: str, passes: bool
) -> None:
    limited: list[str] = []

    def limit_once(answer: Answer) -> Answer:
        if limited:
            return answer
        limited.append(retry_after)
        body = json.dumps(json.loads(answer.body) | {"code": "rate-limited", "status": 429}).encode()
        return Answer(429, {**answer.headers, "Retry-After": retry_after}, body)

    with serving(tampering(server_url, "GET /stripe/status/", limit_once, only=401)) as url:
        done = check(url)
    assert limited and (done.exit_code == 0) is passes
    assert ("get_stripe_status is rate limited: goes on in 1 s." in done.stderr) is passes


def test_wrong_refusal_codes_of_verify_are_detected(server_url: str) -> None:
    def with_another_code(answer: Answer) -> Answer:
        return answer.with_member("code", "key-unknown")

    with serving(tampering(server_url, "GET /verify/", with_another_code, only=401)) as url:
        found = verdicts(url)
    # Called without a key, with a replaced one, with a revoked one.
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {
        "verify_api_key",
        "regenerate_api_keys",
        "revoke_api_keys",
    }


def test_keys_that_still_work_after_their_end_are_detected(server_url: str) -> None:
    """The proxy answers as if a refused key were still accepted."""
    accepted: list[Answer] = []

    def accept(answer: Answer) -> Answer:
        if answer.status == 200:
            accepted.append(answer)
        return accepted[0] if accepted else answer

    with serving(tampering(server_url, "GET /verify/", accept, only=None)) as url:
        found = verdicts(url)
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {
        "regenerate_api_keys",
        "revoke_api_keys",
    }


def test_operations_that_depend_on_a_failed_one_are_skipped(server_url: str) -> None:
    with serving(
        tampering(server_url, "POST /register/", lambda answer: replace(answer, body=b"{}"), only=201)
    ) as url:
        found = verdicts(url)
    assert found.pop("register_tenant") == "FAIL"
    assert set(found.values()) == {"SKIP"}


# Other servers -----------------------------------------------------------------------------------


class AlwaysOk(BaseHTTPRequestHandler):
    """Serves our document, and answers 200 to everything."""

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


class EmptyDocument(AlwaysOk):
    document = {"openapi": "3.0.3", "paths": {}}  # noqa: RUF012


class BrokenDocument(AlwaysOk):
    document = {  # noqa: RUF012
        "paths": {API: {"post": {"operationId": "register_tenant", "responses": {"200": {"$ref": "#/no"}}}}}
    }


class NoDocument(AlwaysOk):
    document = "Welcome."


@pytest.mark.parametrize("handler", [EmptyDocument, BrokenDocument])
def test_a_document_that_is_not_ours_fails(handler: type[AlwaysOk]) -> None:
    with serving(handler) as url:
        done = check(url)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (1, "0 passed, 18 failed, 0 skipped")


def test_a_server_that_answers_200_to_everything_passes_nothing() -> None:
    with serving(AlwaysOk) as url:
        done = check(url)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1].startswith("0 passed")


def test_a_missing_document_is_a_one_line_error() -> None:
    with serving(NoDocument) as url:
        done = check(url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no OpenAPI document" in done.stderr
    gone = check(url)
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert "There is no document at" in gone.stderr


@pytest.mark.parametrize(
    "url", ["billing.example.com", "ftp://billing.example.com", "https://", "http://a.example/?q=1"]
)
def test_an_invalid_base_url_is_refused(url: str) -> None:
    done = check(url)
    assert done.exit_code == 2
    assert "https://billing.example.com" in done.stderr
