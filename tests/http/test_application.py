"""The whole stack: behaviour that no single layer shows."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import anyio
import pytest
import structlog
from anyio import to_thread
from sqlalchemy import create_engine, text
from starlette.testclient import TestClient

from app import create_app, keep_flushing
from billing.settings import Settings
from billing.storage.store import Store
from tests.conftest import API, Account, TestDatabase, log_in, register

CONFIGURED_ORIGIN = {"Origin": "https://app.acme.example"}


@pytest.mark.parametrize("path", ["/openapi.json", "/openapi.yaml", f"{API}/me/", "/nowhere"])
def test_a_configured_origin_is_allowed_once(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=CONFIGURED_ORIGIN)
    assert answer.headers.get_list("access-control-allow-origin") == [CONFIGURED_ORIGIN["Origin"]]
    assert answer.headers["access-control-allow-credentials"] == "true"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.acme.example.evil.example"])
def test_an_unknown_origin_is_not_allowed(client: TestClient, origin: str) -> None:
    answer = client.get(f"{API}/me/", headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("base_url", "is_sent"), [("https://billing.example", True), ("http://127.0.0.1", False)]
)
def test_hsts_is_sent_when_the_public_address_is_https(
    settings: Settings, base_url: str, is_sent: bool
) -> None:
    client = TestClient(create_app(replace(settings, public_base_url=base_url)))
    for path in ("/", "/healthz", "/nowhere"):
        assert ("strict-transport-security" in client.get(path).headers) == is_sent


class FailingNotes:
    """Notes that cannot be flushed, for an unforeseen reason."""

    def __init__(self) -> None:
        self.tries = 0
        self.tried = threading.Event()

    def flush(self, store: Store) -> None:  # noqa: ARG002 - other notes write to it
        self.tries += 1
        if self.tries == 2:
            self.tried.set()
        raise ZeroDivisionError


def test_a_failed_flush_of_notes_is_retried_whatever_the_error(store: Store) -> None:
    async def keep(notes: FailingNotes) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_flushing, [notes], store)
            await to_thread.run_sync(notes.tried.wait, 30)
            tasks.cancel_scope.cancel()

    notes = FailingNotes()
    with structlog.testing.capture_logs() as events:
        anyio.run(keep, notes)
    assert notes.tried.is_set()
    assert events[0]["event"] == "notes were not written down"


@pytest.fixture
def read_only(test_database: TestDatabase) -> object:
    """Makes the database refuse writes, as one that was demoted to a replica does, and lets it write again."""
    engine = create_engine(test_database.superuser_url, isolation_level="AUTOCOMMIT")

    def switch(value: str) -> None:
        name = engine.url.database
        with engine.connect() as connection:
            connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}'))
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))

    yield switch
    switch("off")
    engine.dispose()


def test_503_while_the_database_is_read_only(acme: Account, read_only: object) -> None:
    read_only("on")  # type: ignore[operator]
    # A key's use is noted in the background: that fails now, and must not stop the server.
    acme.client.get(f"{API}/verify/", headers={"X-API-Key": acme.tenant["api_key_secret"]})
    refused = log_in(acme.client, acme.email)
    time.sleep(1.5)
    assert (refused.status_code, refused.json()["code"]) == (503, "database-unavailable")
    assert int(refused.headers["retry-after"]) > 0
    read_only("off")  # type: ignore[operator]
    assert register(acme.client, "Globex Ltd.").status_code == 201
    assert (
        acme.client.get(f"{API}/verify/", headers={"X-API-Key": acme.tenant["api_key_secret"]}).status_code
        == 200
    )


def test_503_when_a_lock_is_not_released_in_time(acme: Account, test_database: TestDatabase) -> None:
    engine = create_engine(test_database.superuser_url)
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
        answer = acme.get("/api-keys/")
    engine.dispose()
    assert (answer.status_code, answer.json()["code"]) == (503, "database-unavailable")
    assert acme.get("/api-keys/").status_code == 200
