"""The shelf of a tenant's Stripe connection, and of the states that lead to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from sqlalchemy import and_, delete, select
from sqlalchemy.dialects.postgresql import insert

from billing.errors import StateUnknown
from billing.storage.shelf import AT_ONCE, Shelf, columns_of, values_of
from billing.storage.tables import connect_states, stripe_connections
from billing.stripe_connect import Account, Connection, RequirementError, Requirements, State

COLUMNS = columns_of(Connection, stripe_connections)
STATE_COLUMNS = columns_of(State, connect_states)


def connection_of(row: Sequence[Any]) -> Connection:
    """The value in a row of `COLUMNS`."""
    found = Connection(*row)
    return replace(found, account=account_of(cast("Mapping[str, Any]", found.account)))


def account_of(stored: Mapping[str, Any]) -> Account:
    """The account in the JSON that `asdict` makes of one."""
    asked = stored["requirements"]
    errors = tuple(RequirementError(**error) for error in asked["errors"])
    return Account(**{**stored, "requirements": Requirements(**{**asked, "errors": errors})})


class StripeConnect(Shelf):
    """At most one connection, and the states of a day."""

    def find(self) -> Connection | None:
        """The connection that there is, or the last that there was."""
        row = self._connection.execute(select(*COLUMNS).where(self.mine(stripe_connections))).one_or_none()
        return connection_of(row) if row else None

    def keep(self, connection: Connection) -> None:
        """Put a connection in the place of the one before."""
        values = values_of(connection, stripe_connections) | {"account": asdict(connection.account)}
        new = insert(stripe_connections).values(tenant_id=self._tenant_id, **values)
        self._connection.execute(
            new.on_conflict_do_update(index_elements=[stripe_connections.c.tenant_id], set_=values)
        )

    def add_state(self, state: State) -> None:
        self.insert(connect_states, values_of(state, connect_states))

    def end_states(self, now: datetime) -> None:
        """End the states that still count."""
        living = connect_states.update().where(self.mine(connect_states), connect_states.c.expires_at > now)
        self._connection.execute(living.values(expires_at=now))

    def forget_states(self, before: datetime) -> list[str]:
        """Forget those made before, or a good part of them; returns their digests."""
        is_old = and_(self.mine(connect_states), connect_states.c.created_at < before)
        some = select(connect_states.c.id).where(is_old).limit(AT_ONCE)
        old = delete(connect_states).where(self.mine(connect_states), connect_states.c.id.in_(some))
        return list(self._connection.scalars(old.returning(connect_states.c.digest)))

    def lock_state(self, id: UUID) -> State:
        """The state, for this transaction alone; raises `StateUnknown`."""
        wanted = select(*STATE_COLUMNS).where(self.mine(connect_states), connect_states.c.id == id)
        row = self._connection.execute(wanted.with_for_update()).one_or_none()
        if row is None:
            raise StateUnknown
        return State(*row)

    def consume_state(self, id: UUID, now: datetime) -> None:
        self._connection.execute(
            connect_states.update()
            .where(self.mine(connect_states), connect_states.c.id == id)
            .values(consumed_at=now)
        )
