"""The shelf of names that are unique, or looked up, across all tenants."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf
from billing.storage.tables import directory

CLAIM = insert(directory).on_conflict_do_nothing().returning(directory.c.id)


class Directory(Shelf):
    """Names that lead to this tenant's things."""

    def claim(self, kind: str, name: str, id: UUID) -> bool:
        """Take a name; False when it is taken. Of two that claim at once, the second waits for the first."""
        values = {"kind": kind, "name": name, "tenant_id": self._tenant_id, "id": id}
        row = self._connection.execute(CLAIM, values).one_or_none()
        return row is not None

    def add(self, kind: str, name: str, id: UUID) -> None:
        """Put a random name, which nobody else can have: if somebody did, nothing of the transaction would be kept."""
        self.insert(directory, {"kind": kind, "name": name, "id": id})

    def owns(self, kind: str, name: str) -> bool:
        """Whether the name is this tenant's."""
        named = select(directory.c.id).where(
            self.mine(directory), directory.c.kind == kind, directory.c.name == name
        )
        return self._connection.scalar(named) is not None

    def release(self, kind: str, *names: str) -> None:
        """Give up names of this tenant's, for whoever claims them next."""
        self._connection.execute(
            directory.delete().where(
                self.mine(directory), directory.c.kind == kind, directory.c.name.in_(names)
            )
        )
