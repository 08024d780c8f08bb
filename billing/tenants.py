"""Tenants and their users: who they are, and how one comes to be."""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

from slugify import slugify

from billing import keys
from billing.errors import Conflict, EmailTaken, NotFound
from billing.ids import new_id
from billing.keys import KeyDigests, NewKey
from billing.webhooks.signing import new_secret

Role = Literal["owner", "admin", "developer"]
Tier = Literal["free", "pro", "enterprise"]

LONGEST_SLUG = 60


@dataclass(frozen=True)
class Tenant:
    """A company that bills through the platform."""

    id: UUID
    company_name: str
    slug: str
    email: str
    domain: str | None
    webhook_url: str | None
    stripe_account_id: str | None
    stripe_status: str
    tier: str
    is_active: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class TenantSummary:
    """What the platform's operator sees of each tenant."""

    id: UUID
    slug: str
    company_name: str
    email: str
    tier: str
    is_active: bool
    stripe_status: str
    created_at: datetime


@dataclass(frozen=True)
class User:
    """A person who acts for a tenant."""

    tenant_id: UUID
    id: UUID
    email: str
    first_name: str
    last_name: str
    role: str
    is_active: bool
    token_version: int
    last_login: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Account:
    """What a login looks at: a user, their tenant, and what is kept of the password."""

    tenant: Tenant
    user: User
    password_hash: str = field(repr=False)


@dataclass(frozen=True)
class Registered:
    """A tenant just made. The secrets in it are shown now and never again."""

    tenant: Tenant
    owner: User
    keys: Sequence[NewKey]
    webhook_secret: str = field(repr=False)


def normalise_email(email: str) -> str:
    """The form in which emails are compared and kept: composed, and without capitals."""
    # Some capitals have no composed form, and their small letters have: J̌ becomes ǰ.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email.strip()).lower())


def own_words(details: Mapping[str, str]) -> list[str]:
    """What an account is called, and its passwords must not be made of, from what its registration says."""
    names = ("email", "company_name", "first_name", "last_name", "domain")
    return [details[name] for name in names if name in details]


def words_of(user: User, tenant: Tenant) -> list[str]:
    """The words of an existing account that its passwords must not be made of."""
    names = {"first_name": user.first_name, "last_name": user.last_name, "domain": tenant.domain or ""}
    return own_words({"email": user.email, "company_name": tenant.company_name, **names})


def slugs(company_name: str) -> Iterator[str]:
    """Slugs to try for a name: the plain one, then ones that nobody else will have."""
    plain = slugify(company_name, max_length=LONGEST_SLUG, word_boundary=True) or "tenant"
    yield plain
    while True:
        yield f"{plain}-{secrets.token_hex(3)}"


def register(
    tx: Storage,
    details: Mapping[str, str],
    *,
    password_hash: str,
    digests: KeyDigests,
    now: datetime,
) -> Registered:
    """Make a tenant, its owner, four keys and a webhook secret; raises `EmailTaken`."""
    tenant = _new_tenant(tx, details, now)
    owner = new_user(tenant, details, role="owner", now=now)
    tx.tenants.add(tenant)
    tx.audit.record("tenant.registered", subject=tenant.slug, now=now)
    add_user(tx, owner, password_hash=password_hash, now=now)
    minted = keys.mint_each(tx, digests=digests, now=now)
    secret = new_secret()
    tx.webhooks.open(details.get("webhook_url"), secret, now=now)
    return Registered(tenant, owner, minted, secret)


def add_user(tx: Storage, user: User, *, password_hash: str, now: datetime) -> None:
    """Give a tenant one more user; raises `EmailTaken`, whoever has taken it."""
    if not tx.directory.claim("email", user.email, user.id):
        raise EmailTaken
    tx.users.add(user, password_hash=password_hash)
    tx.audit.record("user.added", subject=user.email, now=now, details={"role": user.role})


