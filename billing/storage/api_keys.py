"""The shelf of API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on

from billing.keys import ApiKey, KeyType
from billing.storage.shelf import Shelf, columns_of, values_of
from billing.storage.tables import api_keys

COLUMNS = columns_of(ApiKey, api_keys)


def key_of(row: Sequence[Any]) -> ApiKey:
    """The value in a row of `COLUMNS`."""
    return ApiKey(*row)


def _living(now: datetime) -> ColumnElement[bool]:
    return and_(
        api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now)
    )


class ApiKeys(Shelf):
    """The keys of one tenant."""

    def add(self, key: ApiKey, *, digest: str) -> None:
        self.insert(api_keys, values_of(key, api_keys) | {"digest": digest})

    def living(self, now: datetime, types: Sequence[KeyType]) -> list[ApiKey]:
        """The keys of these types that work now."""
        query = select(*COLUMNS).where(self.mine(api_keys), api_keys.c.type.in_(types), _living(now))
        return [key_of(row) for row in self._connection.execute(query.order_by(api_keys.c.id))]

    def worth_showing(self, now: datetime) -> list[ApiKey]:
        """The keys that work now, and the last one made of each type, living or not."""
        newest = (
            select(api_keys.c.id)
            .where(self.mine(api_keys))
            .ext(distinct_on(api_keys.c.type))
            .order_by(api_keys.c.type, api_keys.c.id.desc())
        )
        query = select(*COLUMNS).where(self.mine(api_keys), or_(_living(now), api_keys.c.id.in_(newest)))
        return [key_of(row) for row in self._connection.execute(query)]

    def expire(self, key: ApiKey) -> None:
        """Keep the end that the key was given."""
        self._connection.execute(
            api_keys.update()
            .where(self.mine(api_keys), api_keys.c.id == key.id)
            .values(expires_at=key.expires_at)
        )

    def revoke(self, types: Sequence[KeyType], now: datetime) -> list[ApiKey]:
        """End the living keys of these types; returns them."""
        rows = self._connection.execute(
            api_keys.update()
            .where(self.mine(api_keys), api_keys.c.type.in_(types), _living(now))
            .values(revoked_at=now)
            .returning(*COLUMNS)
        )
        return [key_of(row) for row in rows]

    def note_use(self, id: UUID, at: datetime) -> None:
        """Keep when a key was last used, by whichever process."""
        self._connection.execute(
            api_keys.update()
            .where(self.mine(api_keys), api_keys.c.id == id)
            .values(last_used_at=func.greatest(api_keys.c.last_used_at, at))
        )
