"""Traces: a real server tells a real collector what a request waited for, and nothing that a client sent."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from billing import tracing
from billing.storage import database, embedded
from tests import live
from tests.conftest import API, PASSWORD, clone
from tests.receivers import Receiver, answers, receiving

ROOT = Path(__file__).parents[1]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REQUEST_ID = "of-acme-who-registers"
EMAIL = "ada@acme.example"


@dataclass
class Seen:
    """The collected traces, the delivered webhooks and the log."""

    collector: Receiver
    webhooks: Receiver
    log: Path

    @property
    def raw(self) -> bytes:
        return b"".join(received.body for received in list(self.collector.received))

    def spans(self, name: str) -> list[Span]:
        exports = [ExportTraceServiceRequest.FromString(one.body) for one in list(self.collector.received)]
        scopes = [
            scope for one in exports for resource in one.resource_spans for scope in resource.scope_spans
        ]
        return [span for scope in scopes for span in scope.spans if span.name == name]


def attributes(of: Span | Resource) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}


@pytest.fixture(scope="module")
def seen(
    cluster: embedded.Cluster, worker_id: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Seen]:
    """A tenant registers with a webhook endpoint, within a trace; then logins fail."""
    name = f"billing_traced_{worker_id}"
    clone(cluster, name)
    log = tmp_path_factory.mktemp("traced") / "log"
    with receiving(answers()) as collector, receiving(answers()) as webhooks, log.open("wb") as sink:
        environ = {
            **live.OPEN_LOOPBACK,
            "DATABASE_URL": database.url(cluster, database.APP, name),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        with live.serving(environ, log=sink) as url:
            body = {
                "company_name": "Acme",
                "email": EMAIL,
                "password": PASSWORD,
                "webhook_url": webhooks.url.replace("127.0.0.1", "localhost"),
            }
            trace = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": REQUEST_ID}
            made = requests.post(f"{url}{API}/register/", json=body, headers=trace, timeout=30)
            assert made.status_code == 201
            wrong = {"email": EMAIL, "password": f"{PASSWORD}?"}
            assert requests.post(f"{url}{API}/login/?secret=query", json=wrong, timeout=30).status_code == 400
            assert requests.post(f"{url}{API}/login/", json=wrong, timeout=30).status_code == 401
            assert requests.request("PROPFIND", f"{url}/teapot/", timeout=30).status_code == 404
            live.eventually(lambda: len(webhooks.received) > 0, seconds=60)
        yield Seen(collector, webhooks, log)  # The server has ended, and exported its last spans.


def test_a_request_is_a_child_span_of_the_callers(seen: Seen) -> None:
    [span] = seen.spans("POST register_tenant")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == Span.SPAN_KIND_SERVER
    said = attributes(span)
    assert said["http.response.status_code"] == 201
    assert said["http.route"] == f"{API}/register/"
    assert said["billing.operation_id"] == "register_tenant"
    assert said["billing.request_id"] == REQUEST_ID


def test_database_and_password_work_are_child_spans_of_the_request(seen: Seen) -> None:
    [request] = seen.spans("POST register_tenant")
    for name in ("database transaction", "password hash"):
        assert request.span_id in {s.parent_span_id for s in seen.spans(name)}, name
    refused = [s for s in seen.spans("POST log_in") if attributes(s)["http.response.status_code"] == 401]
    assert {s.span_id for s in refused} <= {s.parent_span_id for s in seen.spans("password check")}
    assert attributes(refused[0])["billing.problem"] == "invalid-credentials"


def test_a_delivery_is_a_child_span_of_its_task_and_sends_traceparent(seen: Seen) -> None:
    [task, *_] = seen.spans("task webhook.deliver")
    [delivery, *_] = seen.spans("POST webhook")
    assert delivery.parent_span_id == task.span_id
    assert attributes(delivery)["billing.request_id"] == REQUEST_ID
    version, trace, parent, _ = str(seen.webhooks.last.headers["traceparent"]).split("-")
    assert (version, trace, parent) == ("00", delivery.trace_id.hex(), delivery.span_id.hex())


def test_the_log_of_a_delivery_names_its_originating_request(seen: Seen) -> None:
    lines = [json.loads(line) for line in seen.log.read_text().splitlines() if line.startswith("{")]
    [line, *_] = [line for line in lines if line["event"] == "delivery"]
    assert (line["request_id"], line["status"], line["attempt"]) == (REQUEST_ID, "delivered", 1)
    assert (line["task"], line["tenant_id"]) == ("webhook.deliver", line["task_id"])


def test_traces_contain_nothing_that_a_client_sent(seen: Seen) -> None:
    for secret in (PASSWORD, EMAIL, "secret=query", "SELECT", "whsec_", "Acme", f":{seen.webhooks.port}"):
        assert secret.encode() not in seen.raw, secret


def test_a_request_for_no_operation_has_a_span_with_generic_names(seen: Seen) -> None:
    [span] = seen.spans("_OTHER none")
    assert attributes(span)["http.request.method"] == "_OTHER"
    assert not {b"PROPFIND", b"teapot"} & set(re.findall(rb"\w+", seen.raw))


# Failed requests, and parents of requests --------------------------------------------------------

ANSWERED = """
import asyncio, sys
from billing import tracing
from billing.http.edge import Edge

