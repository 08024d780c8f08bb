"""The shelf of a tenant's deliveries: what is on its way to the endpoint, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Text,
    all_,
    and_,
    any_,
    bindparam,
    delete,
    func,
    or_,
    select,
    update,
)

from billing.ids import new_id
from billing.storage.shelf import BATCH_ROWS, OF_TENANT, Shelf, batch_of, columns_of, of_tenant, values_of
from billing.storage.tables import deliveries, events
from billing.webhooks.delivery import Begun, Delivery, Settled, Stats, Status

COLUMNS = columns_of(Delivery, deliveries)
DAY = timedelta(hours=24)
IS_PENDING = deliveries.c.status == "pending"
HAS_DELIVERY = (
    select(deliveries.c.id)
    .where(deliveries.c.tenant_id == events.c.tenant_id, deliveries.c.event_id == events.c.id)
    .exists()
)
RECENT = (
    select(*COLUMNS).where(of_tenant(deliveries)).order_by(deliveries.c.id.desc()).limit(bindparam("most"))
)
RECENT_IN_STATUS = RECENT.where(deliveries.c.status == bindparam("status"))
LATELY = deliveries.c.settled_at > bindparam("since")
STATS = select(
    func.count().filter(LATELY, deliveries.c.status == "delivered"),
    func.count().filter(LATELY, deliveries.c.status == "failed"),
    func.count().filter(IS_PENDING),
).where(of_tenant(deliveries), or_(IS_PENDING, and_(~IS_PENDING, LATELY)))
BLANK = {"http_status": None, "error": None, "duration_ms": None, "settled_at": None}

# The statements of every batch of a worker, built once.
TYPES = bindparam("types", type_=ARRAY(Text))
PENDING = and_(of_tenant(deliveries), IS_PENDING)
OF_TYPE = or_(TYPES.is_(None), deliveries.c.event_type == any_(TYPES))
IS_DUE = deliveries.c.next_attempt_at <= bindparam("now")
FIRST_DUE = (
    select(deliveries.c.id)
    .where(PENDING, OF_TYPE, IS_DUE)
    .order_by(deliveries.c.next_attempt_at)
    .limit(bindparam("most"))
    .with_for_update()
    .cte("due")
)
BEGIN = (
    update(deliveries)
    .where(
        of_tenant(deliveries),
        deliveries.c.id == FIRST_DUE.c.id,
        events.c.tenant_id == deliveries.c.tenant_id,
        events.c.id == deliveries.c.event_id,
    )
    .values(attempts=deliveries.c.attempts + 1)
    .returning(
        deliveries.c.id,
        deliveries.c.event_id,
        deliveries.c.event_type,
        deliveries.c.attempts,
        events.c.body,
        events.c.request_id,
        deliveries.c.next_attempt_at,
    )
)
NEXT_DUE = select(func.min(deliveries.c.next_attempt_at)).where(PENDING, OF_TYPE)
UNWANTED = deliveries.c.event_type != all_(bindparam("wanted", type_=ARRAY(Text)))
DROP_UNWANTED = delete(deliveries).where(batch_of(deliveries, and_(IS_PENDING, IS_DUE, UNWANTED)))
# A delivery that was begun again meanwhile is left as it is.
AS_BEGUN = f"""
deliveries.tenant_id = %({OF_TENANT})s::uuid AND deliveries.id = s.id
    AND deliveries.attempts = s.attempt AND deliveries.status = 'pending'
"""
UNCOUNT = f"""
UPDATE deliveries SET attempts = deliveries.attempts - 1
FROM unnest(%(id)s::uuid[], %(attempt)s::int[]) AS s (id, attempt)
WHERE {AS_BEGUN}
"""
# One statement for all attempts that ended at about the same time.
RECORD_RESULTS = f"""
UPDATE deliveries SET
    status = s.status, next_attempt_at = s.next_attempt_at, http_status = s.http_status, error = s.error,
    duration_ms = s.duration_ms, settled_at = s.settled_at
