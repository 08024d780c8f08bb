"""Access: two security schemes that find the caller, what a caller may do, and adapters for Connexion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from connexion.exceptions import ProblemException
from connexion.lifecycle import ConnexionRequest
from connexion.security import NO_VALUE, ApiKeySecurityHandler, BearerSecurityHandler
from starlette.types import ASGIApp, Receive, Scope, Send

from billing.errors import CredentialsMissing, TokenExpired, TokenInvalid, Unauthenticated
from billing.http.document import Operation
from billing.http.headers import texts
from billing.http.limits import Limits
from billing.security import Authenticator, Caller, require_allowed

API_KEY = "apiKeyAuth"
Verify = Callable[[ConnexionRequest], Awaitable[Any]]


class Access:
    """Authenticates requests, and authorises their callers."""

    def __init__(self, authenticator: Authenticator, limits: Limits) -> None:
        self._authenticator = authenticator
        self._limits = limits

    async def admit(self, scope: Scope, operation: Operation) -> None:
        """Store the caller in the request's state; raises `Unauthenticated`, or `Forbidden` if not allowed.

        Raises `RateLimited` instead after too many bad credentials of an address, or requests of a caller.
        """
        try:
            await self._find(scope, operation)
        except TokenExpired:
            raise  # Not counted: the token was ours, and its client must learn to renew it.
        except Unauthenticated:
            await self._limits.count_bad_credentials(scope)
            raise
        await authorise(scope, operation, self._limits)

    async def _find(self, scope: Scope, operation: Operation) -> None:
        takes_key = API_KEY in operation.schemes
        if not (await self.by_bearer(scope) or (takes_key and await self.by_api_key(scope))):
            raise CredentialsMissing

    async def by_bearer(self, scope: Scope) -> bool:
        """Find the caller by `Authorization`; False where there is no such header.

        Where it is present it alone counts: Connexion would accept a good key beside a bad token
        (spec-first/connexion#1767).
        """
        credential = bearer_credential(texts(scope["headers"], b"authorization"))
        if credential is None:
            return False
        if not credential:
            raise TokenInvalid
        store_caller(scope, await self._authenticator.by_bearer(credential))
        return True

    async def by_api_key(self, scope: Scope) -> bool:
        """Find the caller by `X-API-Key`; False where it is absent, or `Authorization` is present."""
        given = texts(scope["headers"], b"x-api-key")
        if not given or texts(scope["headers"], b"authorization"):
            return False
        # Blanks around a field value are no part of it (RFC 9110, section 5.5).
        store_caller(scope, await self._authenticator.by_key(",".join(given).strip(" \t")))
        return True


def store_caller(scope: Scope, caller: Caller) -> None:
    """Store the caller in the request's state."""
    scope["state"].update(caller=caller, tenant_id=caller.tenant_id)


async def authorise(scope: Scope, operation: Operation, limits: Limits) -> None:
    """Raise unless the document allows the caller this operation, and the limits allow one more request."""
    caller = scope["state"]["caller"]
    await limits.admit_caller(scope)
    require_allowed(caller, roles=operation.roles, keys_allowed=API_KEY in operation.schemes)
    await limits.admit_cost(scope, operation)


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


# Adapters for Connexion's stack -------------------------------------------------------------------


def security_map(access: Access) -> dict[str, type]:
    """Connexion's handler classes by scheme, so that the document names no Python function."""
    return {
        "bearer": _handler(BearerSecurityHandler, access.by_bearer),
        "apiKey": _handler(ApiKeySecurityHandler, access.by_api_key),
    }


def _handler(base: type, find: Callable[[Scope], Awaitable[bool]]) -> type:
    async def verify(request: ConnexionRequest) -> Any:
        # Connexion wants a mapping; the caller is in the state.
        return {"sub": ""} if await find(request.scope) else NO_VALUE

    def get_fn(*_: object) -> Verify:
        return verify

    return type(base.__name__, (base,), {"get_fn": get_fn})


class AuthorizationMiddleware:
    """ASGI middleware between Connexion's security and its validation: authorises and limits the caller.

    Not done in a security function: an error raised there is swallowed when another scheme passes.
    """

    def __init__(self, app: ASGIApp, *, operations: Mapping[str, Operation], limits: Limits) -> None:
        self.app = app
        self.operations = operations
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "caller" in scope["state"]:
            await authorise(scope, self.operations[operation_id_of(scope)], self.limits)
        await self.app(scope, receive, send)


class LimitMiddleware:
    """ASGI middleware around Connexion's security: counts public operations, and failed authentication.

    It stores the operationId in the request's state, for the log.
    """

    def __init__(self, app: ASGIApp, *, operations: Mapping[str, Operation], limits: Limits) -> None:
        self.app = app
        self.operations = operations
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = self._note_operation(scope) if scope["type"] == "http" else None
        if operation is None:
            await self.app(scope, receive, send)
            return
        await self.limits.admit(scope, operation)
        try:
            await self.app(scope, receive, send)
        except (Unauthenticated, ProblemException) as error:
            if operation.schemes and "caller" not in scope["state"] and is_about_credentials(error):
                await self.limits.count_bad_credentials(scope)
            raise

    def _note_operation(self, scope: Scope) -> Operation | None:
        scope["state"]["operation_id"] = operation_id_of(scope)
        return self.operations.get(scope["state"]["operation_id"])


def is_about_credentials(error: Unauthenticated | ProblemException) -> bool:
    """Whether credentials were bad, or missing (Connexion's own error), and not merely expired."""
    if isinstance(error, TokenExpired):
        return False
    return isinstance(error, Unauthenticated) or error.status == HTTPStatus.UNAUTHORIZED


def operation_id_of(scope: Scope) -> Any:
    """The operation that Connexion routed to, None where it found none."""
    return scope["extensions"]["connexion_routing"]["operation_id"]
