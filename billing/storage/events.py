"""The shelf of a tenant's events: each recorded in the transaction of what it tells of."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy.dialects.postgresql import insert

from billing.ids import new_id
from billing.storage.shelf import Shelf
from billing.storage.tables import event_heads, events
from billing.webhooks.events import envelope


class Events(Shelf):
    """What happened at one tenant, numbered without gaps."""

    def record(self, type: str, data: Mapping[str, object], *, livemode: bool = True, now: datetime) -> None:
        """Keep an event; its bytes are made here, once, and are what is signed and sent."""
        event_id, sequence = new_id(), self._next_sequence()
        body = envelope(
            id=event_id,
            type=type,
            created_at=now,
            tenant_id=self._tenant_id,
            livemode=livemode,
            sequence=sequence,
            data=data,
        )
        values = {"id": event_id, "sequence": sequence, "type": type, "created_at": now, "body": body}
        self.insert(events, values)

    def _next_sequence(self) -> int:
        # Inserting or updating, this locks the head until the end: a number is seen once, and none is skipped.
        first = insert(event_heads).values(tenant_id=self._tenant_id, sequence=1)
        row = self._connection.execute(
            first.on_conflict_do_update(
                index_elements=[event_heads.c.tenant_id], set_={"sequence": event_heads.c.sequence + 1}
            ).returning(event_heads.c.sequence)
        ).one()
        return int(row.sequence)
