"""The store's connections and deferred writes."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.storage.driver import StorageError
from billing.storage.platform import Platform
from billing.storage.store import Store, TenantTx
from tests.conftest import Account

LATER, MUCH_LATER = datetime(2100, 1, 1, tzinfo=UTC), datetime(2101, 1, 1, tzinfo=UTC)


def backend(platform: Platform) -> int:
    """The PID of the backend."""
    [pid] = platform._connection.exec_driver_sql("SELECT pg_backend_pid()").one()
    return int(pid)


def test_the_most_recently_used_connection_is_taken_first(store: Store) -> None:
    """After a failover the others may each cost seconds: in turn, one good connection would not help."""
    with ExitStack() as stack:
        opened = {backend(stack.enter_context(store.platform())) for _ in range(3)}
    assert len(opened) == 3
    taken = set()
    for _ in range(3):
        with store.platform() as platform:
            taken.add(backend(platform))
    assert len(taken) == 1


def server_of(tx: TenantTx) -> int:
    """The PID of a transaction's backend."""
    return int(tx.tenants._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def end(superuser: Engine, *pids: int) -> None:
    with superuser.connect() as connection:
        for pid in pids:
            connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


def test_connections_lost_while_idle_are_replaced(store: Store, superuser: Engine) -> None:
    with store.tenant(new_id()) as one, store.tenant(new_id()) as other:
        lost = {server_of(one), server_of(other)}
    end(superuser, *lost)
    with store.tenant(new_id()) as one, store.tenant(new_id()) as other:
        assert not lost & {server_of(one), server_of(other)}
    with store.tenant(new_id()) as tx:
        lost = {server_of(tx)}
    end(superuser, *lost)
    store.require_ready()


@pytest.mark.parametrize("raises", [False, True])
def test_a_connection_lost_in_a_transaction_is_not_reused(
    store: Store, superuser: Engine, raises: bool
) -> None:
    with pytest.raises(DatabaseUnavailable), store.tenant(new_id()) as tx:
        end(superuser, server_of(tx))
        if raises:
            raise KeyError
    store.require_ready()


def test_a_lock_timeout_leaves_the_connection_usable(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with store.tenant(tenant_id, exclusive=True):
        with pytest.raises(DatabaseUnavailable), store.tenant(tenant_id, exclusive=True):
            pass
        with store.tenant(tenant_id) as tx:
            assert tx.tenants.get().id == tenant_id


def test_an_error_leaves_no_transaction_open(store: Store) -> None:
    with pytest.raises(KeyError), store.tenant(new_id(), exclusive=True) as tx:
        server = server_of(tx)
        raise KeyError
    with store.platform() as platform:
        assert backend(platform) == server
        state = "SELECT pg_current_xact_id_if_assigned(), app.current_tenant(), now() = statement_timestamp()"
        assert platform._connection.exec_driver_sql(state).one() == (None, None, True)


# Deferred writes -----------------------------------------------------------------------------------


def updated_at(store: Store, tenant_id: UUID) -> datetime:
    with store.tenant(tenant_id) as tx:
        return tx.tenants.get().updated_at


def test_a_deferred_write_is_visible_to_the_next_query_and_is_kept(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with store.tenant(tenant_id) as tx:
        tx.tenants.touch(LATER)
        assert tx.tenants.get().updated_at == LATER
        tx.tenants.touch(MUCH_LATER)
    assert updated_at(store, tenant_id) == MUCH_LATER


def test_deferred_writes_are_sent_in_one_message_with_the_commit(store: Store, acme: Account) -> None:
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        tx.tenants.touch(LATER)
        tx.tenants.touch(MUCH_LATER)
        connection = tx.tenants._connection.connection.dbapi_connection
        assert [b"UPDATE" in statement for statement in connection.deferred] == [True, True]  # type: ignore[union-attr]


def test_a_refused_write_raises_at_the_commit_and_nothing_is_kept(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with pytest.raises(StorageError, match="UniqueViolation"), store.tenant(tenant_id) as tx:
        [user] = tx.users.all()
        tx.tenants.touch(LATER)
        tx.users.add(user, password_hash="-")
    assert updated_at(store, tenant_id) < LATER


def test_an_error_discards_deferred_writes(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with pytest.raises(KeyError), store.tenant(tenant_id) as tx:
        tx.tenants.touch(LATER)
        raise KeyError
    assert updated_at(store, tenant_id) < LATER


def test_an_invalid_deferred_write_is_discarded_with_its_transaction(store: Store, acme: Account) -> None:
    with pytest.raises(ZeroDivisionError), store.tenant(UUID(acme.tenant["id"])) as tx:
        tx.tenants.set_tier("none that there is", LATER)
        raise ZeroDivisionError
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        assert tx.tenants.get().tier == "free"


def test_a_database_session_has_timeouts(store: Store) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    with store.tenant(new_id()) as tx:
        bounds = [tx.tenants._connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]
    assert bounds == ["5s", "2s", "10s"]


def test_parameters_of_a_failed_statement_are_not_in_its_error(store: Store) -> None:
    with pytest.raises(StorageError) as refused, store.tenant(new_id()) as tx:
        tx.tenants._connection.exec_driver_sql("SELECT 1 / length(%s) - 1 / 0", ("confidential",))
    assert "DivisionByZero" in str(refused.value.__cause__)
    assert "confidential" not in str(refused.value.__cause__)