FROM unnest(
    %(id)s::uuid[], %(attempt)s::int[], %(status)s::text[], %(next_attempt_at)s::timestamptz[],
    %(http_status)s::int[], %(error)s::text[], %(duration_ms)s::int[], %(settled_at)s::timestamptz[]
) AS s (id, attempt, status, next_attempt_at, http_status, error, duration_ms, settled_at)
WHERE {AS_BEGUN}
"""


class Deliveries(Shelf):
    """What goes, or went, to one tenant's endpoint."""

    def add(self, delivery: Delivery) -> None:
        self.insert(deliveries, values_of(delivery, deliveries))

    def begin(self, now: datetime, *, types: Sequence[str] | None, most: int) -> list[Begun]:
        """Count one more attempt of the deliveries that have been due longest; returns them in that order.

        `types`, if given, restricts the types of events.
        """
        begun = self.run(BEGIN, now=now, types=types and list(types), most=most)
        # RETURNING has no order. Among those due at the same time the oldest event is first: event ids are ordered.
        in_order = sorted(begun, key=lambda row: (row.next_attempt_at, row.event_id))
        return [Begun(*row[:-1]) for row in in_order]

    def uncount(self, begun: Sequence[Begun]) -> None:
        """Take back the count of attempts that were not made after all."""
        ids, attempts = [str(one.id) for one in begun], [one.attempt for one in begun]
        self.defer(UNCOUNT, id=ids, attempt=attempts)

    def record_results(self, settled: Sequence[Settled]) -> None:
        """Store the results of attempts."""
        columns = {field.name: [getattr(one, field.name) for one in settled] for field in fields(Settled)}
        columns["id"] = [str(one.id) for one in settled]
        self.defer(RECORD_RESULTS, **columns)

    def next_due(self, *, types: Sequence[str] | None) -> datetime | None:
        """When the next attempt is due, of these types or of any; None if there is none to come."""
        found: datetime | None = self.run(NEXT_DUE, types=types and list(types)).scalar_one()
        return found

    def drop_unwanted(self, wanted: Sequence[str], now: datetime) -> None:
        """Delete due deliveries of event types other than these, up to `BATCH_ROWS`."""
        self.defer(DROP_UNWANTED, now=now, wanted=list(wanted))

    def cancel(self, error: str, now: datetime) -> bool:
        """Fail pending deliveries, up to `BATCH_ROWS`; returns whether there were any.

        The caller holds the endpoint's lock, as everything that changes pending deliveries does, except housekeeping,
        which deletes them.
        """
        given_up = update(deliveries).where(batch_of(deliveries, IS_PENDING))
        values = {"status": "failed", "error": error, "next_attempt_at": None, "settled_at": now}
        return self.run(given_up, **values).rowcount > 0

    def replay(self, event_ids: Sequence[UUID], now: datetime) -> None:
        """Make events due now: ended deliveries start anew, pending ones come sooner, missing ones are added.

        The caller holds the endpoint's lock, so that two replays add nothing twice.
        """
        # Not waiting for rows that a worker has locked, this cannot block one. Skipped rows are being sent anyway.
        free = self.run(
            select(deliveries.c.id, deliveries.c.status)
            .where(of_tenant(deliveries), deliveries.c.event_id.in_(event_ids))
            .with_for_update(skip_locked=True)
        ).all()
        anew = BLANK | {"status": "pending", "attempts": 0}
        self._make_due([row.id for row in free if row.status == "pending"], now)
        self._make_due([row.id for row in free if row.status != "pending"], now, **anew)
        self._add_missing(event_ids, now)

    def _make_due(self, ids: Sequence[UUID], now: datetime, **values: object) -> None:
        ours = update(deliveries).where(of_tenant(deliveries), deliveries.c.id.in_(ids))
        self.run(ours, next_attempt_at=now, **values)

    def _add_missing(self, event_ids: Sequence[UUID], now: datetime) -> None:
        missing = select(events.c.id, events.c.type).where(
            of_tenant(events), events.c.id.in_(event_ids), ~HAS_DELIVERY
        )
        for event_id, event_type in self.run(missing).all():
            self.add(Delivery(new_id(), event_id, event_type, "pending", 0, now, None, None, None, now))

    def recent(self, most: int, *, status: Status | None = None) -> list[Delivery]:
        """The latest deliveries, or the latest in one status, newest first."""
        query = RECENT if status is None else RECENT_IN_STATUS
        return [Delivery(*row) for row in self.run(query, most=most, status=status)]

    def stats(self, now: datetime) -> Stats:
        """How many are pending, and how many ended within a day."""
        return Stats(*self.run(STATS, since=now - DAY).one())

    def prune(self, before: datetime) -> bool:
        """Delete deliveries that ended before this time, or were due before it, as only those of a disabled endpoint.

        Then delete events of before it that have no delivery left. Up to `BATCH_ROWS` of each; returns whether there
        were any.
        """
        is_old = or_(
            and_(~IS_PENDING, deliveries.c.settled_at < before),
            and_(IS_PENDING, deliveries.c.next_attempt_at < before),
        )
        forgotten = self.run(delete(deliveries).where(batch_of(deliveries, is_old)))
        old = select(events.c.id).where(of_tenant(events), events.c.created_at < before, ~HAS_DELIVERY)
        bare = self.run(delete(events).where(of_tenant(events), events.c.id.in_(old.limit(BATCH_ROWS))))
        return forgotten.rowcount + bare.rowcount > 0
