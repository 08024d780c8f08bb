"""The shelf of the audit log: rows are added, each bound to the one before by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import UUID

import orjson
from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql import insert

from billing.actors import Actor
from billing.storage.shelf import Shelf
from billing.storage.tables import audit_heads, audit_log

GENESIS = bytes(32)


class AuditLog(Shelf):
    """The log of one tenant, written by one actor."""

    def __init__(self, connection: Connection, tenant_id: UUID, actor: Actor) -> None:
        super().__init__(connection, tenant_id)
        self._actor = actor

    def record(
        self,
        action: str,
        *,
        now: datetime,
        subject: str | None = None,
        reason: str | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Add a row: `hash = SHA-256(previous hash ‖ canonical row)`."""
        sequence, previous = self._take_head()
        row = {
            "tenant_id": self._tenant_id,
            "sequence": sequence,
            "at": now.astimezone(UTC),
            "action": action,
            "actor_kind": self._actor.kind,
            "actor_id": self._actor.id,
            "subject": subject,
            "reason": reason,
            "details": dict(details or {}),
            "address": self._actor.address,
            "request_id": self._actor.request_id,
        }
        digest = hashlib.sha256(previous + canonical(row)).digest()
        self.insert(audit_log, row | {"hash": digest})
        self._connection.execute(
            audit_heads.update().where(self.mine(audit_heads)).values(sequence=sequence, hash=digest)
        )

    def _take_head(self) -> tuple[int, bytes]:
        # Inserting or updating, this locks the head: one writer a tenant at a time, or the chain would fork.
        first = insert(audit_heads).values(tenant_id=self._tenant_id, sequence=0, hash=GENESIS)
        row = self._connection.execute(
            first.on_conflict_do_update(
                index_elements=[audit_heads.c.tenant_id], set_={"sequence": audit_heads.c.sequence}
            ).returning(audit_heads.c.sequence, audit_heads.c.hash)
        ).one()
        return row.sequence + 1, bytes(row.hash)


def canonical(row: Mapping[str, object]) -> bytes:
    """The bytes that are hashed: JSON with sorted keys, times in UTC."""
    return orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z)
