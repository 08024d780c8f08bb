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

# Only for compiling statements and converting parameters; each engine has its own.
DIALECT = PGDialect_psycopg2(dbapi=psycopg2)  # type: ignore[no-untyped-call]
# Scopes the rest of a transaction to a tenant.
SET_TENANT = "SELECT set_config('app.tenant_id', %s, true)"
# The name of the tenant's parameter in every condition: a test finds by it any statement that lacks the condition.
OF_TENANT = "of_tenant"
# This many rows are changed well within the statement timeout.
BATCH_ROWS = 5000


class Shelf:
    """The rows of one entity, of one tenant.

    Row security already hides other tenants' rows; `of_tenant` repeats the condition, so that either alone would do.
    """

    def __init__(self, connection: Connection, tenant_id: UUID) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    def run(self, statement: Executable, **values: object) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement whose conditions include `of_tenant`, with these values for its other parameters."""
        return self._connection.execute(statement, {**values, OF_TENANT: self._tenant_id})

    def defer(self, statement: Write | str, /, **values: object) -> None:
        """Send a statement whose result nobody needs with the next one, or with COMMIT. A string is psycopg2's SQL."""
        values[OF_TENANT] = self._tenant_id
        driver = driver_of(self._connection)
        if isinstance(statement, str):
            driver.defer(statement, values)
        else:
            text, parameters = _compiled(statement, tuple(values))
            driver.defer(text, parameters(values))

    def insert(self, table: Table, values: Values) -> None:
        """Add a row, always as this tenant's whatever `values` say; deferred too."""
        self.defer(_insert(table), **{**values, _owner(table).name: self._tenant_id})


@cache
def _insert(table: Table) -> UpdateBase:
    return table.insert()


@cache
def _compiled(statement: Write, names: tuple[str, ...]) -> tuple[str, Callable[[Values], Values]]:
    """Compile a statement for values of these names: its text, and a function from values to psycopg2's parameters.

    The statement is a constant, with no `in_` of a list and no Python-side default, so that SQLAlchemy's work at each
    execution can be skipped: most of its time goes into preparing for a result.
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


def of_tenant(table: Table) -> ColumnElement[bool]:
    """The condition that a row is the tenant's; the shelf that runs the statement fills in the tenant."""
    return _owner(table) == bindparam(OF_TENANT)


def batch_of(table: Table, condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """The condition that a row is one of up to `BATCH_ROWS` of the tenant's that meet the given condition.

    Rows locked by another transaction are skipped. Waiting for one could deadlock, and afterwards it might no longer
    meet the condition.
    """
    free = (
        select(table.c.id)
        .where(of_tenant(table), condition)
        .limit(BATCH_ROWS)
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    # As one array: the rows are found by their ids, whatever the table's statistics say.
    return and_(of_tenant(table), table.c.id == any_(func.array(select(free.c.id).scalar_subquery())))


def _owner(table: Table) -> ColumnElement[Any]:
    return table.c.id if table.name == "tenants" else table.c.tenant_id


def columns_of(value: type, table: Table, **elsewhere: ColumnElement[Any]) -> tuple[ColumnElement[Any], ...]:
    """The columns of a dataclass's fields, in their order; columns of another table are given by the field's name."""
    return tuple(elsewhere[f.name] if f.name in elsewhere else table.c[f.name] for f in fields(value))


def listed(columns: Sequence[ColumnElement[Any]]) -> str:
    """The columns as a SELECT lists them."""
    return ", ".join(str(column) for column in columns)


def values_of(value: object, table: Table) -> dict[str, Any]:
    """The attributes of a value that are columns of the table, by name."""
    return {column.name: getattr(value, column.name) for column in table.c if hasattr(value, column.name)}
