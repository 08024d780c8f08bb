"""What every shelf has: a connection within a transaction, and the tenant whose rows it may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeAlias
from uuid import UUID

import psycopg2
from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Executable,
    Table,
    TextClause,
    and_,
    any_,
    bindparam,
    func,
    select,
)
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.sql.dml import UpdateBase

from billing.storage.driver import driver_of

Values: TypeAlias = Mapping[str, Any]
Write: TypeAlias = UpdateBase | TextClause

# For texts and parameters alone; connections have one each.
DIALECT = PGDialect_psycopg2(dbapi=psycopg2)  # type: ignore[no-untyped-call]
# What makes the rest of a transaction a tenant's.
BECOME = "SELECT set_config('app.tenant_id', %s, true)"
# The tenant in every condition, by which a statement is told from one that has lost it.
MINE = "mine"
# So many rows are changed well within a statement's time.
AT_ONCE = 5000


class Shelf:
    """The rows of one noun, of one tenant.

    Row security already hides other tenants' rows; `mine` says it again, so that either alone would do.
    """

    def __init__(self, connection: Connection, tenant_id: UUID) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    def run(self, statement: Executable, **values: object) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement, whose conditions are `mine`, with its other values."""
        return self._connection.execute(statement, {**values, MINE: self._tenant_id})

    def put_off(self, statement: Write | str, /, **values: object) -> None:
        """Run one likewise whose result nobody needs: it goes with the next, or with COMMIT. A text is psycopg2's."""
        values[MINE] = self._tenant_id
        driver = driver_of(self._connection)
        if isinstance(statement, str):
            driver.put_off(statement, values)
        else:
            text, parameters = _compiled(statement, tuple(values))
            driver.put_off(text, parameters(values))

    def insert(self, table: Table, values: Values) -> None:
        """Add a row, as this tenant's whatever it says; put off too."""
        self.put_off(_insert(table), **{**values, _owner(table).name: self._tenant_id})


@cache
def _insert(table: Table) -> UpdateBase:
    return table.insert()


@cache
def _compiled(statement: Write, names: tuple[str, ...]) -> tuple[str, Callable[[Values], Values]]:
    """A statement for values of these names: its text, and what makes psycopg2's parameters of values.

    It is a constant, with no `in_` of a list and no default of Python's: what SQLAlchemy does at each execution is
    not done. It would get ready for a result, which takes it longer than all else.
    """
    compiled = statement.compile(dialect=DIALECT, column_keys=names)
    binders = {
        name: bind.type.dialect_impl(DIALECT).bind_processor(DIALECT)
        for bind, name in compiled.bind_names.items()
    }
    binding = [(name, bind) for name, bind in binders.items() if bind]

    def parameters(values: Values) -> Values:
        made = compiled.construct_params(values)
        for name, bind in binding:
            made[name] = bind(made[name])
        return made

    return str(compiled), parameters


def mine(table: Table) -> ColumnElement[bool]:
    """The condition that a row is the tenant's; the shelf that runs the statement says whose."""
    return _owner(table) == bindparam(MINE)


def some_of(table: Table, condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """The condition that a row is one of the tenant's of which this holds, for as many as one statement should change.

    Rows that somebody else is changing are passed over. To wait for one could be a deadlock, and then it might no
    longer be one of them.
    """
    free = (
        select(table.c.id)
        .where(mine(table), condition)
        .limit(AT_ONCE)
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    # As one array: the rows are looked up by it, whatever is known of the table.
    return and_(mine(table), table.c.id == any_(func.array(select(free.c.id).scalar_subquery())))


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
