"""kill -9 of the server, of the watcher, of PostgreSQL: the service returns, with all acknowledged writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from tests.conftest import API, PASSWORD
from tests.live import await_ready, free_port

RECOVERY_SECONDS = 20


@dataclass
class Installation:
    """A server on an embedded PostgreSQL of its own, as `make serve` starts it."""

    state_dir: Path
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> subprocess.Popen[bytes]:
        environ = {
            **os.environ,
            "BILLING_STATE_DIR": str(self.state_dir),
            "PASSWORD_COST": "4",
            "RATE_LIMITS": "off",
        }
        environ.pop("DATABASE_URL", None)
        command = [sys.executable, "-m", "billing.cli", "serve", "--port", str(self.port)]
        process = subprocess.Popen(command, env=environ, start_new_session=True)
        await_ready(process, self.url)
        return process

    def postgres(self) -> int:
        return int((self.state_dir / "postgres/data/postmaster.pid").read_text().split()[0])

    def watcher(self) -> int:
        return int(Path(f"/proc/{self.postgres()}/stat").read_text().rpartition(")")[2].split()[1])

    def log_in(self, email: str) -> int:
        body = {"email": email, "password": PASSWORD}
        return requests.post(f"{self.url}{API}/login/", json=body, timeout=10).status_code


@pytest.fixture
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    state_dir = Path(os.environ["BILLING_TEST_STATE"]) / f"kill-{os.getpid()}-{time.monotonic_ns()}"
    state_dir.mkdir()
    return Installation(state_dir)


@contextmanager
def registering(installation: Installation) -> Iterator[list[str]]:
    """Register tenants as fast as they are answered; the list grows by each acknowledged email."""
    acknowledged: list[str] = []
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            email = f"ada{number}@acme.example"
            body = {"company_name": "Acme Inc.", "email": email, "password": PASSWORD}
            try:
                answer = requests.post(f"{installation.url}{API}/register/", json=body, timeout=10)
            except requests.RequestException:
                time.sleep(0.05)
                continue
            if answer.status_code == 201:
                acknowledged.append(email)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield acknowledged
    finally:
        stop.set()
        worker.join()


def await_more(acknowledged: list[str], than: int) -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while len(acknowledged) <= than:
        assert time.monotonic() < deadline, "nothing was acknowledged any more"
        time.sleep(0.02)


def log_in(installation: Installation, email: str) -> int:
    """A login's status, retried while it is 503: what was still served after the kill may end a little later."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while (status := installation.log_in(email)) == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    return status


VICTIMS: dict[str, Callable[[Installation, int], int]] = {
    "postgres": lambda installation, _: installation.postgres(),
    "watcher": lambda installation, _: installation.watcher(),
    "server": lambda _, server: server,
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_no_acknowledged_registration_is_lost(installation: Installation, victim: str) -> None:
    server = installation.start()
    try:
        with registering(installation) as acknowledged:
            await_more(acknowledged, 5)
            os.kill(VICTIMS[victim](installation, server.pid), signal.SIGKILL)
            if victim == "server":
                server.wait(10)
                server = installation.start()
            await_more(acknowledged, len(acknowledged) + 5)
        assert {log_in(installation, email) for email in acknowledged} == {200}
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_a_repeated_request_gets_the_answer_that_a_kill_lost(installation: Installation) -> None:
    body = {"company_name": "Acme Inc.", "email": "ada@acme.example", "password": PASSWORD}

    def register() -> requests.Response:
        headers = {"Idempotency-Key": "one"}
        return requests.post(f"{installation.url}{API}/register/", json=body, headers=headers, timeout=10)

    server = installation.start()
    try:
        lost = register()
        server.kill()
        server.wait(10)
        server = installation.start()
        again = register()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    assert (again.status_code, again.content) == (201, lost.content)
    assert "idempotent-replayed" not in lost.headers
    assert again.headers["idempotent-replayed"] == "true"
