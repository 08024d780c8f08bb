"""The shelf of sessions."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import and_, bindparam, delete, or_, select, update

from billing.sessions import Session
from billing.storage.shelf import Shelf, batch_of, columns_of, of_tenant, values_of
from billing.storage.tables import sessions, tenants, users
from billing.users import User

COLUMNS = columns_of(Session, sessions)
FIND = select(*COLUMNS).where(of_tenant(sessions), sessions.c.id == bindparam("session_id"))
ROTATE = (
    update(sessions)
    .where(
        of_tenant(sessions),
        sessions.c.id == bindparam("session_id"),
        sessions.c.current_jti == bindparam("used"),
        sessions.c.ended_at.is_(None),
        sessions.c.expires_at > bindparam("now"),
    )
    .values(current_jti=bindparam("successor"), previous_jti=bindparam("used"), rotated_at=bindparam("now"))
    .returning(*COLUMNS)
)
# Whatever ends a session changes one of the two rows, and waits for who holds them.
LOCK_STANDING = (
    select(users.c.role, tenants.c.is_active)
    .join(sessions, and_(sessions.c.tenant_id == users.c.tenant_id, sessions.c.user_id == users.c.id))
    .join(tenants, tenants.c.id == users.c.tenant_id)
    .where(
        of_tenant(users),
        users.c.id == bindparam("user_id"),
        users.c.token_version == bindparam("version_read"),
        users.c.is_active,
        of_tenant(sessions),
        sessions.c.id == bindparam("session_id"),
        sessions.c.ended_at.is_(None),
    )
    .with_for_update(read=True, of=[users, sessions])
)
END = update(sessions).where(
    of_tenant(sessions), sessions.c.id == bindparam("session_id"), sessions.c.ended_at.is_(None)
)
IS_LIVING = and_(sessions.c.user_id == bindparam("whose"), sessions.c.ended_at.is_(None))
END_MOST = update(sessions).where(batch_of(sessions, IS_LIVING))
IS_OLD = or_(sessions.c.ended_at < bindparam("before"), sessions.c.expires_at < bindparam("before"))
PRUNE = delete(sessions).where(batch_of(sessions, IS_OLD))


class Sessions(Shelf):
    """The sessions of one tenant's users."""

    def add(self, session: Session) -> None:
        self.insert(sessions, values_of(session, sessions))

    def find(self, id: UUID) -> Session | None:
        row = self.run(FIND, session_id=id).one_or_none()
        return Session(*row) if row else None

    def lock_standing(self, user: User, id: UUID) -> tuple[str, bool] | None:
        """The user's role now, and whether the tenant is active; None if the session, or its user, has ended.

        Neither can end, nor the role change, until the transaction does.
        """
        row = self.run(
            LOCK_STANDING, user_id=user.id, version_read=user.token_version, session_id=id
        ).one_or_none()
        return (row.role, row.is_active) if row else None

    def rotate(self, id: UUID, used: bytes, successor: bytes, now: datetime) -> Session | None:
        """Compare and set: of any number of concurrent calls, one finds the used token current."""
        row = self.run(ROTATE, session_id=id, used=used, successor=successor, now=now).one_or_none()
        return Session(*row) if row else None

    def end(self, id: UUID, now: datetime) -> None:
        self.run(END, session_id=id, ended_at=now)

    def end_all(self, user_id: UUID, now: datetime) -> None:
        """Mark a user's sessions as ended, up to `BATCH_ROWS`: the user's new token version ends them all anyway."""
        self.run(END_MOST, whose=user_id, ended_at=now)

    def prune(self, before: datetime) -> bool:
        """Delete sessions that ended or expired before this time, up to `BATCH_ROWS`; returns whether any were."""
        return self.run(PRUNE, before=before).rowcount > 0