def set_tier(tx: Storage, tier: Tier, *, now: datetime) -> None:
    """Put the tenant into a tier; that it is there already is no error."""
    tx.tenants.lock()
    tenant = tx.tenants.get()
    if tenant.tier != tier:
        tx.tenants.set_tier(tier, now)
        tx.audit.record(
            "tenant.tier_changed", subject=tenant.slug, now=now, details={"from": tenant.tier, "to": tier}
        )


def set_active(tx: Storage, *, is_active: bool, now: datetime) -> None:
    """Switch the tenant off, or on again. Sessions and keys are kept; while it is off they open nothing."""
    tx.tenants.lock()
    tenant = tx.tenants.get()
    if tenant.is_active != is_active:
        tx.tenants.set_active(is_active, now)
        tx.audit.record("tenant.enabled" if is_active else "tenant.disabled", subject=tenant.slug, now=now)


def get_user(users: Members, email: str) -> User:
    """The tenant's user with this email, in whatever capitals; raises `NotFound`."""
    user = users.find_by_email(normalise_email(email))
    if user is None:
        raise NotFound("The tenant has no user with this email.")
    return user


def set_role(tx: Storage, email: str, role: Role, *, now: datetime) -> None:
    """Give a user another role, which counts from their next request; raises `NotFound`, `Conflict`."""
    tx.tenants.lock()
    user = get_user(tx.users, email)
    if user.role == role:
        return
    require_another_owner(tx.users, user)
    tx.users.set_role(user.id, role, now)
    tx.audit.record("user.role_changed", subject=user.email, now=now, details={"from": user.role, "to": role})


def enable_user(tx: Storage, email: str, *, now: datetime) -> None:
    """Let a disabled user log in again; raises `NotFound`."""
    user = get_user(tx.users, email)
    if not user.is_active:
        tx.users.enable(user.id, now)
        tx.audit.record("user.enabled", subject=user.email, now=now)


def require_another_owner(users: Members, user: User) -> None:
    """Raises `Conflict` if the user is the only active owner: nobody could make another one.

    The caller holds the tenant's lock, or two owners could end each other.
    """
    others = [other for other in users.all() if other.id != user.id]
    if is_active_owner(user) and not any(map(is_active_owner, others)):
        raise Conflict("A tenant keeps at least one active owner: make another user an owner first.")


def is_active_owner(user: User) -> bool:
    return user.role == "owner" and user.is_active


def _new_tenant(tx: Storage, details: Mapping[str, str], now: datetime) -> Tenant:
    return Tenant(
        id=tx.tenant_id,
        company_name=details["company_name"].strip(),
        slug=next(
            slug for slug in slugs(details["company_name"]) if tx.directory.claim("slug", slug, tx.tenant_id)
        ),
        email=normalise_email(details["email"]),
        domain=details.get("domain"),
        webhook_url=details.get("webhook_url"),
        stripe_account_id=None,
        stripe_status="not_connected",
        tier="free",
        is_active=True,
        created_at=now,
        updated_at=now,
    )


def new_user(tenant: Tenant, details: Mapping[str, str], *, role: Role, now: datetime) -> User:
    """A user of the tenant, not yet kept."""
    return User(
        tenant_id=tenant.id,
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


class TenantShelf(Protocol):
    def add(self, tenant: Tenant) -> None: ...
    def get(self) -> Tenant: ...
    def lock(self) -> None: ...
    def set_tier(self, tier: str, now: datetime) -> None: ...
    def set_active(self, is_active: bool, now: datetime) -> None: ...


class Members(Protocol):
    """The users of a tenant, to look at."""

    def all(self) -> list[User]: ...
    def find_by_email(self, email: str) -> User | None: ...


class UserShelf(Members, Protocol):
    def add(self, user: User, *, password_hash: str) -> None: ...
    def set_role(self, id: UUID, role: str, now: datetime) -> None: ...
    def enable(self, id: UUID, now: datetime) -> None: ...


class WebhookShelf(Protocol):
    def open(self, url: str | None, secret: str, *, now: datetime) -> None: ...


class Storage(keys.Storage, Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenants(self) -> TenantShelf: ...
    @property
    def users(self) -> UserShelf: ...
    @property
    def webhooks(self) -> WebhookShelf: ...
