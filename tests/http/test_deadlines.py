"""Deadlines: a client is answered in time, and a hanging call keeps its place until it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import httpx
import orjson
import pytest
import structlog
from sqlalchemy import Engine, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import create_app
from billing.http.cors import Cors
from billing.http.deadlines import Deadline
from billing.http.edge import Edge
from billing.settings import Settings
from billing.storage.tables import tenants
from sandbox.faults import Fault
from sandbox.stripe import Sandbox
from tests.clock import TurnedClock
from tests.conftest import Account, CheckedClient
from tests.faults.stopping import stopped
from tests.rawhttp import Connection, request, serving

SHORT = 0.2
SOON = 10
ORIGIN = "https://app.acme.example"


@pytest.fixture
def events() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def wrapped(app: ASGIApp, seconds: float = SHORT) -> ASGIApp:
    """Wrap the application in the layers that surround ours."""
    return Edge(Cors(Deadline(app, seconds=seconds), [ORIGIN]))


def messages_of(app: ASGIApp) -> list[Message]:
    """Return the messages the application sends."""
    return asyncio.run(exchange(app))


async def exchange(app: ASGIApp) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"origin", ORIGIN.encode())]
    scope = {"type": "http", "method": "GET", "path": "/a/", "query_string": b"", "headers": headers}
    await app({**scope, "client": None}, receive, send)
    return sent


async def hang(_scope: Scope, _receive: Receive, _send: Send) -> None:
    await asyncio.Event().wait()


async def hang_after_start(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.Event().wait()


async def hang_midway(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(2 * SHORT)
    await send({"type": "http.response.body", "body": b"done"})


def is_deadline_exceeded(sent: list[Message]) -> bool:
    start, body = sent
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"5"
    assert headers[b"access-control-allow-origin"] == ORIGIN.encode()
    problem = orjson.loads(body["body"])
    assert problem["request_id"] == headers[b"x-request-id"].decode()
    return (start["status"], problem["code"]) == (503, "deadline-exceeded")


# The response ------------------------------------------------------------------------------------


def test_a_hanging_request_is_answered_with_a_problem_and_logged(events: list[Any]) -> None:
    started = perf_counter()
    assert is_deadline_exceeded(messages_of(wrapped(hang)))
    assert SHORT <= perf_counter() - started < SOON
    assert [(event["event"], event.get("status")) for event in events] == [
        ("deadline-exceeded", None),
        ("request", 503),
    ]


def test_a_response_that_has_started_is_not_interrupted() -> None:
    start, body = messages_of(wrapped(hang_midway))
    assert (start["status"], body["body"]) == (200, b"done")


def test_a_response_begun_at_the_cancellation_is_no_crash(events: list[Any]) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise

    [start] = messages_of(wrapped(app))
    assert start["status"] == 200
    assert [event["event"] for event in events] == ["deadline-exceeded", "request"]


def test_500_for_a_timeout_error_raised_by_the_application(events: list[Any]) -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise TimeoutError

    start, _ = messages_of(wrapped(app))
    assert start["status"] == 500
    assert "request failed" in [event["event"] for event in events]


def test_a_request_cancelled_at_shutdown_is_answered_too() -> None:
    async def scenario() -> list[Message]:
        task = asyncio.create_task(exchange(wrapped(hang, seconds=SOON)))
        await asyncio.sleep(SHORT)
        task.cancel()
        return await task

    assert is_deadline_exceeded(asyncio.run(scenario()))


def test_a_response_that_has_started_is_cancelled_at_shutdown_and_not_logged_as_late(
    events: list[Any],
) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(exchange(Deadline(hang_after_start, seconds=SOON)))
        await asyncio.sleep(SHORT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert not events


def test_each_request_has_a_deadline_of_its_own() -> None:
    async def scenario() -> float:
        seconds = 10 * SHORT
        app = wrapped(hang, seconds)
        first = asyncio.create_task(exchange(app))
        await asyncio.sleep(SHORT)
        started = perf_counter()
        await asyncio.gather(first, exchange(app))
        return perf_counter() - started

    assert asyncio.run(scenario()) < 17 * SHORT


def test_a_lifespan_has_no_deadline() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.sleep(2 * SHORT)

    asyncio.run(Deadline(app, seconds=SHORT)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]


def test_the_connection_stays_usable_after_a_deadline() -> None:
    with serving(wrapped(hang), lifespan="off") as address, Connection(address) as connection:
        for _ in range(2):
            connection.send(request("GET", "/a/"))
            assert connection.receive().code == "deadline-exceeded"


# The whole application ---------------------------------------------------------------------------


@pytest.fixture
def hurried(settings: Settings, clock: TurnedClock, acme: Account) -> Iterator[Account]:
    """Acme at an application with one thread and a deadline shorter than any wait for a lock."""
    short = replace(settings, request_timeout_seconds=1, worker_threads=1)
    with CheckedClient(create_app(short, clock=clock), raise_server_exceptions=False) as client:
        yield replace(acme, client=client)


@contextmanager
def holding_the_lock(superuser: Engine) -> Iterator[None]:
    with superuser.begin() as connection:
        connection.execute(select(tenants.c.id).with_for_update())
        yield


def revoke(account: Account) -> httpx.Response:
    return account.post("/api-keys/revoke/", {"key_type": "all", "confirm": True})


def test_a_request_waiting_for_a_lock_meets_the_deadline_and_can_be_retried(
    hurried: Account, superuser: Engine
) -> None:
    with holding_the_lock(superuser):
        started = perf_counter()
        late = revoke(hurried)
        assert 1 <= perf_counter() - started < SOON
    assert (late.status_code, late.json()["code"]) == (503, "deadline-exceeded")
    assert late.headers["retry-after"] == "5"
    # The one thread is free again, whether or not the first request took effect.
    assert hurried.get("/api-keys/").status_code == 200
    assert revoke(hurried).status_code == 200


def test_503_within_the_deadline_when_the_database_server_is_stopped(
    hurried: Account, superuser: Engine
) -> None:
    assert hurried.get("/api-keys/").status_code == 200
    with stopped(superuser):
        late = hurried.get("/api-keys/")
    assert (late.status_code, late.json()["code"]) == (503, "deadline-exceeded")
    assert hurried.get("/api-keys/").status_code == 200


def test_503_within_the_deadline_when_stripe_hangs(
    settings: Settings, clock: TurnedClock, acme: Account, stripe: Sandbox
) -> None:
    at_stripe = replace(
        settings,
        request_timeout_seconds=1,
        stripe_secret_key=stripe.secret_key,
        stripe_connect_client_id=stripe.client_id,
        stripe_api_base=stripe.url,
        stripe_connect_base=stripe.url,
    )
    stripe.faults.always("create_account", Fault.HANG)
    with CheckedClient(create_app(at_stripe, clock=clock), raise_server_exceptions=False) as client:
        late = replace(acme, client=client).post("/stripe/connect/", {"flow": "account_link"})
        assert (late.status_code, late.json()["code"]) == (503, "deadline-exceeded")


# Process exit ------------------------------------------------------------------------------------

HANGING = """
import threading, time
from billing.threads import end_with_main_thread
threading.Thread(target=time.sleep, args=({seconds},)).start()
end_with_main_thread(0.3)
time.sleep(0.6)
print("main has ended", flush=True)
"""


@pytest.mark.parametrize(("seconds", "code"), [(60, 1), (0.1, 0)])
def test_a_hanging_thread_does_not_block_process_exit(seconds: float, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING.format(seconds=seconds)], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == code
    assert ended.stdout.startswith("main has ended\n")
    assert ("a thread did not end" in ended.stdout + ended.stderr) == bool(code)


HANGING_CALL = """
import asyncio, time
from billing.http.lanes import Lane, Lanes
async def main():
    call = asyncio.create_task(Lanes({Lane.GENERAL: 1}).run(Lane.GENERAL, lambda: time.sleep(60)))
    await asyncio.sleep(0.2)
    call.cancel()
asyncio.run(main())
print("main has ended", flush=True)
"""


def test_a_hanging_call_does_not_block_process_exit() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING_CALL], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "main has ended\n")
