"""The shelf of users."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Executable, Update, bindparam, select

from billing.errors import NotFound
from billing.storage.shelf import Shelf, columns_of, mine, values_of
from billing.storage.tables import users
from billing.users import User

COLUMNS = columns_of(User, users)
FIND = select(*COLUMNS).where(mine(users), users.c.id == bindparam("user_id"))


def user_of(row: Sequence[Any]) -> User:
    """The value in a row of `COLUMNS`."""
    return User(*row)


class Users(Shelf):
    """The users of one tenant."""

    def add(self, user: User, *, password_hash: str) -> None:
        self.insert(users, values_of(user, users) | {"password_hash": password_hash})

    def find(self, id: UUID) -> User | None:
        row = self.run(FIND, user_id=id).one_or_none()
        return user_of(row) if row else None

    def find_by_email(self, email: str) -> User | None:
        """The user with this email, which is in its normal form."""
        return self._one(select(*COLUMNS).where(self.mine(users), users.c.email == email))

    def all(self) -> list[User]:
        rows = self._connection.execute(select(*COLUMNS).where(self.mine(users)).order_by(users.c.id))
        return [user_of(row) for row in rows]

    def password_hash(self, id: UUID) -> str:
        """Raises `NotFound`."""
        found = self._connection.scalar(
            select(users.c.password_hash).where(self.mine(users), users.c.id == id)
        )
        if found is None:
            raise NotFound
        return str(found)

    def note_login(self, user: User, renewed_hash: str | None, now: datetime) -> User | None:
        """The user with this login, or None if they were disabled or ended since they were read."""
        values = {"last_login": now} | ({"password_hash": renewed_hash} if renewed_hash else {})
        return self._one(self._same(user).values(values).returning(*COLUMNS))

    def change_password(self, user: User, password_hash: str, now: datetime) -> User | None:
        """The user with a new password, or None if they were disabled or ended since they were read."""
        return self._one(
            self._same(user)
            .values(password_hash=password_hash, token_version=users.c.token_version + 1, updated_at=now)
            .returning(*COLUMNS)
        )

    def set_role(self, id: UUID, role: str, now: datetime) -> None:
        self._update(id, role=role, updated_at=now)

    def enable(self, id: UUID, now: datetime) -> None:
        self._update(id, is_active=True, updated_at=now)

    def disable(self, id: UUID, now: datetime) -> None:
        """Their tokens end too: none of this version is good any more."""
        self._update(id, is_active=False, token_version=users.c.token_version + 1, updated_at=now)

    def reset_password(self, id: UUID, password_hash: str, now: datetime) -> None:
        """Their tokens end too: none of this version is good any more."""
        version = users.c.token_version + 1
        self._update(id, password_hash=password_hash, token_version=version, updated_at=now)

    def _update(self, id: UUID, **values: object) -> None:
        self._connection.execute(users.update().where(self.mine(users), users.c.id == id).values(values))

    def _same(self, user: User) -> Update:
        return users.update().where(
            self.mine(users),
            users.c.id == user.id,
            users.c.token_version == user.token_version,
            users.c.is_active,
        )

    def _one(self, query: Executable) -> User | None:
        row = self._connection.execute(query).one_or_none()
        return user_of(row) if row else None
