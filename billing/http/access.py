"""Security as Connexion asks for it: two schemes that find the caller, and a gate that looks at roles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from connexion.lifecycle import ConnexionRequest
from connexion.security import NO_VALUE, ApiKeySecurityHandler, BearerSecurityHandler
from starlette.types import ASGIApp, Receive, Scope, Send

from billing.errors import TokenInvalid
from billing.http.document import Operation
from billing.http.lanes import Lane, Lanes
from billing.security import Caller, Doorkeeper, require_allowed

API_KEY = "apiKeyAuth"
Verify = Callable[[ConnexionRequest], Awaitable[Any]]


def security_map(doorkeeper: Doorkeeper, lanes: Lanes) -> dict[str, type]:
    """Connexion's handler classes by scheme. Nothing of Python stands in the document.

    Both are asynchronous, with threads of their own: a synchronous one would hold the event loop. If
    `Authorization` is present it alone counts: Connexion would let a good key make up for a bad token
    (spec-first/connexion#1767).
    """

    async def found(
        request: ConnexionRequest, find: Callable[[str], Caller], credential: str
    ) -> dict[str, Any]:
        caller = await lanes.run(Lane.SECURITY, partial(find, credential))
        request.scope["state"].update(caller=caller, tenant_id=caller.tenant_id)
        return {"sub": str(caller.tenant_id)}  # Connexion wants a mapping; we keep the caller ourselves.

    async def by_bearer(request: ConnexionRequest) -> Any:
        credential = bearer_credential(request.headers.getlist("authorization"))
        if credential is None:
            return NO_VALUE
        if not credential:
            raise TokenInvalid
        return await found(request, doorkeeper.by_bearer, credential)

    async def by_api_key(request: ConnexionRequest) -> Any:
        given = request.headers.getlist("x-api-key")
        if not given or "authorization" in request.headers:
            return NO_VALUE
        # Blanks around a field value are no part of it (RFC 9110, section 5.5).
        return await found(request, doorkeeper.by_key, ",".join(given).strip(" \t"))

    return {
        "bearer": _handler(BearerSecurityHandler, by_bearer),
        "apiKey": _handler(ApiKeySecurityHandler, by_api_key),
    }


def bearer_credential(authorization: Sequence[str]) -> str | None:
    """The credential of the Authorization headers, None where there is no header.

    A header with another scheme, or two headers, is a bad credential and not a missing one.
    """
    if not authorization:
        return None
    scheme, _, credential = authorization[0].partition(" ")
    if len(authorization) > 1 or scheme.lower() != "bearer":
        return ""
    return credential.strip()


def _handler(base: type, verify: Verify) -> type:
    def get_fn(*_: object) -> Verify:
        return verify

    return type(base.__name__, (base,), {"get_fn": get_fn})


class Gate:
    """ASGI middleware between Connexion's security and its validation: may this caller do this?

    Here, and not in a security function: an error raised there is swallowed when another scheme passes.
    """

    def __init__(self, app: ASGIApp, *, operations: Mapping[str, Operation]) -> None:
        self.app = app
        self.operations = operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (caller := scope["state"].get("caller")) is not None:
            operation = self.operations[operation_id_of(scope)]
            require_allowed(caller, roles=operation.roles, keys_allowed=API_KEY in operation.schemes)
        await self.app(scope, receive, send)


class NameOperation:
    """ASGI middleware after Connexion's routing: leaves the operationId where the log looks for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["operation_id"] = operation_id_of(scope)
        await self.app(scope, receive, send)


def operation_id_of(scope: Scope) -> Any:
    """The operation that Connexion routed to, None where it found none."""
    return scope["extensions"]["connexion_routing"]["operation_id"]
