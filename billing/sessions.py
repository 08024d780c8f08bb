"""Sessions: a login and the family of refresh tokens that follow each other in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from billing.errors import (
    BillingError,
    InsufficientScope,
    InvalidCredentials,
    RefreshTokenReused,
    SessionEnded,
    TenantDisabled,
    WrongPassword,
)
from billing.ids import new_id
from billing.passwords import Passwords
from billing.ports import Audit, Events
from billing.tenants import Account, Tenant
from billing.tokens import Claims, Holder, TokenPair, Tokens
from billing.users import User

FAMILY_LIFETIME = timedelta(days=30)
# Two tabs, or a retry after a lost answer, are no attack.
RETRY_WINDOW = timedelta(seconds=10)


@dataclass(frozen=True)
class Session:
    """One login. Of its refresh tokens only the SHA-256 of the `jti` is kept, of the last two."""

    tenant_id: UUID
    id: UUID
    user_id: UUID
    current_jti: bytes
    previous_jti: bytes | None
    created_at: datetime
    rotated_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None

    def works_at(self, now: datetime) -> bool:
        return self.ended_at is None and now < self.expires_at

    def forgives(self, jti: str, now: datetime) -> bool:
        """Whether this is a repeat of the previous token, soon enough, with its successor unused."""
        return self.previous_jti == hashed(jti) and now - self.rotated_at <= RETRY_WINDOW


def hashed(jti: str) -> bytes:
    """What is kept of a refresh token."""
    return hashlib.sha256(jti.encode()).digest()


def start(tx: Storage, user: User, *, tokens: Tokens, now: datetime) -> TokenPair:
    """Begin a session and hand out its first tokens."""
    jti = str(new_id())
    session = Session(
        user.tenant_id, new_id(), user.id, hashed(jti), None, now, now, expires_at=now + FAMILY_LIFETIME
    )
    tx.sessions.add(session)
    return _pair(tokens, _holder(user, session.id), jti, session, now)


def authenticate(
    account: Account | None, password: str, passwords: Passwords, failed: Callable[[User, str], None]
) -> Account:
    """The account, if the password is right; raises `InvalidCredentials`, equally slowly for each reason.

    For an existing account `failed` is called with its user and the reason.
    """
    matches = passwords.check(password, account.password_hash if account else None)
    if account is None:
        raise InvalidCredentials
    if cause := _cause(account, matches=matches):
        failed(account.user, cause)
        raise InvalidCredentials
    return account


def _cause(account: Account, *, matches: bool) -> str | None:
    if not matches:
        return "wrong password"
    if not account.user.is_active:
        return "user disabled"
    return None if account.tenant.is_active else "tenant disabled"


def require_password(
    user: User, password: str, stored: str, passwords: Passwords, failed: Callable[[User, str], None]
) -> None:
    """Raises `WrongPassword`, after calling `failed`, unless the password is the stored one of this user."""
    if not passwords.check(password, stored):
        failed(user, "wrong password")
        raise WrongPassword


def log_in(
    tx: Storage, account: Account, *, renewed_hash: str | None, tokens: Tokens, now: datetime
) -> tuple[User, TokenPair]:
    """Begin a session for an authenticated account, unless it has changed in the meantime."""
    user = tx.users.note_login(account.user, renewed_hash, now)
    if user is None:
        raise InvalidCredentials
    tx.audit.record("user.logged_in", subject=user.email, now=now)
    return user, start(tx, user, tokens=tokens, now=now)


def change_password(
    tx: Storage, user: User, password_hash: str, *, tokens: Tokens, now: datetime
) -> TokenPair:
    """Set a new password, end every session of the user, and begin a new one."""
    changed = tx.users.change_password(user, password_hash, now)
    if changed is None:
        raise SessionEnded
    tx.sessions.end_all(user.id, now)
    tx.stripe.end_states_of(user.id)
    tx.audit.record("user.password_changed", subject=user.email, now=now)
    tx.events.record("user.password_changed", {"user_id": user.id, "email": user.email}, now=now)
    return start(tx, changed, tokens=tokens, now=now)


def require_standing(tx: Storage, user: User, session_id: UUID) -> None:
    """Raises `SessionEnded`, `TenantDisabled` or `InsufficientScope` unless a user may still act as when read.

    A request waits for a thread and for the tenant's lock after its credentials were checked, and its session may end
    in that time. From here it cannot: what ends it waits for the end of the transaction.
    """
    standing = tx.sessions.lock_standing(user, session_id)
    if standing is None:
        raise SessionEnded
    role, is_active = standing
    if not is_active:
        raise TenantDisabled
    if role != user.role:
        raise InsufficientScope("The role of this user has just been changed: repeat the request.")


def refresh(tx: Storage, claims: Claims, *, tokens: Tokens, now: datetime) -> TokenPair | BillingError:
    """Exchange a refresh token for its successor and a fresh access token.

    A repeat within ten seconds gets the same successor again. Any other ends the session; as that must be
    committed, the refusal is returned, to be raised when the transaction is over.
    """
    user = tx.users.find(claims.user_id)
    if user is None or not user.is_active or user.token_version != claims.token_version:
        return SessionEnded()
    if not tx.tenants.get().is_active:
        return TenantDisabled()
    successor = tokens.successor(claims)
    rotated = tx.sessions.rotate(claims.session_id, hashed(claims.jti), hashed(successor), now)
    session = rotated or tx.sessions.find(claims.session_id)
    if session is None or not session.works_at(now):
        return SessionEnded()
    if rotated is None and not session.forgives(claims.jti, now):
        return _end_for_reuse(tx, session, now)
    return _pair(tokens, _holder(user, session.id), successor, session, now)


def _end_for_reuse(tx: Storage, session: Session, now: datetime) -> RefreshTokenReused:
    tx.sessions.end(session.id, now)
    tx.stripe.end_states_of(session.user_id)
    tx.audit.record("session.refresh_token_reused", subject=str(session.id), now=now)
    return RefreshTokenReused()


def _pair(tokens: Tokens, holder: Holder, jti: str, session: Session, now: datetime) -> TokenPair:
    return TokenPair(
        access=tokens.access(holder, now),
        refresh=tokens.refresh(holder, jti, session.rotated_at, session.expires_at),
    )


def _holder(user: User, session_id: UUID) -> Holder:
    return Holder(user.tenant_id, user.id, session_id, user.token_version, user.role)


class SessionShelf(Protocol):
    def add(self, session: Session) -> None: ...
    def find(self, id: UUID) -> Session | None: ...
    def lock_standing(self, user: User, id: UUID) -> tuple[str, bool] | None: ...
    def rotate(self, id: UUID, used: bytes, successor: bytes, now: datetime) -> Session | None:
        """Put the successor in the place of the token used, if that is the current one of a living session."""

    def end(self, id: UUID, now: datetime) -> None: ...
    def end_all(self, user_id: UUID, now: datetime) -> None: ...


class TenantShelf(Protocol):
    def get(self) -> Tenant: ...


class UserShelf(Protocol):
    """The last two return the changed user, or None if its tokens were invalidated in the meantime."""

    def find(self, id: UUID) -> User | None: ...
    def note_login(self, user: User, renewed_hash: str | None, now: datetime) -> User | None: ...
    def change_password(self, user: User, password_hash: str, now: datetime) -> User | None: ...


class StateShelf(Protocol):
    def end_states_of(self, user_id: UUID) -> None:
        """End what the user began at Stripe: a session that has ended can finish nothing."""


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def stripe(self) -> StateShelf: ...
    @property
    def tenants(self) -> TenantShelf: ...
    @property
    def users(self) -> UserShelf: ...
    @property
    def sessions(self) -> SessionShelf: ...
    @property
    def events(self) -> Events: ...
    @property
    def audit(self) -> Audit: ...
