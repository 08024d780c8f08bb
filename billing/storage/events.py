"""The shelf of a tenant's events: each is recorded in the transaction of the change it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, literal, select, true
from sqlalchemy.dialects.postgresql import insert

from billing.actors import SYSTEM, Actor
from billing.ids import new_id
from billing.storage.shelf import Shelf, of_tenant, values_of
from billing.storage.tables import deliveries, event_heads, events, webhook_endpoints
from billing.storage.tasks import Tasks
from billing.webhooks.delivery import wake
from billing.webhooks.events import Event, EventType, envelope
from billing.webhooks.replay import Choice, Chosen, Extent

HAS_FAILED = (
    select(deliveries.c.id)
    .where(
        deliveries.c.tenant_id == events.c.tenant_id,
        deliveries.c.event_id == events.c.id,
        deliveries.c.status == "failed",
    )
    .exists()
)

# Insert or update, this locks the head until the transaction ends: no number is used twice, and none is skipped.
NEXT_SEQUENCE = (
    insert(event_heads)
    .on_conflict_do_update(
        index_elements=[event_heads.c.tenant_id], set_={"sequence": event_heads.c.sequence + 1}
    )
    .returning(event_heads.c.sequence)
)
# A row for each active endpoint: one, or none.
ADD_DELIVERY = insert(deliveries).from_select(
    [
        "tenant_id",
        "id",
        "event_id",
        "event_type",
        "status",
        "attempts",
        "next_attempt_at",
        "created_at",
    ],
    select(
        webhook_endpoints.c.tenant_id,
        bindparam("id", type_=deliveries.c.id.type),
        bindparam("event_id", type_=deliveries.c.event_id.type),
        bindparam("event_type", type_=deliveries.c.event_type.type),
        literal("pending"),
        literal(0),
        bindparam("now", type_=deliveries.c.created_at.type),
        bindparam("now", type_=deliveries.c.created_at.type),
    ).where(
        of_tenant(webhook_endpoints),
        webhook_endpoints.c.url.is_not(None),
        webhook_endpoints.c.disabled_reason.is_(None),
    ),
)


class Events(Shelf):
    """What happened at one tenant, numbered without gaps."""

    def __init__(self, connection: Connection, tenant_id: UUID, actor: Actor = SYSTEM) -> None:
        super().__init__(connection, tenant_id)
        self._actor = actor

    def record(
        self, type: EventType, data: Mapping[str, object], *, livemode: bool = True, now: datetime
    ) -> None:
        """Store an event, and a delivery if the endpoint is active; whether it wants the type is checked at sending."""
        event = self._keep(type, data, livemode=livemode, is_test=False, now=now)
        if self._add_delivery(event):
            wake(Tasks(self._connection, self._tenant_id), self._tenant_id, now)

    def keep_test(self, type: str, data: Mapping[str, object], *, now: datetime) -> Event:
        """Store a test event without its body, which may have any length and is sent only once, from memory."""
        return self._keep(type, data, livemode=False, is_test=True, now=now)

    def _keep(
        self, type: str, data: Mapping[str, object], *, livemode: bool, is_test: bool, now: datetime
    ) -> Event:
        # The number first, as its lock makes other transactions wait: so ids are in the order of the numbers.
        sequence, event_id = self._next_sequence(), new_id()
        body = envelope(
            id=event_id,
            type=type,
            created_at=now,
            tenant_id=self._tenant_id,
            livemode=livemode,
            sequence=sequence,
            data=data,
        )
        event = Event(event_id, sequence, type, is_test, now, body)
        kept = replace(event, body=b"") if is_test else event
        self.insert(events, {**values_of(kept, events), "request_id": self._actor.request_id})
        return event

    def measure(self, choice: Choice, *, wanted: Sequence[str]) -> Extent:
        """Count the chosen events of the wanted types (none means all), and find the last one's number."""
        number, last = func.count(), func.coalesce(func.max(events.c.sequence), 0)
        found = select(number, last).where(self._chosen(choice, wanted))
        return Extent(*self.run(found).one())

    def chosen(
        self, choice: Choice, *, wanted: Sequence[str], after: int, last: int, most: int
    ) -> list[Chosen]:
        """The first of them after the number `after`, up to and including `last`, in order."""
        rows = self.run(
            select(events.c.id, events.c.sequence)
            .where(self._chosen(choice, wanted), events.c.sequence > after, events.c.sequence <= last)
            .order_by(events.c.sequence)
            .limit(most)
        )
        return [Chosen(*row) for row in rows]

    def _chosen(self, choice: Choice, wanted: Sequence[str]) -> ColumnElement[bool]:
        of_type = events.c.type.in_(wanted) if wanted else true()
        ours = and_(of_tenant(events), of_type, ~events.c.is_test)
        if choice.event_ids:
            return and_(ours, events.c.id.in_(choice.event_ids))
        return and_(ours, HAS_FAILED if choice.since is None else events.c.created_at >= choice.since)

    def _add_delivery(self, event: Event) -> bool:
        values = {"id": new_id(), "event_id": event.id, "event_type": event.type, "now": event.created_at}
        return self.run(ADD_DELIVERY, **values).rowcount > 0

    def _next_sequence(self) -> int:
        return int(self.run(NEXT_SEQUENCE, tenant_id=self._tenant_id, sequence=1).scalar_one())
