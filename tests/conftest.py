"""One PostgreSQL for all tests, a database for each worker, and every answer checked against the document."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

# `import app` reads the environment: settings of this machine must not be in it.
if "BILLING_TEST_STATE" not in os.environ:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    os.environ["BILLING_TEST_STATE"] = tempfile.mkdtemp(prefix="billing-tests-", dir=memory)
    Path(os.environ["BILLING_TEST_STATE"]).chmod(0o711)
    atexit.register(shutil.rmtree, os.environ["BILLING_TEST_STATE"], ignore_errors=True)
STATE = Path(os.environ["BILLING_TEST_STATE"])
os.environ.update(BILLING_STATE_DIR=str(STATE), PASSWORD_COST="4", ENVIRONMENT="development")

import httpx
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import IntegrityError
from starlette.testclient import TestClient

from app import create_app
from billing.counters import InProcess
from billing.encryption import Vault
from billing.settings import Settings
from billing.storage import database, embedded
from billing.storage.store import Store
from billing.storage.tables import metadata
from sandbox.stripe import Sandbox
from tests import answers, live
from tests.clock import TurnedClock
from tests.receivers import HangingNames

API = "/api/v1/auth/tenants"
PASSWORD = "SecurePass123!"
TEMPLATE = "billing_template"
# The rows of a test need not survive a crash of the machine.
VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}


# The database ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster() -> Iterator[embedded.Cluster]:
    """The PostgreSQL of this run, shared by its workers; BILLING_PG_BIN selects another version."""
    chosen = os.environ.get("BILLING_PG_BIN")
    with embedded.start(STATE / "pg", bin_dir=Path(chosen) if chosen else None, options=VOLATILE) as server:
        database.prepare(server.cluster, TEMPLATE)
        yield server.cluster


@dataclass(frozen=True)
class TestDatabase:
    """One database, as each of the roles sees it."""

    __test__ = False

    app_url: str
    owner_url: str
    superuser_url: str


@pytest.fixture(scope="session")
def test_database(cluster: embedded.Cluster, worker_id: str) -> TestDatabase:
    """A database of this worker's own, cloned from the migrated template."""
    name = f"billing_{worker_id}"
    clone(cluster, name)
    return TestDatabase(
        database.url(cluster, database.APP, name),
        database.url(cluster, database.OWNER, name),
        cluster.url(name),
    )


