"""Unexpected errors as a Sentry on loopback receives them: where they happened, and nothing secret."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.receivers import Received, answers, receiving

ROOT = Path(__file__).parents[1]
SECRET = "hunter2"
REQUEST_ID = "the-request-of-acme"

# A separate process: the library is global to a process. Everything that it could report contains the secret.
CRASH = """
import asyncio, sys
import httpx
from billing import crashes, logs
from billing.http.edge import Edge

logs.configure(tty=False)
crashes.begin(sys.argv[1], "production")

def below(password):
    local = {"token": password}
    try:
        raise KeyError(password, local)
    except KeyError as error:
        raise ValueError(f"no row for ada@acme.example with {password}") from error

async def app(scope, receive, send):
    scope["state"]["operation_id"] = "log_in"
    below("hunter2")

async def main():
    transport = httpx.ASGITransport(Edge(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://hunter2.example") as client:
        sent = {"X-Request-Id": "the-request-of-acme", "Authorization": "Bearer hunter2", "Cookie": "a=hunter2"}
        answer = await client.post("/hunter2?token=hunter2", headers=sent, json={"password": "hunter2"})
        assert answer.status_code == 500

asyncio.run(main())
"""

TASK = """
import sys
from datetime import UTC, datetime
from uuid import UUID
from billing import crashes
from billing.tasks import Task
from billing.worker import report

crashes.begin(sys.argv[1], "production")
task = Task(UUID(int=1), "webhook.deliver", UUID(int=2), "hunter2", "general", datetime.now(UTC), 1, 0)
report(task, RuntimeError("hunter2"))
"""

BEGUN_TWICE = """
import sys
from billing import crashes

crashes.begin(sys.argv[1], "production")
crashes.begin(sys.argv[1], "development")
crashes.report(RuntimeError("hunter2"))
"""


def reports_of(script: str) -> list[Received]:
    """What a process that runs this script reports to Sentry."""
    with receiving(answers()) as sentry:
        dsn = f"http://publickey@127.0.0.1:{sentry.port}/1"
        subprocess.run(
            [sys.executable, "-c", script, dsn], cwd=ROOT, check=True, capture_output=True, timeout=180
        )
        return list(sentry.received)


def items(received: Received) -> list[Any]:
    """The lines of Sentry's envelope."""
    body = gzip.decompress(received.body) if received.headers["content-encoding"] == "gzip" else received.body
    return [json.loads(line) for line in body.splitlines() if line]


@pytest.fixture(scope="module")
def crash() -> list[Received]:
    return reports_of(CRASH)


def test_an_error_is_reported_with_its_place_and_request(crash: list[Received]) -> None:
    [envelope] = crash
    event = items(envelope)[-1]
    assert [error["type"] for error in event["exception"]["values"]] == ["KeyError", "ValueError"]
    assert "below" in [
        frame["function"] for frame in event["exception"]["values"][-1]["stacktrace"]["frames"]
    ]
    assert event["tags"] == {"request_id": REQUEST_ID, "operation_id": "log_in"}
    assert event["environment"] == "production"
    assert envelope.path == "/api/1/envelope/"


def test_no_secret_is_reported(crash: list[Received]) -> None:
    for envelope in crash:
        text = json.dumps(items(envelope)) + str(envelope.headers)
        assert SECRET not in text
        assert "ada@acme.example" not in text
        assert not {"request", "user", "breadcrumbs", "modules", "server_name", "extra"} & set(
            items(envelope)[-1]
        )


def test_a_failed_task_is_reported_by_its_kind() -> None:
    [envelope] = reports_of(TASK)
    event = items(envelope)[-1]
    assert event["tags"]["task"] == "webhook.deliver"
    assert SECRET not in json.dumps(items(envelope))


def test_reporting_is_begun_once() -> None:
    [envelope] = reports_of(BEGUN_TWICE)
    assert items(envelope)[-1]["environment"] == "production"
