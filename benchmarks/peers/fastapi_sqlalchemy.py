"""FastAPI and SQLAlchemy's ORM on psycopg2, in FastAPI's threads: as most of its services are written."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import ForeignKey, Text, create_engine, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    sessionmaker,
)

from benchmarks.peers import answers, common

# A connection for each of the threads. With the pool's default of 15, requests that hold one wait for a thread, and
# threads for a connection: at 64 clients nothing is answered until they time out.
opened = sessionmaker(create_engine("postgresql+psycopg2://", pool_size=40))
app = FastAPI()


class Base(DeclarativeBase):
    pass


class Tenant(Base):
    __tablename__ = "tenants"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    company_name: Mapped[str]
    slug: Mapped[str]
    email: Mapped[str]
    domain: Mapped[str | None]
    stripe_account_id: Mapped[str | None]
    stripe_status: Mapped[str]
    tier: Mapped[str]
    is_active: Mapped[bool]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    webhook: Mapped[Webhook | None] = relationship()


class Webhook(Base):
    __tablename__ = "webhook_endpoints"
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    url: Mapped[str | None]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    updated_at: Mapped[datetime]


class ApiKey(Base):
    __tablename__ = "api_keys"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"))
    type: Mapped[str]
    digest: Mapped[str]
    last4: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    tenant: Mapped[Tenant] = relationship()


class User(Base):
    __tablename__ = "users"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"))
    email: Mapped[str]
    first_name: Mapped[str]
    last_name: Mapped[str]
    role: Mapped[str]
    is_active: Mapped[bool]
    last_login: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    tenant: Mapped[Tenant] = relationship()


def session() -> Iterator[Session]:
    with opened() as made:
        yield made


Database = Annotated[Session, Depends(session)]


def find_key(key: Annotated[str, Depends(APIKeyHeader(name="X-API-Key"))], database: Database) -> ApiKey:
    whole = joinedload(ApiKey.tenant).joinedload(Tenant.webhook)
    found = database.scalar(select(ApiKey).options(whole).where(ApiKey.digest == common.digest(key)))
    if found is None or not works(found):
        raise HTTPException(401)
    return found


def works(key: ApiKey) -> bool:
    lives = key.revoked_at is None and (key.expires_at is None or datetime.now(UTC) < key.expires_at)
    return lives and key.tenant.is_active


def find_user(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())], database: Database
) -> User:
    ids = common.read_token(f"{credentials.scheme} {credentials.credentials}")
    if ids is None:
        raise HTTPException(401)
    whole = joinedload(User.tenant).joinedload(Tenant.webhook)
    mine = User.tenant_id == ids[0], User.id == ids[1]
    found = database.scalar(select(User).options(whole).where(*mine))
    if found is None or not (found.is_active and found.tenant.is_active):
        raise HTTPException(401)
    return found


def tenant_of(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "company_name": tenant.company_name,
        "slug": tenant.slug,
        "is_active": tenant.is_active,
        "created_at": tenant.created_at,
        "email": tenant.email,
        "domain": tenant.domain,
        "webhook_url": tenant.webhook and tenant.webhook.url,
        "stripe_connect_account_id": tenant.stripe_account_id,
        "stripe_connect_status": tenant.stripe_status,
        "subscription_tier": tenant.tier,
        "updated_at": tenant.updated_at,
    }


@app.get("/api/v1/auth/tenants/verify/", response_model=answers.Verified)
def verify(key: Annotated[ApiKey, Depends(find_key)]) -> Any:
    mode = key.type.partition("_")[0]
    shown = {
        "type": key.type,
        "mode": mode,
        "last4": key.last4,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
    }
    return {"valid": True, "tenant": tenant_of(key.tenant), "mode": mode, "key": shown}


@app.get("/api/v1/auth/tenants/me/", response_model=answers.Current)
def me(user: Annotated[User, Depends(find_user)]) -> Any:
    shown = {
        "id": user.id,
        "tenant": user.tenant_id,
        "tenant_name": user.tenant.company_name,
        "email": user.email,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "role": user.role,
        "is_active": user.is_active,
        "last_login": user.last_login,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
    }
    return {"user": shown, "tenant": tenant_of(user.tenant)}


@app.post("/api/v1/auth/tenants/register/")
def register(_wanted: common.Registration) -> None:
    raise HTTPException(501, "Not measured")


@app.post("/api/v1/auth/tenants/webhooks/config/", response_model=answers.Configured)
def configure_webhook(
    wanted: common.Webhook, user: Annotated[User, Depends(find_user)], database: Database
) -> Any:
    if user.role not in ("owner", "admin"):
        raise HTTPException(403)
    webhook = user.tenant.webhook
    webhook.url, webhook.event_types = str(wanted.webhook_url), wanted.event_types
    webhook.updated_at = datetime.now(UTC)
    kept = {"webhook_url": webhook.url, "event_types": webhook.event_types}
    database.commit()
    return kept
