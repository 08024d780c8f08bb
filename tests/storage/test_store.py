"""The store's connections."""

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
    """The process at the other end."""
    [pid] = platform._connection.exec_driver_sql("SELECT pg_backend_pid()").one()
    return int(pid)


def test_the_connection_that_worked_last_is_taken_first(store: Store) -> None:
    """After a failover the others may each cost seconds: taken in turn, one good connection would help nobody."""
    with ExitStack() as stack:
        opened = {backend(stack.enter_context(store.platform())) for _ in range(3)}
    assert len(opened) == 3
    taken = set()
    for _ in range(3):
        with store.platform() as platform:
            taken.add(backend(platform))
    assert len(taken) == 1


def server_of(tx: TenantTx) -> int:
    """The process at the other end of a transaction."""
    return int(tx.tenants._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def end(superuser: Engine, *pids: int) -> None:
    with superuser.connect() as connection:
        for pid in pids:
            connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


def test_connections_that_were_lost_since_they_were_used_are_replaced(
    store: Store, superuser: Engine
) -> None:
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
def test_a_connection_that_is_lost_in_a_transaction_is_not_used_again(
    store: Store, superuser: Engine, raises: bool
) -> None:
    with pytest.raises(DatabaseUnavailable), store.tenant(new_id()) as tx:
        end(superuser, server_of(tx))
        if raises:
            raise KeyError
    store.require_ready()


def test_who_does_not_get_a_lock_leaves_the_connection_to_the_next(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with store.tenant(tenant_id, exclusive=True):
        with pytest.raises(DatabaseUnavailable), store.tenant(tenant_id, exclusive=True):
            pass
        with store.tenant(tenant_id) as tx:
            assert tx.tenants.get().id == tenant_id


def test_nothing_of_a_transaction_that_was_left_by_an_error_stays_open(store: Store) -> None:
    with pytest.raises(KeyError), store.tenant(new_id(), exclusive=True) as tx:
        server = server_of(tx)
        raise KeyError
    with store.platform() as platform:
        assert backend(platform) == server
        state = "SELECT pg_current_xact_id_if_assigned(), app.current_tenant(), now() = statement_timestamp()"
        assert platform._connection.exec_driver_sql(state).one() == (None, None, True)


# Writes that nobody waits for ----------------------------------------------------------------------


def updated_at(store: Store, tenant_id: UUID) -> datetime:
    with store.tenant(tenant_id) as tx:
        return tx.tenants.get().updated_at


def test_what_was_written_is_there_for_the_next_question_and_afterwards(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with store.tenant(tenant_id) as tx:
        tx.tenants.touch(LATER)
        assert tx.tenants.get().updated_at == LATER
        tx.tenants.touch(MUCH_LATER)
    assert updated_at(store, tenant_id) == MUCH_LATER


def test_what_was_written_goes_in_one_message_with_the_commit(store: Store, acme: Account) -> None:
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        tx.tenants.touch(LATER)
        tx.tenants.touch(MUCH_LATER)
        connection = tx.tenants._connection.connection.dbapi_connection
        assert [b"UPDATE" in statement for statement in connection.deferred] == [True, True]  # type: ignore[union-attr]


def test_a_write_that_is_refused_is_told_at_the_end_and_keeps_nothing(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with pytest.raises(StorageError, match="UniqueViolation"), store.tenant(tenant_id) as tx:
        [user] = tx.users.all()
        tx.tenants.touch(LATER)
        tx.users.add(user, password_hash="-")
    assert updated_at(store, tenant_id) < LATER


def test_a_write_of_a_transaction_that_raises_is_forgotten(store: Store, acme: Account) -> None:
    tenant_id = UUID(acme.tenant["id"])
    with pytest.raises(KeyError), store.tenant(tenant_id) as tx:
        tx.tenants.touch(LATER)
        raise KeyError
    assert updated_at(store, tenant_id) < LATER


def test_a_deferred_write_goes_with_its_transaction(store: Store, acme: Account) -> None:
    with pytest.raises(ZeroDivisionError), store.tenant(UUID(acme.tenant["id"])) as tx:
        tx.tenants.set_tier("none that there is", LATER)
        raise ZeroDivisionError
    with store.tenant(UUID(acme.tenant["id"])) as tx:
        assert tx.tenants.get().tier == "free"


def test_a_session_has_its_bounds(store: Store) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    with store.tenant(new_id()) as tx:
        bounds = [tx.tenants._connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]
    assert bounds == ["5s", "2s", "10s"]


def test_what_a_failed_statement_was_given_is_not_in_its_error(store: Store) -> None:
    with pytest.raises(StorageError) as refused, store.tenant(new_id()) as tx:
        tx.tenants._connection.exec_driver_sql("SELECT 1 / length(%s) - 1 / 0", ("confidential",))
    assert "DivisionByZero" in str(refused.value.__cause__)
    assert "confidential" not in str(refused.value.__cause__)
