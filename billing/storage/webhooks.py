"""The shelf of a tenant's webhook endpoint and the secrets that sign what goes there."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, delete, or_, select, update

from billing.encryption import Unreadable, Vault
from billing.ids import new_id
from billing.storage.shelf import Shelf, columns_of, of_tenant, values_of
from billing.storage.tables import webhook_endpoints, webhook_secrets
from billing.webhooks.endpoints import Endpoint, Secret

COLUMNS = columns_of(Endpoint, webhook_endpoints)
SECRET_COLUMNS = columns_of(Secret, webhook_secrets)
FIND = select(*COLUMNS).where(of_tenant(webhook_endpoints))
FIND_AND_LOCK = FIND.with_for_update()
KEEP = update(webhook_endpoints).where(of_tenant(webhook_endpoints))
IS_VALID = or_(webhook_secrets.c.expires_at.is_(None), webhook_secrets.c.expires_at > bindparam("now"))
FIND_VALID = (
    select(webhook_secrets.c.sealed, *SECRET_COLUMNS)
    .where(of_tenant(webhook_secrets), IS_VALID)
    .order_by(webhook_secrets.c.expires_at.desc().nulls_first())
)
END_EARLIER = (
    update(webhook_secrets)
    .where(of_tenant(webhook_secrets), webhook_secrets.c.expires_at > bindparam("now"))
    .values(expires_at=bindparam("now"))
)
RETIRE = update(webhook_secrets).where(of_tenant(webhook_secrets), webhook_secrets.c.expires_at.is_(None))


class Webhooks(Shelf):
    """One endpoint, its current secret sealed to its row, and the previous one while it is valid."""

    def __init__(self, connection: Connection, tenant_id: UUID, vault: Vault) -> None:
        super().__init__(connection, tenant_id)
        self._vault = vault

    def open(self, url: str | None, secret: str, *, now: datetime) -> None:
        """Make the tenant's endpoint, with its first secret."""
        endpoint = Endpoint(url)
        self.insert(webhook_endpoints, values_of(endpoint, webhook_endpoints) | {"updated_at": now})
        self.add_secret(secret, now)

    def find(self, *, lock: bool = False) -> Endpoint:
        """The endpoint, locked on demand until the transaction ends; every tenant has one, with or without a URL."""
        endpoint = Endpoint(*self.run(FIND_AND_LOCK if lock else FIND).one())
        return replace(endpoint, event_types=tuple(endpoint.event_types))

    def keep(self, endpoint: Endpoint, now: datetime) -> None:
        values = values_of(endpoint, webhook_endpoints) | {"event_types": list(endpoint.event_types)}
        self.defer(KEEP, **values, updated_at=now)

    def add_secret(self, text: str, now: datetime) -> None:
        """Store a secret, which is the current one from now on."""
        secret = Secret(new_id(), text[-4:], None)
        values = values_of(secret, webhook_secrets)
        values |= {"sealed": self._seal(secret.id, text), "created_at": now}
        self.insert(webhook_secrets, values)

    def retire_secrets(self, now: datetime, *, expires_at: datetime) -> None:
        """Let the current secret expire at `expires_at`, and those before it now."""
        self.run(END_EARLIER, now=now)
        self.run(RETIRE, expires_at=expires_at)

    def secrets(self, now: datetime) -> list[Secret]:
        """The secrets that are valid now, without their text: the current one first."""
        return [Secret(row.id, row.last4, row.expires_at) for row in self._valid(now)]

    def signing_secrets(self, now: datetime) -> list[str]:
        """The texts of the secrets that are valid now: the current one first; raises `Unreadable` if that is.

        A previous one that is unreadable is left out, or a new one would not help until that one has expired.
        """
        return [text for row in self._valid(now) if (text := self._open_if_needed(row)) is not None]

    def tidy_secrets(self, now: datetime) -> None:
        """Delete expired secrets, and reseal those not sealed with the first encryption key."""
        ended = webhook_secrets.c.expires_at <= now
        self.run(delete(webhook_secrets).where(of_tenant(webhook_secrets), ended))
        for row in self._valid(now):
            if not self._vault.is_current(row.sealed):
                same = update(webhook_secrets).where(
                    of_tenant(webhook_secrets), webhook_secrets.c.id == row.id
                )
                self.run(same, sealed=self._seal(row.id, self._open(row)))

    def _valid(self, now: datetime) -> list[Row[Any]]:
        return list(self.run(FIND_VALID, now=now))

    def _seal(self, id: UUID, text: str) -> str:
        return self._vault.seal(text, place=self._place(id))

    def _open_if_needed(self, row: Row[Any]) -> str | None:
        try:
            return self._open(row)
        except Unreadable:
            if row.expires_at is None:
                raise
            return None

    def _open(self, row: Row[Any]) -> str:
        return self._vault.open(row.sealed, place=self._place(row.id))

    def _place(self, id: UUID) -> str:
        return f"webhook_secrets/{self._tenant_id}/{id}"
