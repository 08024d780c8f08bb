"""JSON objects as clients see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from billing.deliveries import Report
from billing.keys import ApiKey, NewKey
from billing.security import Caller
from billing.stripe_connect import MESSAGES, Connected, Requirements
from billing.stripe_connections import ConnectStart, StatusView
from billing.tenants import Registered, Tenant, public_members
from billing.tokens import TokenPair
from billing.users import User
from billing.webhooks.delivery import MESSAGES_OF_FAILURES, Delivery, Stats
from billing.webhooks.endpoints import Configured, Endpoint, Secret, previous_expiry

Shape = dict[str, Any]


def tenant(tenant: Tenant) -> Shape:
    return public_members(tenant) | {
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
    return tenant(caller.tenant) if caller.sees_private_members else public_members(caller.tenant)


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
    """A key in a list: a publishable one whole, a secret one by its last four characters."""
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


# Stripe Connect ----------------------------------------------------------------------------------


def connect_start(start: ConnectStart) -> Shape:
    """Where to send the browser, and the state that it brings back."""
    return {
        "url": start.url,
        "state": start.state_text,
        "redirect_uri": start.redirect_uri,
        "flow": start.state.flow,
        "expires_at": start.state.expires_at,
    }


def connected(connected: Connected) -> Shape:
    """An account just connected, as the unauthenticated bearer of the state may see it."""
    return {
        "message": "The Stripe account is connected.",
        "account_id": connected.connection.account.id,
        "status": connected.connection.status,
        "tenant": public_members(connected.tenant),
    }


def stripe_status(view: StatusView) -> Shape:
    """What is known of the account; without one the same members, empty."""
    connection = view.connection
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
        "source": "live" if view.is_live else "cache",
    }


def _requirements(requirements: Requirements) -> Shape:
    deadline = requirements.current_deadline
    at = None if deadline is None else datetime.fromtimestamp(deadline, UTC)
    return asdict(requirements) | {"current_deadline": at}


# Webhooks ----------------------------------------------------------------------------------------


def webhook_config(
    endpoint: Endpoint, secrets: Sequence[Secret], recent: Sequence[Delivery], stats: Stats, base_url: str
) -> Shape:
    """The endpoint, with its latest deliveries and their statistics."""
    return {
        "webhook_url": endpoint.url,
        "webhook_secret": f"whsec_****...{secrets[0].last4}" if secrets else None,
        "configured": endpoint.url is not None,
        "event_types": endpoint.event_types,
        "status": _webhook_status(endpoint),
        "disabled_reason": endpoint.disabled_reason,
        "failing_since": endpoint.failing_since,
        "previous_secret_expires_at": previous_expiry(secrets),
        "stats": asdict(stats),
        "recent_deliveries": [delivery(one) for one in recent],
        "instructions": {
            "message": "Verify the signature of each event before you trust it.",
            "signature_header": "webhook-signature",
            "documentation": f"{base_url}/docs/",
        },
    }


def webhook_configured(configured: Configured, base_url: str) -> Shape:
    """The endpoint as it is now, with the secret if it was just made."""
    endpoint = configured.endpoint
    answer = {
        "message": "The webhook is configured.",
        "webhook_url": endpoint.url,
        "event_types": endpoint.event_types,
        "status": _webhook_status(endpoint),
        "previous_secret_expires_at": configured.previous_secret_expires_at,
        "test_url": f"{base_url}/api/v1/auth/tenants/webhooks/test/",
    }
    if configured.new_secret is None:
        return answer
    warning = "Store the secret now. It is not shown again."
    return answer | {"webhook_secret": configured.new_secret, "warning": warning}


def _webhook_status(endpoint: Endpoint) -> str:
    return "active" if endpoint.is_active else "disabled"


def delivery(delivery: Delivery) -> Shape:
    return {
        "id": delivery.id,
        "event_type": delivery.event_type,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "http_status": delivery.http_status,
        "error": delivery.error,
        "duration_ms": delivery.duration_ms,
        "next_attempt_at": delivery.next_attempt_at,
        "created_at": delivery.created_at,
    }


def test_report(report: Report) -> Shape:
    """The result of a test, for the developer of the receiver."""
    attempt = report.attempt
    return {
        "message": MESSAGES_OF_FAILURES[attempt.error]
        if attempt.error
        else f"The receiver answered {attempt.http_status}.",
        "success": attempt.is_success,
        "webhook_url": report.url,
        "status_code": attempt.http_status,
        "response_time_ms": attempt.duration_ms,
        "response_body": attempt.body.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")[
            :500
        ],
        "error": attempt.reason,
        "event_sent": report.event_type,
    }
