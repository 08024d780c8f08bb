"""Users: the people who act for a tenant, their roles, and who may be locked out."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

from billing.errors import Conflict, EmailTaken, NotFound
from billing.ids import new_id
from billing.ports import Audit, Directory

Role = Literal["owner", "admin", "developer"]


@dataclass(frozen=True)
class User:
    """A person who acts for a tenant."""

    tenant_id: UUID
    id: UUID
    email: str
    first_name: str
    last_name: str
    role: Role
    is_active: bool
    token_version: int
    last_login: datetime | None
    created_at: datetime
    updated_at: datetime

    @property
    def is_active_owner(self) -> bool:
        return self.role == "owner" and self.is_active


def normalise_email(email: str) -> str:
    """The form in which emails are compared and stored: composed (NFC), and in lower case."""
    # Some capitals have no composed form, and their small letters have: J̌ becomes ǰ.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email.strip()).lower())


def new_user(tenant_id: UUID, details: Mapping[str, str], *, role: Role, now: datetime) -> User:
    """A user of the tenant, not yet stored."""
    return User(
        tenant_id=tenant_id,
        id=new_id(),
        email=normalise_email(details["email"]),
        first_name=details.get("first_name", ""),
        last_name=details.get("last_name", ""),
        role=role,
        is_active=True,
        token_version=1,
        last_login=None,
        created_at=now,
        updated_at=now,
    )


def add(tx: Storage, user: User, *, password_hash: str, now: datetime) -> None:
    """Add a user to a tenant; raises `EmailTaken`, also for another tenant's user."""
    if not tx.directory.claim("email", user.email, user.id):
        raise EmailTaken
    tx.users.add(user, password_hash=password_hash)
    tx.audit.record("user.added", subject=user.email, now=now, details={"role": user.role})


def get(tx: Storage, email: str) -> User:
    """The tenant's user with this email, in any letter case; raises `NotFound`."""
    user = tx.users.find_by_email(normalise_email(email))
    if user is None:
        raise NotFound("The tenant has no user with this email.")
    return user


def set_role(tx: Storage, email: str, role: Role, *, now: datetime) -> None:
    """Give a user another role, which takes effect at their next request; raises `NotFound`, `Conflict`.

    The caller holds the tenant's lock.
    """
    user = get(tx, email)
    if user.role == role:
        return
    require_another_owner(tx, user)
    tx.users.set_role(user.id, role, now)
    tx.audit.record("user.role_changed", subject=user.email, now=now, details={"from": user.role, "to": role})


def disable(tx: Storage, email: str, *, now: datetime) -> None:
    """Disable a user, and end every session of theirs; raises `NotFound`, `Conflict` for the last owner.

    The caller holds the tenant's lock.
    """
    user = get(tx, email)
    if not user.is_active:
        return
    require_another_owner(tx, user)
    tx.users.disable(user.id, now)
    tx.sessions.end_all(user.id, now)
    tx.stripe.end_states_of(user.id)
    tx.audit.record("user.disabled", subject=user.email, now=now)


def enable(tx: Storage, email: str, *, now: datetime) -> None:
    """Let a disabled user log in again; raises `NotFound`."""
    user = get(tx, email)
    if not user.is_active:
        tx.users.enable(user.id, now)
        tx.audit.record("user.enabled", subject=user.email, now=now)


def reset_password(tx: Storage, user: User, password_hash: str, *, now: datetime) -> None:
    """Replace a lost password, and end every session of the user."""
    tx.users.reset_password(user.id, password_hash, now)
    tx.sessions.end_all(user.id, now)
    tx.stripe.end_states_of(user.id)
    tx.audit.record("user.password_reset", subject=user.email, now=now)


def require_another_owner(tx: Storage, user: User) -> None:
    """Raises `Conflict` if the user is the only active owner: nobody could make another one.

    The caller holds the tenant's lock, or two owners could remove each other.
    """
    others = [other for other in tx.users.all() if other.id != user.id]
    if user.is_active_owner and not any(other.is_active_owner for other in others):
        raise Conflict("A tenant keeps at least one active owner: make another user an owner first.")


class UserShelf(Protocol):
    def add(self, user: User, *, password_hash: str) -> None: ...
    def all(self) -> list[User]: ...
    def find_by_email(self, email: str) -> User | None: ...
    def set_role(self, id: UUID, role: str, now: datetime) -> None: ...
    def enable(self, id: UUID, now: datetime) -> None: ...
    def disable(self, id: UUID, now: datetime) -> None: ...
    def reset_password(self, id: UUID, password_hash: str, now: datetime) -> None: ...


class SessionShelf(Protocol):
    def end_all(self, user_id: UUID, now: datetime) -> None: ...


class StateShelf(Protocol):
    def end_states_of(self, user_id: UUID) -> None: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def stripe(self) -> StateShelf: ...
    @property
    def users(self) -> UserShelf: ...
    @property
    def sessions(self) -> SessionShelf: ...
    @property
    def directory(self) -> Directory: ...
    @property
    def audit(self) -> Audit: ...
