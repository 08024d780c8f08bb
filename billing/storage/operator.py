"""The door of the platform's operator: across all tenants, as the owner of the tables, to look only."""

from __future__ import annotations

from sqlalchemy import Connection, select

from billing.storage.shelf import columns_of
from billing.storage.tables import tenants
from billing.tenants import TenantSummary

COLUMNS = columns_of(TenantSummary, tenants)


class Operator:
    """Questions about all tenants. Row security lets only the owner see more than one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tenants(self) -> list[TenantSummary]:
        """Every tenant, the oldest first."""
        rows = self._connection.execute(select(*COLUMNS).order_by(tenants.c.id))
        return [TenantSummary(*row) for row in rows]
