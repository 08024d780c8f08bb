"""The shelf that counts the rows that depend on each key of the keyrings."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select

from billing.storage.api_keys import IS_LIVING
from billing.storage.shelf import Shelf, of_tenant
from billing.storage.tables import api_keys, users, webhook_secrets
from billing.storage.webhooks import IS_VALID

# The ring, the name of a key in it, and how many rows need that key.
Count = tuple[str, str, int]


class KeyringUses(Shelf):
    """How many rows of one tenant can be read with which key."""

    def counts(self, now: datetime) -> list[Count]:
        """Count passwords, and the API keys and webhook secrets that have not expired and were not revoked."""
        columns = (
            ("PASSWORD_PEPPERS", func.split_part(users.c.password_hash, "$", 2), of_tenant(users)),
            ("KEY_PEPPERS", func.split_part(api_keys.c.digest, ":", 1), of_tenant(api_keys) & IS_LIVING),
            (
                "ENCRYPTION_KEYS",
                func.split_part(webhook_secrets.c.sealed, ":", 1),
                of_tenant(webhook_secrets) & IS_VALID,
            ),
        )
        return [
            (ring, kid, rows)
            for ring, kid_of, condition in columns
            for kid, rows in self.run(select(kid_of, func.count()).where(condition).group_by(kid_of), now=now)
        ]
