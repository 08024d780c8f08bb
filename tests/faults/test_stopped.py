"""PostgreSQL's processes stop under a running server: it answers every call, and uses other connections."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import environ

import pytest
import requests
from sqlalchemy import Engine, create_engine

from billing.cli.serve import DRAIN_SECONDS
from billing.storage import database, embedded
from billing.storage.async_pool import ANSWERING_SECONDS
from billing.storage.watchdog import STATEMENT_SECONDS
from tests.conftest import API, PASSWORD, clone
from tests.faults.stopping import stopped
from tests.live import await_ready, free_port

TIMEOUT_SECONDS = 2
THREADS = 2
CALLS = 12
# What a busy machine may add: less than any other limit of a call, and less than a drain.
SLACK_SECONDS = 3.5
ENDING_SECONDS = 10


@dataclass
class Running:
    """A server with few threads, and a database of its own."""

    process: subprocess.Popen[bytes]
    url: str
    superuser: Engine
    token: str = ""

    def keys(self) -> tuple[int, float]:
        """The status of a request for the keys, and the seconds it took."""
        started = time.perf_counter()
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.get(f"{self.url}{API}/api-keys/", headers=headers, timeout=60)
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) > 0
        return answer.status_code, time.perf_counter() - started

    def many(self) -> list[tuple[int, float]]:
        with ThreadPoolExecutor(CALLS) as pool:
            return list(pool.map(lambda _: self.keys(), range(CALLS)))

    def end(self) -> float:
        """SIGTERM; the seconds until the server has stopped."""
        started = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(2 * DRAIN_SECONDS)
        return time.perf_counter() - started


@pytest.fixture
def server(cluster: embedded.Cluster, worker_id: str) -> Iterator[Running]:
    name = f"billing_stopped_{worker_id}"
    clone(cluster, name)
    port = free_port()
    ours = {
        "DATABASE_URL": database.url(cluster, database.APP, name),
        "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "WORKER_THREADS": str(THREADS),
    }
    command = [sys.executable, "-m", "billing.cli", "serve", "--no-worker", "--port", str(port)]
    process = subprocess.Popen(command, env={**environ, **ours})
    superuser = create_engine(cluster.url(name))
    running = Running(process, f"http://127.0.0.1:{port}", superuser)
    try:
        await_ready(process, running.url)
        body = {"company_name": "Acme Inc.", "email": "ada@acme.example", "password": PASSWORD}
        registered = requests.post(f"{running.url}{API}/register/", json=body, timeout=10).json()
        running.token = registered["tokens"]["access"]
        yield running
    finally:
        process.kill()
        process.wait()
        superuser.dispose()


def test_calls_are_answered_and_threads_recover_while_postgresql_is_stopped(server: Running) -> None:
    assert {status for status, _ in server.many()} == {200}
    with stopped(server.superuser) as pids:
        assert len(pids) > THREADS
        answers = server.many()
        assert {status for status, _ in answers} == {503}
        assert max(seconds for _, seconds in answers) < TIMEOUT_SECONDS + SLACK_SECONDS < ANSWERING_SECONDS
        # Every thread hangs. Once the watchdog has run the same calls succeed, over other connections.
        until = time.monotonic() + 3 * STATEMENT_SECONDS
        while 503 in {status for status, _ in server.many()}:
            assert time.monotonic() < until, "the threads did not come free"
        assert requests.get(f"{server.url}/readyz", timeout=60).status_code == 200
    assert server.end() < ENDING_SECONDS


def test_the_server_stops_while_a_call_in_flight_hangs(server: Running) -> None:
    server.many()
    with stopped(server.superuser):
        outcome: list[tuple[int, float]] = []
        caller = threading.Thread(target=lambda: outcome.append(server.keys()))
        caller.start()
        time.sleep(0.5)
        assert server.end() < STATEMENT_SECONDS + ENDING_SECONDS
        caller.join()
        assert [status for status, _ in outcome] == [503]