async def app(scope, receive, send):
    if scope["state"]["operation_id"] == "leaves":
        return await receive()
    await send({"type": "http.response.start", "status": int(scope["state"]["operation_id"]), "headers": []})

async def answer(what, *parents):
    async def receive():
        return {"type": "http.disconnect"}
    async def send(message):
        pass
    scope = {"type": "http", "method": "GET", "path": "/", "client": None, "state": {"operation_id": what}}
    headers = [(b"traceparent", parent.encode()) for parent in parents]
    await Edge(app)(scope | {"headers": headers}, receive, send)

tracing.begin(sys.argv[1], "billing-api")
tracing.begin(sys.argv[1], "billing-worker")
for what in ("200", "404", "499", "500", "503", "leaves"):
    asyncio.run(answer(what))
asyncio.run(answer("201", *sys.argv[2:]))
asyncio.run(answer("202", sys.argv[2]))
tracing.end()
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Requests answered with each status, one of them with two parent spans."""
    log = tmp_path_factory.mktemp("answered") / "log"
    parents = [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT[::-1]}-01"]
    with receiving(answers()) as collector, log.open("wb") as sink:
        command = [sys.executable, "-c", ANSWERED, f"http://127.0.0.1:{collector.port}", *parents]
        subprocess.run(command, cwd=ROOT, stdout=sink, timeout=60, check=True)
        return Seen(collector, collector, log)


@pytest.mark.parametrize(
    ("answer", "error"),
    [("200", None), ("404", None), ("499", None), ("leaves", None), ("500", "500"), ("503", "503")],
)
def test_only_server_errors_mark_a_span_as_failed(answered: Seen, answer: str, error: str | None) -> None:
    [span] = answered.spans(f"GET {answer}")
    assert (span.status.code == Status.STATUS_CODE_ERROR) == (error is not None)
    assert attributes(span).get("error.type") == error


def test_a_request_with_two_traceparents_starts_a_trace_of_its_own(answered: Seen) -> None:
    [two], [one] = answered.spans("GET 201"), answered.spans("GET 202")
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == (TRACE, PARENT)
    assert two.parent_span_id == b""
    assert two.trace_id.hex() not in (TRACE, TRACE[::-1])


def test_tracing_is_begun_once(answered: Seen) -> None:
    exports = [ExportTraceServiceRequest.FromString(one.body) for one in answered.collector.received]
    resources = [attributes(resource.resource) for one in exports for resource in one.resource_spans]
    assert {said["service.name"] for said in resources} == {"billing-api"}


# Shutdown ----------------------------------------------------------------------------------------

TRACED_PROCESS = """
import sys
from time import monotonic
from billing import tracing
tracing.begin(sys.argv[1], "billing-worker")
with tracing.span("task"): pass
print(monotonic(), flush=True)
tracing.end()
"""


def shutdown(url: str) -> tuple[int, bool]:
    """The exit code of a process with a span for this collector, and whether it ended soon after its work."""
    ran = subprocess.run(
        [sys.executable, "-c", TRACED_PROCESS, url], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return ran.returncode, time.monotonic() - float(ran.stdout) < 3 * tracing.SHUTDOWN_SECONDS


def test_an_unreachable_collector_does_not_block_shutdown() -> None:
    url = f"http://127.0.0.1:{live.free_port()}"
    assert shutdown(url) == (0, True)


def test_a_hanging_collector_does_not_block_shutdown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert shutdown(url) == (0, True)


def test_a_server_shuts_down_cleanly_with_an_unreachable_collector(
    cluster: embedded.Cluster, worker_id: str, tmp_path: Path
) -> None:
    name, log, port = f"billing_untraced_{worker_id}", tmp_path / "log", live.free_port()
    clone(cluster, name)
    url = f"http://127.0.0.1:{port}"
    environ = {
        "PUBLIC_BASE_URL": url,
        "DATABASE_URL": database.url(cluster, database.APP, name),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{live.free_port()}",
    }
    command = [sys.executable, "-m", "billing.cli", "serve", "--no-worker", "--port", str(port)]
    with log.open("wb") as sink:
        server = subprocess.Popen(command, env={**os.environ, **environ}, stdout=sink, stderr=sink)
    try:
        live.await_ready(server, url)
        assert requests.get(f"{url}{API}/me/", timeout=30).status_code == 401
        server.send_signal(signal.SIGTERM)
        assert server.wait(live.STOP_SECONDS) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
    assert "a thread did not end" not in log.read_text()


def test_without_a_collector_spans_do_nothing() -> None:
    assert not tracing.is_on()
    with tracing.span("nothing", attributes={"of.this": "is told"}) as span:
        span.rename("something")
        span.set_attributes({"nor": "this"})
        span.fail("nor this")
    assert tracing.headers() == {}
