"""What every shelf has: a connection within a transaction, and the tenant whose rows it may touch."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Table


class Shelf:
    """The rows of one noun, of one tenant.

    Row security already hides other tenants' rows; `mine` says it again, so that either alone would do.
    """

    def __init__(self, connection: Connection, tenant_id: UUID) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    def mine(self, table: Table) -> ColumnElement[bool]:
        """The condition that a row is this tenant's."""
        column = table.c.id if table.name == "tenants" else table.c.tenant_id
        return column == self._tenant_id
