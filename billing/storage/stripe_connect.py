"""The shelf of a tenant's Stripe connection, and of the states that lead to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from sqlalchemy import and_, bindparam, delete, select, update
from sqlalchemy.dialects.postgresql import insert

from billing.errors import StateUnknown
from billing.storage.shelf import Shelf, batch_of, columns_of, of_tenant, values_of
from billing.storage.tables import connect_states, stripe_connections
from billing.stripe_connect import Account, Connection, RequirementError, Requirements, State

COLUMNS = columns_of(Connection, stripe_connections)
FIND = select(*COLUMNS).where(of_tenant(stripe_connections))
NEW = insert(stripe_connections)
KEEP = NEW.on_conflict_do_update(
    index_elements=[stripe_connections.c.tenant_id],
    set_={column.name: NEW.excluded[column.name] for column in COLUMNS},
)
STATE_COLUMNS = columns_of(State, connect_states)
IS_NAMED = and_(of_tenant(connect_states), connect_states.c.id == bindparam("state_id"))
LOCK_STATE = select(*STATE_COLUMNS).where(IS_NAMED).with_for_update()
CONSUME_STATE = update(connect_states).where(IS_NAMED)
# In the past by every machine's clock.
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
END_STATES = (
    update(connect_states)
    .where(of_tenant(connect_states), connect_states.c.expires_at > LONG_AGO)
    .values(expires_at=LONG_AGO)
)
END_UNUSED_STATES = END_STATES.where(connect_states.c.consumed_at.is_(None))
END_STATES_OF = END_STATES.where(connect_states.c.user_id == bindparam("whose"))
IS_OLD = connect_states.c.created_at < bindparam("before")
FORGET_STATES = (
    delete(connect_states).where(batch_of(connect_states, IS_OLD)).returning(connect_states.c.digest)
)


def connection_of(row: Sequence[Any]) -> Connection:
    """Build the connection from a row of `COLUMNS`."""
    found = Connection(*row)
    return replace(found, account=account_of(cast("Mapping[str, Any]", found.account)))


def account_of(stored: Mapping[str, Any]) -> Account:
    """Build the account from the JSON that `asdict` made of it."""
    requirements = stored["requirements"]
    errors = tuple(RequirementError(**error) for error in requirements["errors"])
    return Account(**{**stored, "requirements": Requirements(**{**requirements, "errors": errors})})


class StripeConnect(Shelf):
    """At most one connection, and the connect states of the last day."""

    def find(self) -> Connection | None:
        """The current connection, or the last one if it has ended."""
        row = self.run(FIND).one_or_none()
        return connection_of(row) if row else None

    def keep(self, connection: Connection) -> None:
        """Store a connection in place of the previous one."""
        values = values_of(connection, stripe_connections) | {"account": asdict(connection.account)}
        self.run(KEEP, tenant_id=self._tenant_id, **values)

    def add_state(self, state: State) -> None:
        self.insert(connect_states, values_of(state, connect_states))

    def end_unused_states(self) -> None:
        """End the states that no callback has brought back yet."""
        self.run(END_UNUSED_STATES)

    def end_states_of(self, user_id: UUID) -> None:
        """End the states of a user, also one whose callback is waiting for Stripe at this moment."""
        self.run(END_STATES_OF, whose=user_id)

    def forget_states(self, before: datetime) -> list[str]:
        """Delete states made before this time, up to `BATCH_ROWS`; returns their digests."""
        return list(self.run(FORGET_STATES, before=before).scalars())

    def lock_state(self, id: UUID) -> State:
        """Return the state, locked until the transaction ends; raises `StateUnknown`."""
        row = self.run(LOCK_STATE, state_id=id).one_or_none()
        if row is None:
            raise StateUnknown
        return State(*row)

    def consume_state(self, id: UUID, now: datetime) -> None:
        self.run(CONSUME_STATE, state_id=id, consumed_at=now)
