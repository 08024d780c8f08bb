"""The shelf of names that are unique, or looked up, across all tenants."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import and_, bindparam, delete, select
from sqlalchemy.dialects.postgresql import insert

from billing.storage.shelf import Shelf, of_tenant
from billing.storage.tables import directory

CLAIM = insert(directory).on_conflict_do_nothing().returning(directory.c.id)
IS_OF_KIND = and_(of_tenant(directory), directory.c.kind == bindparam("kind"))
FIND = select(directory.c.id).where(IS_OF_KIND, directory.c.name == bindparam("name"))
RELEASE = delete(directory).where(IS_OF_KIND, directory.c.name.in_(bindparam("names", expanding=True)))


class Directory(Shelf):
    """Names that point to this tenant's rows."""

    def claim(self, kind: str, name: str, id: UUID) -> bool:
        """Claim a name; False if it is taken. Of two concurrent claims the second waits for the first."""
        taken = self.run(CLAIM, kind=kind, name=name, tenant_id=self._tenant_id, id=id)
        return taken.one_or_none() is not None

    def add(self, kind: str, name: str, id: UUID) -> None:
        """Add a random name, which cannot be taken already; if it were, the whole transaction would roll back."""
        self.insert(directory, {"kind": kind, "name": name, "id": id})

    def owns(self, kind: str, name: str) -> bool:
        """Whether the name is this tenant's."""
        return self.run(FIND, kind=kind, name=name).one_or_none() is not None

    def release(self, kind: str, *names: str) -> None:
        """Release names of this tenant, so that they may be claimed again."""
        self.run(RELEASE, kind=kind, names=list(names))
