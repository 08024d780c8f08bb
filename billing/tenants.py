"""Tenants: what they are, and how one comes to be."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, Protocol
from uuid import UUID

from slugify import slugify

from billing import keys, users
from billing.keys import KeyDigests, NewKey
from billing.ports import Events, Tasks
from billing.users import User, normalise_email
from billing.webhooks.signing import new_secret

Tier = Literal["free", "pro", "enterprise"]

LONGEST_SLUG = 60

# The task that deletes what need not be kept.
HOUSEKEEPING = "housekeeping"
TIDIED_EVERY = timedelta(days=1)


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
    tier: Tier
    is_active: bool
    created_at: datetime
    updated_at: datetime


def public_members(tenant: Tenant) -> dict[str, object]:
    """What anyone may know, such as the holder of a publishable key or a receiver of webhooks."""
    return {
        "id": tenant.id,
        "company_name": tenant.company_name,
        "slug": tenant.slug,
        "is_active": tenant.is_active,
        "created_at": tenant.created_at,
    }


@dataclass(frozen=True)
class TenantSummary:
    """What the platform's operator sees of each tenant."""

    id: UUID
    slug: str
    company_name: str
    email: str
    tier: Tier
    is_active: bool
    stripe_status: str
    created_at: datetime


@dataclass(frozen=True)
class Account:
    """What a login needs: a user, their tenant, and what is kept of the password."""

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


def own_words(details: Mapping[str, str]) -> list[str]:
    """The words of a registration, which the account's passwords must not be made of."""
    names = ("email", "company_name", "first_name", "last_name", "domain")
    return [details[name] for name in names if name in details]


def words_of(user: User, tenant: Tenant) -> list[str]:
    """The words of an existing account that its passwords must not be made of."""
    names = {"first_name": user.first_name, "last_name": user.last_name, "domain": tenant.domain or ""}
    return own_words({"email": user.email, "company_name": tenant.company_name, **names})


def slugs(company_name: str) -> Iterator[str]:
    """Slugs to try for a name: the plain one, then ones with a random suffix."""
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
    tenant = _new_tenant(tx.tenant_id, details, slug=claim_slug(tx, details["company_name"]), now=now)
    owner = users.new_user(tenant.id, details, role="owner", now=now)
    tx.tenants.add(tenant)
    tx.audit.record("tenant.registered", subject=tenant.slug, now=now)
    users.add(tx, owner, password_hash=password_hash, now=now)
    minted = keys.mint_each(tx, digests=digests, now=now)
    secret = new_secret()
    tx.webhooks.open(details.get("webhook_url"), secret, now=now)
    tx.events.record("tenant.registered", {"tenant": public_members(tenant)}, now=now)
    tx.tasks.add(HOUSEKEEPING, tenant.id, subject=str(tenant.id), due_at=now + TIDIED_EVERY, now=now)
    return Registered(tenant, owner, minted, secret)


def set_tier(tx: Storage, tier: Tier, *, now: datetime) -> None:
    """Put the tenant into a tier, if it is in another one. The caller holds the tenant's lock."""
    tenant = tx.tenants.get()
    if tenant.tier != tier:
        tx.tenants.set_tier(tier, now)
        tx.audit.record(
            "tenant.tier_changed", subject=tenant.slug, now=now, details={"from": tenant.tier, "to": tier}
        )


def set_active(tx: Storage, *, is_active: bool, now: datetime) -> None:
    """Disable the tenant, or enable it again. Sessions and keys are kept; meanwhile they grant nothing.

    The caller holds the tenant's lock.
    """
    tenant = tx.tenants.get()
    if tenant.is_active != is_active:
        tx.tenants.set_active(is_active, now)
        tx.audit.record("tenant.enabled" if is_active else "tenant.disabled", subject=tenant.slug, now=now)


def claim_slug(tx: Storage, company_name: str) -> str:
    """A slug made from the name, which nobody else has."""
    return next(slug for slug in slugs(company_name) if tx.directory.claim("slug", slug, tx.tenant_id))


def _new_tenant(tenant_id: UUID, details: Mapping[str, str], *, slug: str, now: datetime) -> Tenant:
    return Tenant(
        id=tenant_id,
        company_name=details["company_name"],
        slug=slug,
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


class TenantShelf(Protocol):
    def add(self, tenant: Tenant) -> None: ...
    def get(self) -> Tenant: ...
    def set_tier(self, tier: str, now: datetime) -> None: ...
    def set_active(self, is_active: bool, now: datetime) -> None: ...


class WebhookShelf(Protocol):
    def open(self, url: str | None, secret: str, *, now: datetime) -> None: ...


class Storage(keys.Storage, users.Storage, Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenants(self) -> TenantShelf: ...
    @property
    def webhooks(self) -> WebhookShelf: ...
    @property
    def events(self) -> Events: ...
    @property
    def tasks(self) -> Tasks: ...
