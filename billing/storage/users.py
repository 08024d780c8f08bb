"""The shelf of users."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import and_, bindparam, select, update

from billing.errors import NotFound
from billing.storage.shelf import Shelf, columns_of, of_tenant, values_of
from billing.storage.tables import users
from billing.users import User

COLUMNS = columns_of(User, users)
IS_NAMED = and_(of_tenant(users), users.c.id == bindparam("user_id"))
FIND = select(*COLUMNS).where(IS_NAMED)
FIND_BY_EMAIL = select(*COLUMNS).where(of_tenant(users), users.c.email == bindparam("email"))
FIND_ALL = select(*COLUMNS).where(of_tenant(users)).order_by(users.c.id)
FIND_PASSWORD_HASH = select(users.c.password_hash).where(IS_NAMED)
UPDATE = update(users).where(IS_NAMED)
# This ends the user's tokens too, as none of the old version is valid any more.
UPDATE_AND_END_TOKENS = UPDATE.values(token_version=users.c.token_version + 1)
AS_READ = and_(users.c.token_version == bindparam("version_read"), users.c.is_active)
NOTE_LOGIN = UPDATE.where(AS_READ).returning(*COLUMNS)
CHANGE_PASSWORD = UPDATE_AND_END_TOKENS.where(AS_READ).returning(*COLUMNS)


class Users(Shelf):
    """The users of one tenant."""

    def add(self, user: User, *, password_hash: str) -> None:
        self.insert(users, values_of(user, users) | {"password_hash": password_hash})

    def find(self, id: UUID) -> User | None:
        row = self.run(FIND, user_id=id).one_or_none()
        return User(*row) if row else None

    def find_by_email(self, email: str) -> User | None:
        """The user with this email, which is in its normal form."""
        row = self.run(FIND_BY_EMAIL, email=email).one_or_none()
        return User(*row) if row else None

    def all(self) -> list[User]:
        return [User(*row) for row in self.run(FIND_ALL)]

    def password_hash(self, id: UUID) -> str:
        """Raises `NotFound`."""
        found = self.run(FIND_PASSWORD_HASH, user_id=id).scalar()
        if found is None:
            raise NotFound
        return str(found)

    def note_login(self, user: User, renewed_hash: str | None, now: datetime) -> User | None:
        """Store the login; None if the user was disabled, or their tokens ended, since they were read."""
        values = {"last_login": now} | ({"password_hash": renewed_hash} if renewed_hash else {})
        row = self.run(NOTE_LOGIN, user_id=user.id, version_read=user.token_version, **values).one_or_none()
        return User(*row) if row else None

    def change_password(self, user: User, password_hash: str, now: datetime) -> User | None:
        """Store a new password; None if the user was disabled, or their tokens ended, since they were read."""
        row = self.run(
            CHANGE_PASSWORD,
            user_id=user.id,
            version_read=user.token_version,
            password_hash=password_hash,
            updated_at=now,
        ).one_or_none()
        return User(*row) if row else None

    def set_role(self, id: UUID, role: str, now: datetime) -> None:
        self.run(UPDATE, user_id=id, role=role, updated_at=now)

    def enable(self, id: UUID, now: datetime) -> None:
        self.run(UPDATE, user_id=id, is_active=True, updated_at=now)

    def disable(self, id: UUID, now: datetime) -> None:
        self.run(UPDATE_AND_END_TOKENS, user_id=id, is_active=False, updated_at=now)

    def reset_password(self, id: UUID, password_hash: str, now: datetime) -> None:
        self.run(UPDATE_AND_END_TOKENS, user_id=id, password_hash=password_hash, updated_at=now)
