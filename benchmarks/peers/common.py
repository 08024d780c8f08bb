"""What peers share: the digest of a key, the decoding of a token, queries, answers and the models of requests."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import jwt
from pydantic import BaseModel, ConfigDict, EmailStr, Field, HttpUrl, StringConstraints

KEY_PEPPER_ID, KEY_PEPPER = os.environ["KEY_PEPPER_ID"], bytes.fromhex(os.environ["KEY_PEPPER"])
JWT_SECRET = os.environ["JWT_SECRET"]


TENANT = """
    t.id AS tenant_id, t.company_name, t.slug, t.is_active AS tenant_is_active, t.created_at AS tenant_created_at,
    t.email AS tenant_email, t.domain, w.url AS webhook_url, t.stripe_account_id, t.stripe_status, t.tier,
    t.updated_at AS tenant_updated_at
"""
FIND_KEY = f"""
    SELECT {TENANT}, k.type, k.last4, k.created_at, k.expires_at, k.revoked_at, k.last_used_at
    FROM api_keys k JOIN tenants t ON t.id = k.tenant_id LEFT JOIN webhook_endpoints w ON w.tenant_id = t.id
    WHERE k.digest = $1
"""
FIND_USER = f"""
    SELECT {TENANT}, u.id, u.email, u.first_name, u.last_name, u.role, u.is_active, u.last_login,
        u.created_at, u.updated_at
    FROM users u JOIN tenants t ON t.id = u.tenant_id LEFT JOIN webhook_endpoints w ON w.tenant_id = t.id
    WHERE u.tenant_id = $1 AND u.id = $2
"""
SET_WEBHOOK = """
    UPDATE webhook_endpoints SET url = $2, event_types = $3, updated_at = now() WHERE tenant_id = $1
    RETURNING url, event_types
"""


def digest(key: str) -> str:
    return f"{KEY_PEPPER_ID}:{hmac.digest(KEY_PEPPER, key.encode(), hashlib.sha256).hex()}"


def read_token(authorization: str | None) -> tuple[UUID, UUID] | None:
    """The ids of tenant and user, or None if the token is invalid."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    try:
        claims = jwt.decode(
            token, JWT_SECRET, algorithms=["HS256"], options={"require": ["exp", "tenant_id", "user_id"]}
        )
        return UUID(claims["tenant_id"]), UUID(claims["user_id"])
    except (jwt.PyJWTError, ValueError):
        return None


def works(key: Mapping[str, Any]) -> bool:
    expires_at = key["expires_at"]
    lives = key["revoked_at"] is None and (expires_at is None or datetime.now(UTC) < expires_at)
    return lives and bool(key["tenant_is_active"])


def tenant_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["tenant_id"],
        "company_name": row["company_name"],
        "slug": row["slug"],
        "is_active": row["tenant_is_active"],
        "created_at": row["tenant_created_at"],
        "email": row["tenant_email"],
        "domain": row["domain"],
        "webhook_url": row["webhook_url"],
        "stripe_connect_account_id": row["stripe_account_id"],
        "stripe_connect_status": row["stripe_status"],
        "subscription_tier": row["tier"],
        "updated_at": row["tenant_updated_at"],
    }


def verified(row: Mapping[str, Any]) -> dict[str, Any]:
    mode = row["type"].partition("_")[0]
    return {
        "valid": True,
        "tenant": tenant_of(row),
        "mode": mode,
        "key": {
            "type": row["type"],
            "mode": mode,
            "last4": row["last4"],
            "created_at": row["created_at"],
            "expires_at": row["expires_at"],
            "last_used_at": row["last_used_at"],
        },
    }


def current(row: Mapping[str, Any]) -> dict[str, Any]:
    user = {
        "id": row["id"],
        "tenant": row["tenant_id"],
        "tenant_name": row["company_name"],
        "email": row["email"],
        "first_name": row["first_name"],
        "last_name": row["last_name"],
        "role": row["role"],
        "is_active": row["is_active"],
        "last_login": row["last_login"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
    }
    return {"user": user, "tenant": tenant_of(row)}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Registration(Strict):
    company_name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    email: EmailStr
    password: Annotated[str, StringConstraints(min_length=12, max_length=128)]
    first_name: Annotated[str, StringConstraints(max_length=150)] = ""
    last_name: Annotated[str, StringConstraints(max_length=150)] = ""
    domain: (
        Annotated[str, StringConstraints(min_length=4, max_length=253, pattern=r"^[A-Za-z0-9.-]+$")] | None
    ) = None
    webhook_url: HttpUrl | None = None


class Webhook(Strict):
    webhook_url: HttpUrl
    event_types: Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=20)] = []
