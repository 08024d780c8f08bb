"""The answers of the FastAPI peers, as the models from which FastAPI makes its document and filters answers."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel


class Tenant(BaseModel):
    id: UUID
    company_name: str
    slug: str
    is_active: bool
    created_at: datetime
    email: str
    domain: str | None
    webhook_url: str | None
    stripe_connect_account_id: str | None
    stripe_connect_status: str
    subscription_tier: str
    updated_at: datetime


class User(BaseModel):
    id: UUID
    tenant: UUID
    tenant_name: str
    email: str
    first_name: str
    last_name: str
    role: str
    is_active: bool
    last_login: datetime | None
    created_at: datetime
    updated_at: datetime


class Key(BaseModel):
    type: str
    mode: str
    last4: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


class Verified(BaseModel):
    valid: bool
    tenant: Tenant
    mode: str
    key: Key


class Current(BaseModel):
    user: User
    tenant: Tenant


class Configured(BaseModel):
    webhook_url: str
    event_types: list[str]
