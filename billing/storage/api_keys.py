"""The shelf of API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import and_, bindparam, func, or_, select, union_all, update

from billing.keys import TYPES, ApiKey, KeyType
from billing.storage.shelf import Shelf, columns_of, of_tenant, values_of
from billing.storage.tables import api_keys

COLUMNS = columns_of(ApiKey, api_keys)
IS_LIVING = and_(
    api_keys.c.revoked_at.is_(None),
    or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > bindparam("now")),
)
OF_TYPES = api_keys.c.type.in_(bindparam("types", expanding=True))
FIND_LIVING = select(*COLUMNS).where(of_tenant(api_keys), OF_TYPES, IS_LIVING).order_by(api_keys.c.id)
# One index scan each, however many keys have expired or were revoked.
NEWEST = [
    select(api_keys.c.id)
    .where(of_tenant(api_keys), api_keys.c.type == key_type)
    .order_by(api_keys.c.id.desc())
    .limit(1)
    for key_type in TYPES
]
WORTH_SHOWING = union_all(select(api_keys.c.id).where(of_tenant(api_keys), IS_LIVING), *NEWEST)
FIND_WORTH_SHOWING = select(*COLUMNS).where(of_tenant(api_keys), api_keys.c.id.in_(WORTH_SHOWING))
IS_NAMED = and_(of_tenant(api_keys), api_keys.c.id == bindparam("key_id"))
EXPIRE = update(api_keys).where(IS_NAMED)
NOTE_USE = (
    update(api_keys)
    .where(IS_NAMED)
    .values(last_used_at=func.greatest(api_keys.c.last_used_at, bindparam("at")))
)
# Another machine's clock may be behind: a key that has just expired by ours would still work there.
CLOCKS_DIFFER_BY = timedelta(minutes=15)
REVOKE = (
    update(api_keys)
    .where(of_tenant(api_keys), OF_TYPES, IS_LIVING)
    .values(revoked_at=bindparam("at"))
    .returning(*COLUMNS)
)


class ApiKeys(Shelf):
    """The keys of one tenant."""

    def add(self, key: ApiKey, *, digest: str) -> None:
        self.insert(api_keys, values_of(key, api_keys) | {"digest": digest})

    def living(self, now: datetime, types: Sequence[KeyType]) -> list[ApiKey]:
        """The keys of these types that work now."""
        return [ApiKey(*row) for row in self.run(FIND_LIVING, types=list(types), now=now)]

    def worth_showing(self, now: datetime) -> list[ApiKey]:
        """The keys that work now, and the newest key of each type, working or not."""
        return [ApiKey(*row) for row in self.run(FIND_WORTH_SHOWING, now=now)]

    def expire(self, key: ApiKey) -> None:
        """Store the key's expiry."""
        self.defer(EXPIRE, key_id=key.id, expires_at=key.expires_at)

    def revoke(self, types: Sequence[KeyType], now: datetime) -> list[ApiKey]:
        """Revoke the living keys of these types, and those that expired a moment ago; returns them."""
        rows = self.run(REVOKE, types=list(types), now=now - CLOCKS_DIFFER_BY, at=now)
        return [ApiKey(*row) for row in rows]

    def note_use(self, id: UUID, at: datetime) -> None:
        """Store when a key was last used; a later time written by another process stays."""
        self.defer(NOTE_USE, key_id=id, at=at)
