"""The nouns as clients see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from billing.connections import Departure, Seen
from billing.keys import ApiKey, NewKey
from billing.security import Caller
from billing.stripe_connect import MESSAGES, Connected, Requirements
from billing.tenants import Registered, Tenant
from billing.tokens import TokenPair
from billing.users import User

Shape = dict[str, Any]


def public_tenant(tenant: Tenant) -> Shape:
    """What anyone may know who holds a publishable key."""
    return {
        "id": tenant.id,
        "company_name": tenant.company_name,
        "slug": tenant.slug,
        "is_active": tenant.is_active,
        "created_at": tenant.created_at,
    }


def tenant(tenant: Tenant) -> Shape:
    return public_tenant(tenant) | {
        "email": tenant.email,
        "domain": tenant.domain,
        "webhook_url": tenant.webhook_url,
        "stripe_connect_account_id": tenant.stripe_account_id,
        "stripe_connect_status": tenant.stripe_status,
        "subscription_tier": tenant.tier,
        "updated_at": tenant.updated_at,
    }


def tenant_for(caller: Caller) -> Shape:
    """The caller's tenant, as much of it as the credentials may see."""
    return tenant(caller.tenant) if caller.sees_private_members else public_tenant(caller.tenant)


def registered_tenant(made: Registered) -> Shape:
    """The tenant with its secrets: shown here, and nowhere else."""
    texts = {new.key.type: new.text for new in made.keys}
    return tenant(made.tenant) | {
        "api_key_public": texts["live_public"],
        "api_key_secret": texts["live_secret"],
        "api_key_test_public": texts["test_public"],
        "api_key_test_secret": texts["test_secret"],
        "webhook_secret": made.webhook_secret,
    }


def user(user: User, tenant: Tenant) -> Shape:
    return {
        "id": user.id,
        "tenant": user.tenant_id,
        "tenant_name": tenant.company_name,
        "email": user.email,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "role": user.role,
        "is_active": user.is_active,
        "last_login": user.last_login,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
    }


def tokens(pair: TokenPair) -> Shape:
    return {"access": pair.access, "refresh": pair.refresh}


def verified_key(key: ApiKey) -> Shape:
    return {
        "type": key.type,
        "mode": key.mode,
        "last4": key.last4,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
    }


def listed_key(key: ApiKey, now: datetime) -> Shape:
    """A key among others: a publishable one whole, a secret one by its last four characters."""
    return verified_key(key) | {
        "id": key.id,
        "key": key.text or f"sk_{key.mode}_****...{key.last4}",
        "masked": key.text is None,
        "revoked_at": key.revoked_at,
        "status": key.status_at(now),
    }


def new_keys(minted: Sequence[NewKey]) -> Shape:
    """The keys just made, whole, by type."""
    return {
        new.key.type: {
            "id": new.key.id,
            "type": new.key.type,
            "key": new.text,
            "mode": new.key.mode,
            "last4": new.key.last4,
            "created_at": new.key.created_at,
        }
        for new in minted
    }


def previous_key(key: ApiKey) -> Shape:
    return {"type": key.type, "mode": key.mode, "last4": key.last4, "expires_at": key.expires_at}


# Stripe Connect ----------------------------------------------------------------------------------


def departure(departure: Departure) -> Shape:
    """Where to send the browser, and the state that it brings back."""
    return {
        "url": departure.url,
        "state": departure.started.text,
        "redirect_uri": departure.redirect_uri,
        "flow": departure.started.state.flow,
        "expires_at": departure.started.state.expires_at,
    }


def connected(connected: Connected) -> Shape:
    """An account just connected, told to whoever brought the state."""
    return {
        "message": "The Stripe account is connected.",
        "account_id": connected.connection.account.id,
        "status": connected.connection.status,
        "tenant": public_tenant(connected.tenant),
    }


def stripe_status(seen: Seen) -> Shape:
    """What is known of an account. Without one the same members, empty."""
    connection = seen.connection
    living = connection if connection is not None and connection.is_living else None
    status = connection.status if connection else "not_connected"
    account = living.account if living else None
    return {
        "connected": living is not None,
        "account_id": account and account.id,
        "livemode": living and living.livemode,
        "status": status,
        "charges_enabled": account and account.charges_enabled,
        "payouts_enabled": account and account.payouts_enabled,
        "details_submitted": account and account.details_submitted,
        "requirements": _requirements(account.requirements if account else Requirements()),
        "capabilities": account.capabilities if account else {},
        "account_details": {
            "email": account and account.email,
            "business_type": account and account.business_type,
            "country": account and account.country,
            "default_currency": account and account.default_currency,
            "details_submitted": account and account.details_submitted,
        },
        "message": MESSAGES[status],
        "checked_at": connection and connection.checked_at,
        "source": "live" if seen.is_live else "cache",
    }


def _requirements(asked: Requirements) -> Shape:
    deadline = asked.current_deadline
    at = None if deadline is None else datetime.fromtimestamp(deadline, UTC)
    return asdict(asked) | {"current_deadline": at}
