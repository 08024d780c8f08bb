"""The shelf of sessions."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import or_, select

from billing.sessions import Session
from billing.storage.shelf import Shelf, values_of
from billing.storage.tables import sessions


class Sessions(Shelf):
    """The sessions of one tenant's users."""

    def add(self, session: Session) -> None:
        self.insert(sessions, values_of(session, sessions))

    def find(self, id: UUID) -> Session | None:
        row = self._connection.execute(
            select(sessions).where(self.mine(sessions), sessions.c.id == id)
        ).one_or_none()
        return Session(*row) if row else None

    def rotate(self, id: UUID, used: bytes, successor: bytes, now: datetime) -> Session | None:
        """One compare-and-set: of any number that come at once, one finds the used token current."""
        row = self._connection.execute(
            sessions.update()
            .where(
                self.mine(sessions),
                sessions.c.id == id,
                sessions.c.current_jti == used,
                sessions.c.ended_at.is_(None),
                sessions.c.expires_at > now,
            )
            .values(current_jti=successor, previous_jti=used, rotated_at=now)
            .returning(sessions)
        ).one_or_none()
        return Session(*row) if row else None

    def end(self, id: UUID, now: datetime) -> None:
        self._connection.execute(
            sessions.update()
            .where(self.mine(sessions), sessions.c.id == id, sessions.c.ended_at.is_(None))
            .values(ended_at=now)
        )

    def end_all(self, user_id: UUID, now: datetime) -> None:
        self._connection.execute(
            sessions.update()
            .where(self.mine(sessions), sessions.c.user_id == user_id, sessions.c.ended_at.is_(None))
            .values(ended_at=now)
        )

    def prune(self, before: datetime) -> None:
        """Forget those that ended before."""
        over = or_(sessions.c.ended_at < before, sessions.c.expires_at < before)
        self._connection.execute(sessions.delete().where(self.mine(sessions), over))
