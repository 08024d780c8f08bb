"""FastAPI and asyncpg: dependencies for credentials, models for requests and answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from benchmarks.peers import answers, common


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool() as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


async def pool_of(request: Request) -> asyncpg.Pool:
    return request.app.state.pool


Pool = Annotated[asyncpg.Pool, Depends(pool_of)]


async def find_key(
    key: Annotated[str, Depends(APIKeyHeader(name="X-API-Key"))], pool: Pool
) -> asyncpg.Record:
    row = await pool.fetchrow(common.FIND_KEY, common.digest(key))
    if row is None or not common.works(row):
        raise HTTPException(401)
    return row


async def find_user(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())], pool: Pool
) -> asyncpg.Record:
    ids = common.read_token(f"{credentials.scheme} {credentials.credentials}")
    row = await pool.fetchrow(common.FIND_USER, *ids) if ids else None
    if row is None or not (row["is_active"] and row["tenant_is_active"]):
        raise HTTPException(401)
    return row


@app.get("/api/v1/auth/tenants/verify/", response_model=answers.Verified)
async def verify(row: Annotated[asyncpg.Record, Depends(find_key)]) -> Any:
    return common.verified(row)


@app.get("/api/v1/auth/tenants/me/", response_model=answers.Current)
async def me(row: Annotated[asyncpg.Record, Depends(find_user)]) -> Any:
    return common.current(row)


@app.post("/api/v1/auth/tenants/register/")
async def register(_wanted: common.Registration) -> None:
    raise HTTPException(501, "Not measured")


@app.post("/api/v1/auth/tenants/webhooks/config/", response_model=answers.Configured)
async def configure_webhook(
    wanted: common.Webhook, row: Annotated[asyncpg.Record, Depends(find_user)], pool: Pool
) -> Any:
    if row["role"] not in ("owner", "admin"):
        raise HTTPException(403)
    kept = await pool.fetchrow(
        common.SET_WEBHOOK, row["tenant_id"], str(wanted.webhook_url), wanted.event_types
    )
    return {"webhook_url": kept["url"], "event_types": kept["event_types"]}