def clone(cluster: embedded.Cluster, name: str) -> None:
    engine = create_engine(cluster.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # One at a time: a template must have no other connection.
        connection.execute(text("SELECT pg_advisory_lock(1)"))
        connection.exec_driver_sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.exec_driver_sql(f'CREATE DATABASE "{name}" TEMPLATE {TEMPLATE} OWNER {database.OWNER}')
    engine.dispose()


@pytest.fixture(scope="session")
def superuser(test_database: TestDatabase) -> Iterator[Engine]:
    """An engine that sees all rows, to examine what is really stored."""
    engine = create_engine(test_database.superuser_url, pool_pre_ping=True)
    yield engine
    engine.dispose()


@pytest.fixture
def clean(superuser: Engine) -> Iterator[None]:
    """Empties the tables after the test."""
    yield
    try:
        empty(superuser)
    except IntegrityError:
        # A failed login was audited at that moment. The next one will find no tenant.
        empty(superuser)


def empty(superuser: Engine) -> None:
    with superuser.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


@pytest.fixture(scope="session")
def settings(test_database: TestDatabase) -> Settings:
    environ = {
        "BILLING_STATE_DIR": str(STATE),
        "DATABASE_URL": test_database.app_url,
        "PASSWORD_COST": "4",
        "PUBLIC_BASE_URL": "http://testserver",
        "CORS_ALLOWED_ORIGINS": "https://app.acme.example",
        # `COMPILED_OPERATIONS=off make unit` runs everything through Connexion's own stack.
        "COMPILED_OPERATIONS": os.environ.get("COMPILED_OPERATIONS", "on"),
    }
    return Settings.load(environ, dotenv=None)


@pytest.fixture
def store(settings: Settings, test_database: TestDatabase, clean: None) -> Iterator[Store]:
    store = Store(Vault(settings.encryption_keys), connections=4)
    store.open(test_database.app_url)
    yield store
    store.close()


# The API -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def clock(shared_clock: TurnedClock) -> TurnedClock:
    shared_clock.reset()
    return shared_clock


@pytest.fixture(scope="session")
def shared_counters() -> InProcess:
    """The counts of the limits, shared by all applications of the run."""
    return InProcess()


@pytest.fixture
def uncounted(shared_counters: InProcess) -> None:
    """Limits are on, as in production; each test starts with nothing counted."""
    shared_counters.counts.clear()


@pytest.fixture(scope="session")
def running_app(
    settings: Settings, shared_clock: TurnedClock, shared_counters: InProcess
) -> Iterator[TestClient]:
    app = create_app(settings, clock=shared_clock, counters=shared_counters)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(running_app: TestClient, clock: TurnedClock, uncounted: None, clean: None) -> TestClient:
    """A client whose every answer is checked against the document."""
    running_app.cookies.clear()
    return running_app


@pytest.fixture
def flooded(settings: Settings, clock: TurnedClock, clean: None) -> Iterator[TestClient]:
    """A client of a server without limits."""
    app = create_app(replace(settings, rate_limits=False), clock=clock)
    with CheckedClient(app, raise_server_exceptions=False) as client:
        yield client


class CheckedClient(TestClient):
    """Starlette's test client; it checks every answer against the document."""

    def request(self, method: str, url: Any, **kwargs: Any) -> httpx.Response:
        response = super().request(method, url, **kwargs)
        answers.check(response)
        return response


@pytest.fixture(scope="session")
def running_stripe() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def stripe(running_stripe: Sandbox) -> Iterator[Sandbox]:
    """Stripe on loopback, reset after each test."""
    yield running_stripe
    running_stripe.reset()


@pytest.fixture(scope="session")
def live_server_url(cluster: embedded.Cluster, worker_id: str) -> Iterator[str]:
    """A running server, on a database of its own."""
    name = f"billing_live_{worker_id}"
    clone(cluster, name)
    with live.serving({"DATABASE_URL": database.url(cluster, database.APP, name)}) as url:
        yield url


@dataclass
class Account:
    """A registered tenant, with calls by its owner."""

    client: TestClient
    registered: dict[str, Any]

    @property
    def tenant(self) -> dict[str, Any]:
        return self.registered["tenant"]

    @property
    def email(self) -> str:
        return self.registered["user"]["email"]

    @property
    def tokens(self) -> dict[str, str]:
        return self.registered["tokens"]

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.client.get(f"{API}{path}", headers=bearer(self.tokens["access"]), **kwargs)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(f"{API}{path}", headers=bearer(self.tokens["access"]), json=body)

    def regenerate(self, key_type: str = "all", **more: Any) -> dict[str, Any]:
        return self.post("/api-keys/regenerate/", {"key_type": key_type, "confirm": True, **more}).json()

    def revoke(self, key_type: str = "all", **more: Any) -> dict[str, Any]:
        return self.post("/api-keys/revoke/", {"key_type": key_type, "confirm": True, **more}).json()


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def register(client: TestClient, company_name: str = "Acme Inc.", **more: Any) -> httpx.Response:
    name = (company_name.split() or ["nameless"])[0].lower()
    body = {"company_name": company_name, "email": f"ada@{name}.example", "password": PASSWORD, **more}
    return client.post(f"{API}/register/", json=body)


def log_in(client: TestClient, email: str, password: str = PASSWORD) -> httpx.Response:
    return client.post(f"{API}/login/", json={"email": email, "password": password})


@pytest.fixture
def acme(client: TestClient) -> Account:
    return Account(client, register(client).json())


@pytest.fixture
def globex(client: TestClient) -> Account:
    return Account(client, register(client, "Globex Ltd.").json())


@pytest.fixture
def hanging_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A lookup of `hangs.example` returns when this is set, that of `good.example` at once."""
    names = HangingNames({"good.example": ["127.0.0.1"]})
    monkeypatch.setattr(socket, "getaddrinfo", names)
    yield names.freed
    names.freed.set()


def waits_for_a_lock(superuser: Engine) -> bool:
    """Whether any session of this database waits for a lock; `pg_locks` covers the whole cluster."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with superuser.connect() as connection:
        return bool(connection.scalar(text(query)))
