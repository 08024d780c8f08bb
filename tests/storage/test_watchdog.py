"""No thread waits for the database without limit: a stopped server, a held lock, an empty pool."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from uuid import UUID

import pytest
from sqlalchemy import Engine

from billing import tenants
from billing.encryption import Vault
from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage import watchdog
from billing.storage.store import Store, TenantTx
from tests.conftest import TestDatabase
from tests.faults.stopping import stopped

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
STATEMENT_SECONDS = 0.8
# Long for a busy machine, and short compared with waiting for ever.
SOON = 10


@pytest.fixture
def impatient(settings: Settings, test_database: TestDatabase, clean: None) -> Iterator[Store]:
    """A store on one connection, which waits for a statement for less than a second."""
    store = Store(
        Vault(settings.encryption_keys),
        connections=1,
        pool_wait_seconds=0.2,
        statement_seconds=STATEMENT_SECONDS,
    )
    store.open(test_database.app_url)
    yield store
    store.close()


def ask(tx: TenantTx) -> None:
    tx.users.password_hash(new_id())


STEPS: dict[str, Callable[[TenantTx], None]] = {
    "a question": ask,
    "a lock": lambda tx: tx.webhooks.find(lock=True),
    "the commit": lambda _: None,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_stopped_server_does_not_hold_a_thread(impatient: Store, superuser: Engine, step: str) -> None:
    with ExitStack() as meanwhile:
        started = perf_counter()
        with pytest.raises(DatabaseUnavailable), impatient.tenant(new_id()) as tx:
            meanwhile.enter_context(stopped(superuser))
            STEPS[step](tx)
        assert STATEMENT_SECONDS < perf_counter() - started < SOON
        impatient.require_ready()


def test_a_pooled_connection_to_a_stopped_server_is_replaced(impatient: Store, superuser: Engine) -> None:
    impatient.require_ready()
    with stopped(superuser):
        started = perf_counter()
        impatient.require_ready()
        assert STATEMENT_SECONDS < perf_counter() - started < SOON


def test_a_pause_between_two_statements_does_not_time_out(impatient: Store) -> None:
    with impatient.tenant(new_id()) as tx:
        threading.Event().wait(STATEMENT_SECONDS * 1.5)
        tx.users.all()


def test_a_closed_store_still_frees_a_hanging_thread(impatient: Store, superuser: Engine) -> None:
    with ExitStack() as meanwhile, pytest.raises(DatabaseUnavailable), impatient.tenant(new_id()) as tx:
        meanwhile.enter_context(stopped(superuser))
        impatient.close()
        ask(tx)


def test_the_watchdog_ends_with_the_store(impatient: Store) -> None:
    before = watchdogs()
    impatient.require_ready()
    (thread,) = watchdogs() - before
    impatient.close()
    thread.join(SOON)
    assert not thread.is_alive()


def watchdogs() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "statements"}


def test_a_socket_closed_meanwhile_is_not_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watched = watchdog.WatchedSocket(ours.fileno(), STATEMENT_SECONDS)
        watched.close()
        watched.cut()
        theirs.sendall(b"still there")
        assert ours.recv(100) == b"still there"


def test_a_socket_answered_meanwhile_is_not_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watched = watchdog.WatchedSocket(ours.fileno(), STATEMENT_SECONDS)
        with watched:
            pass
        watched.cut()
        theirs.sendall(b"still there")
        assert ours.recv(100) == b"still there"
        watched.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_closing_the_store_closes_its_socket(impatient: Store) -> None:
    impatient.require_ready()
    before = sockets()
    impatient.close()
    assert len(before - sockets()) == 1


def sockets() -> set[str]:
    """The sockets of this process, each once however many descriptors it has."""
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return {target for target in (str(link.readlink()) for link in links) if target.startswith("socket:")}


def test_a_held_lock_is_waited_for_two_seconds(store: Store, settings: Settings) -> None:
    tenant_id = register(store, settings)
    with store.tenant(tenant_id, exclusive=True):
        started = perf_counter()
        with pytest.raises(DatabaseUnavailable), store.tenant(tenant_id, exclusive=True):
            pass
        assert 1.5 < perf_counter() - started < SOON


def register(store: Store, settings: Settings) -> UUID:
    details = {"company_name": "Acme", "email": "ada@acme.example"}
    with store.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def test_an_empty_pool_is_waited_for_no_longer_than_configured(impatient: Store) -> None:
    with impatient.tenant(new_id()):
        started = perf_counter()
        with pytest.raises(DatabaseUnavailable):
            impatient.require_ready()
        assert 0.1 < perf_counter() - started < SOON
