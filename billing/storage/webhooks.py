"""The shelf of a tenant's webhook endpoint and the secrets that sign what goes there."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection

from billing.encryption import Vault
from billing.ids import new_id
from billing.storage.shelf import Shelf
from billing.storage.tables import webhook_endpoints, webhook_secrets


class Webhooks(Shelf):
    """One endpoint, and a current secret sealed to its row."""

    def __init__(self, connection: Connection, tenant_id: UUID, vault: Vault) -> None:
        super().__init__(connection, tenant_id)
        self._vault = vault

    def open(self, url: str | None, secret: str, *, now: datetime) -> None:
        """Make the tenant's endpoint, with its first secret."""
        self.insert(webhook_endpoints, {"url": url, "updated_at": now})
        secret_id = new_id()
        sealed = self._vault.seal(secret, place=f"webhook_secrets/{self._tenant_id}/{secret_id}")
        values = {"id": secret_id, "sealed": sealed, "last4": secret[-4:], "created_at": now}
        self.insert(webhook_secrets, values)
