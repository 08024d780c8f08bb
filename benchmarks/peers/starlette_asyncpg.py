"""Bare Starlette and asyncpg: a minimal Python service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.peers import common


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with asyncpg.create_pool() as pool:
        app.state.pool = pool
        yield


def plain(value: Any) -> Any:
    """Convert a value to what the standard library's JSON can write."""
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def unauthorized() -> Response:
    return JSONResponse({"detail": "Unauthorized"}, 401)


async def verify(request: Request) -> Response:
    key = request.headers.get("x-api-key")
    row = key and await request.app.state.pool.fetchrow(common.FIND_KEY, common.digest(key))
    if not row or not common.works(row):
        return unauthorized()
    return JSONResponse(plain(common.verified(row)))


async def find_user(request: Request) -> asyncpg.Record | None:
    ids = common.read_token(request.headers.get("authorization"))
    row = ids and await request.app.state.pool.fetchrow(common.FIND_USER, *ids)
    return row if row and row["is_active"] and row["tenant_is_active"] else None


async def me(request: Request) -> Response:
    row = await find_user(request)
    return JSONResponse(plain(common.current(row))) if row else unauthorized()


async def register(request: Request) -> Response:
    try:
        common.Registration.model_validate_json(await request.body())
    except ValidationError as error:
        return JSONResponse({"detail": error.errors(include_url=False, include_context=False)}, 422)
    return JSONResponse({"detail": "Not measured"}, 501)


async def configure_webhook(request: Request) -> Response:
    row = await find_user(request)
    if row is None or row["role"] not in ("owner", "admin"):
        return unauthorized()
    try:
        wanted = common.Webhook.model_validate_json(await request.body())
    except ValidationError as error:
        return JSONResponse({"detail": error.errors(include_url=False, include_context=False)}, 422)
    kept = await request.app.state.pool.fetchrow(
        common.SET_WEBHOOK, row["tenant_id"], str(wanted.webhook_url), wanted.event_types
    )
    return JSONResponse({"webhook_url": kept["url"], "event_types": kept["event_types"]})


app = Starlette(
    routes=[
        Route("/api/v1/auth/tenants/verify/", verify),
        Route("/api/v1/auth/tenants/me/", me),
        Route("/api/v1/auth/tenants/register/", register, methods=["POST"]),
        Route("/api/v1/auth/tenants/webhooks/config/", configure_webhook, methods=["POST"]),
    ],
    lifespan=lifespan,
)
