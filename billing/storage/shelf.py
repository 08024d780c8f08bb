"""What every shelf has: a connection within a transaction, and the tenant whose rows it may touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, CursorResult, Executable, Insert, Table, bindparam

Statement = TypeVar("Statement", bound=Executable)

# Of a statement whose result nobody needs: it goes with the next one, or with COMMIT.
LATER = "later"
# What makes the rest of a transaction a tenant's.
BECOME = "SELECT set_config('app.tenant_id', %s, true)"
# The tenant in every condition, by which a statement is told from one that has lost it.
MINE = "mine"


class Shelf:
    """The rows of one noun, of one tenant.

    Row security already hides other tenants' rows; `mine` says it again, so that either alone would do.
    """

    def __init__(self, connection: Connection, tenant_id: UUID) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    def mine(self, table: Table) -> ColumnElement[bool]:
        """The condition that a row is this tenant's."""
        return _owner(table) == bindparam(MINE, self._tenant_id)

    def run(self, statement: Executable, **values: object) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement that was built once, of conditions that are `mine`, with its other values."""
        return self._connection.execute(statement, {**values, MINE: self._tenant_id})

    def insert(self, table: Table, values: Mapping[str, Any]) -> None:
        """Add a row, as this tenant's whatever it says."""
        owner = {"tenant_id": self._tenant_id} if "tenant_id" in table.c else {"id": self._tenant_id}
        # As parameters: a statement that is the same each time is compiled once, and hardly looked at again.
        self._connection.execute(_insert(table), {**values, **owner})


@cache
def _insert(table: Table) -> Insert:
    return later(table.insert())


def later(statement: Statement) -> Statement:
    """The statement, as one that nobody waits for."""
    return statement.execution_options(**{LATER: True})


def mine(table: Table) -> ColumnElement[bool]:
    """The condition that a row is the tenant's, in a statement that is built once: `Shelf.run` says whose."""
    return _owner(table) == bindparam(MINE)


def _owner(table: Table) -> ColumnElement[Any]:
    return table.c.id if table.name == "tenants" else table.c.tenant_id


def columns_of(value: type, table: Table, **elsewhere: ColumnElement[Any]) -> tuple[ColumnElement[Any], ...]:
    """The columns of a value's fields, in their order; those of another table are given by the field's name."""
    return tuple(elsewhere[f.name] if f.name in elsewhere else table.c[f.name] for f in fields(value))


def listed(columns: Sequence[ColumnElement[Any]]) -> str:
    """The columns as a SELECT lists them."""
    return ", ".join(str(column) for column in columns)


def values_of(value: object, table: Table) -> dict[str, Any]:
    """The members of a value that are columns of the table, by name."""
    return {column.name: getattr(value, column.name) for column in table.c if hasattr(value, column.name)}
