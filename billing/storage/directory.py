"""The shelf of names that are unique, or looked up, across all tenants."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf
from billing.storage.tables import directory


class Directory(Shelf):
    """Names that lead to this tenant's things."""

    def claim(self, kind: str, name: str, id: UUID) -> bool:
        """Take a name; False when it is taken. Of two that claim at once, the second waits for the first."""
        row = self._connection.execute(
            insert(directory)
            .values(kind=kind, name=name, tenant_id=self._tenant_id, id=id)
            .on_conflict_do_nothing()
            .returning(directory.c.id)
        ).one_or_none()
        return row is not None
