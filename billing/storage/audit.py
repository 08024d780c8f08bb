"""The shelf of the audit log: appends rows, each chained to the previous one by its hash, and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, func, select, text

from billing.actors import Actor
from billing.audit import Choice, Head, Row, chained
from billing.storage.shelf import Shelf, columns_of, of_tenant
from billing.storage.tables import audit_heads, audit_log

COLUMNS = columns_of(Row, audit_log)
FIND_HEAD = select(audit_heads.c.sequence, audit_heads.c.hash).where(of_tenant(audit_heads))
LOCK_HEAD = text("SELECT sequence, hash FROM app.lock_audit_head()")
ADVANCE = text("SELECT app.advance_audit_head()")


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
        """Append a row, whose hash covers it and the previous row's hash."""
        # This locks the head until the transaction ends: with two writers per tenant the chain would fork.
        head = self.run(LOCK_HEAD).one()
        row = Row(
            tenant_id=self._tenant_id,
            sequence=head.sequence + 1,
            at=now,
            action=action,
            actor_kind=self._actor.kind,
            actor_id=self._actor.id,
            subject=subject,
            reason=reason,
            details=dict(details or {}),
            address=self._actor.address,
            request_id=self._actor.request_id,
            hash=b"",
        )
        content = row.content()
        self.insert(audit_log, content | {"hash": chained(bytes(head.hash), content)})
        self.defer(ADVANCE)

    def head(self) -> Head | None:
        """The number and hash of the last row written, as the head table has them."""
        row = self.run(FIND_HEAD).one_or_none()
        return Head(*row) if row else None

    def after(self, sequence: int | None, *, most: int, upto: int | None = None) -> list[Row]:
        """The first rows after `sequence` (None: from the start), up to and including `upto`, oldest first."""
        query = select(*COLUMNS).where(of_tenant(audit_log)).order_by(audit_log.c.sequence).limit(most)
        if sequence is not None:
            query = query.where(audit_log.c.sequence > sequence)
        if upto is not None:
            query = query.where(audit_log.c.sequence <= upto)
        return [Row(*row) for row in self.run(query)]

    def beyond_head(self) -> int | None:
        """The number of the first row past the head, both read in one statement; there should be none."""
        head = select(audit_heads.c.sequence).where(of_tenant(audit_heads)).scalar_subquery()
        query = select(func.min(audit_log.c.sequence)).where(
            of_tenant(audit_log), audit_log.c.sequence > func.coalesce(head, 0)
        )
        found: int | None = self.run(query).scalar()
        return found

    def recent(self, choice: Choice, *, most: int) -> list[Row]:
        """The latest rows that match the choice, newest first."""
        query = select(*COLUMNS).where(of_tenant(audit_log), *_chosen(choice))
        ordered = query.order_by(audit_log.c.sequence.desc()).limit(most)
        return [Row(*row) for row in self.run(ordered)]


def _chosen(choice: Choice) -> Iterator[ColumnElement[bool]]:
    if choice.action is not None:
        yield audit_log.c.action == choice.action
    if isinstance(choice.actor, UUID):
        yield audit_log.c.actor_id == choice.actor
    elif choice.actor is not None:
        yield audit_log.c.actor_kind == choice.actor
    if choice.since is not None:
        yield audit_log.c.at >= choice.since
    if choice.until is not None:
        yield audit_log.c.at < choice.until
