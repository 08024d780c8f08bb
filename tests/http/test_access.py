"""Access: one credential counts, and the document says who may call an operation."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from connexion.lifecycle import ConnexionRequest
from connexion.security import NO_VALUE, ApiKeySecurityHandler, BearerSecurityHandler
from starlette.types import Receive, Scope, Send

from billing.actors import Actor
from billing.clock import utc_now
from billing.counters import InProcess
from billing.errors import (
    BillingError,
    InsufficientScope,
    KeyUnknown,
    TokenInvalid,
)
from billing.failed_logins import FailedLogins
from billing.http.access import (
    Access,
    AuthorizationMiddleware,
    LimitMiddleware,
    bearer_credential,
    operation_id_of,
    security_map,
)
from billing.http.document import load, operations
from billing.http.limits import Limits
from billing.ids import new_id
from billing.keys import ApiKey
from billing.limits import UNLIMITED, Meter
from billing.security import Caller
from tests.test_tenants import ACME, ADA

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
NO_LIMITS = Limits(Meter(InProcess(), b"", utc_now), UNLIMITED, FailedLogins(utc_now))
KEY = ApiKey(ACME.id, new_id(), "live_secret", None, "abcd", NOW)
BY_USER, BY_KEY = Caller(ACME, user=ADA), Caller(ACME, key=KEY)


class Authenticator:
    """Knows one token and one key."""

    def __init__(self) -> None:
        self.checked: list[str] = []

    async def by_bearer(self, credential: str) -> Caller:
        return self._answer(credential, "a-token", BY_USER, TokenInvalid)

    async def by_key(self, text: str) -> Caller:
        return self._answer(text, "a-key", BY_KEY, KeyUnknown)

    def _answer(self, given: str, good: str, caller: Caller, error: type[BillingError]) -> Caller:
        self.checked.append(given)
        if given != good:
            raise error
        return caller


def access(authenticator: Authenticator) -> Access:
    return Access(authenticator, NO_LIMITS)  # type: ignore[arg-type]


def outcome(scheme: str, headers: list[tuple[str, str]], authenticator: Authenticator | None = None) -> Any:
    """Return `nothing`, the class of the error raised, or the caller left in the state."""
    verify = security_map(access(authenticator or Authenticator()))[scheme]().get_fn({}, [])
    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope: Scope = {"type": "http", "headers": raw, "state": {}, "query_string": b"X-API-Key=a-key"}

    async def ask() -> Any:
        return await verify(ConnexionRequest(scope))

    try:
        found = asyncio.run(ask())
    except BillingError as error:
        assert "caller" not in scope["state"]
        return type(error)
    if found is NO_VALUE:
        assert not scope["state"]
        return "nothing"
    assert found == {"sub": ""}
    assert scope["state"]["tenant_id"] == ACME.id
    return scope["state"]["caller"]


AUTHORIZATION, X_API_KEY = "authorization", "x-api-key"


@pytest.mark.parametrize(
    ("headers", "by_bearer", "by_key"),
    [
        ([], "nothing", "nothing"),
        ([(AUTHORIZATION, "Bearer a-token")], BY_USER, "nothing"),
        ([(AUTHORIZATION, "bearer   a-token ")], BY_USER, "nothing"),
        ([(X_API_KEY, "a-key")], "nothing", BY_KEY),
        ([(X_API_KEY, " a-key\t")], "nothing", BY_KEY),
        ([(X_API_KEY, "\va-key")], "nothing", KeyUnknown),
        ([(X_API_KEY, "wrong")], "nothing", KeyUnknown),
        ([(X_API_KEY, "")], "nothing", KeyUnknown),
        ([(X_API_KEY, "a-key"), (X_API_KEY, "a-key")], "nothing", KeyUnknown),
        ([(AUTHORIZATION, "Bearer wrong"), (X_API_KEY, "a-key")], TokenInvalid, "nothing"),
        ([(AUTHORIZATION, "Bearer a-token"), (X_API_KEY, "wrong")], BY_USER, "nothing"),
        ([(AUTHORIZATION, ""), (X_API_KEY, "a-key")], TokenInvalid, "nothing"),
        ([(AUTHORIZATION, "Bearer"), (X_API_KEY, "a-key")], TokenInvalid, "nothing"),
        ([(AUTHORIZATION, "Basic YTpi"), (X_API_KEY, "a-key")], TokenInvalid, "nothing"),
        ([(AUTHORIZATION, "Bearer a-token"), (AUTHORIZATION, "Bearer a-token")], TokenInvalid, "nothing"),
    ],
)
def test_the_authorization_header_takes_precedence_over_an_api_key(
    headers: list[tuple[str, str]], by_bearer: Any, by_key: Any
) -> None:
    assert (outcome("bearer", headers), outcome("apiKey", headers)) == (by_bearer, by_key)


def test_the_authenticator_is_not_called_without_a_usable_credential() -> None:
    authenticator = Authenticator()
    for scheme in ("bearer", "apiKey"):
        for headers in ([], [(AUTHORIZATION, "Basic a-token")]):
            outcome(scheme, headers, authenticator)
    assert authenticator.checked == []


def test_both_security_handlers_extend_connexions() -> None:
    made = security_map(access(Authenticator()))
    assert issubclass(made["bearer"], BearerSecurityHandler)
    assert issubclass(made["apiKey"], ApiKeySecurityHandler)


@pytest.mark.parametrize(
    ("headers", "credential"),
    [
        ([], None),
        ([""], ""),
        (["Bearer"], ""),
        (["Bearer "], ""),
        (["Bearer x"], "x"),
        (["BEARER x"], "x"),
        (["Bearer  x y "], "x y"),
        (["Token x"], ""),
        (["x"], ""),
        (["Bearer\tx"], ""),
        (["Bearer x", "Bearer x"], ""),
    ],
)
def test_a_bearer_credential_is_parsed_from_the_header(headers: list[str], credential: str | None) -> None:
    assert bearer_credential(headers) == credential


# Authorization -----------------------------------------------------------------------------------

OPERATIONS = {operation.operation_id: operation for operation in operations(load())}
DISABLED = replace(ACME, is_active=False)


def authorize(caller: Caller | None, operation_id: str | None) -> str:
    """Return `let in`, or the name of the class of the refusal."""
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append("let in")

    scope = {
        "type": "http",
        "state": {} if caller is None else {"caller": caller},
        "extensions": {"connexion_routing": {"operation_id": operation_id}},
    }
    try:
        asyncio.run(AuthorizationMiddleware(app, operations=OPERATIONS, limits=NO_LIMITS)(scope, None, None))  # type: ignore[arg-type]
    except BillingError as error:
        assert not reached
        return type(error).__name__
    return reached[0]


def role(name: str) -> Caller:
    return Caller(ACME, user=replace(ADA, role=name))


ANY_ROLE = {"get_current_user", "change_password", "verify_api_key", "get_tenant_details"}
ADMINS = {
    "get_stripe_status",
    "list_api_keys",
    "get_webhook_config",
    "configure_webhook",
    "remove_webhook",
    "send_test_webhook",
}
OWNERS = {"start_stripe_connect", "disconnect_stripe", "regenerate_api_keys", "revoke_api_keys"}
PUBLIC = {"register_tenant", "log_in", "refresh_tokens", "complete_stripe_connect"}


def test_every_operation_is_assigned_to_a_role_group() -> None:
    assert OPERATIONS.keys() == ANY_ROLE | ADMINS | OWNERS | PUBLIC


@pytest.mark.parametrize("operation_id", sorted(ANY_ROLE | ADMINS | OWNERS))
@pytest.mark.parametrize(
    ("caller", "allowed"),
    [
        (role("owner"), ANY_ROLE | ADMINS | OWNERS),
        (role("admin"), ANY_ROLE | ADMINS),
        (role("developer"), ANY_ROLE),
        (role("stranger"), set()),
        (BY_KEY, {"verify_api_key", "get_tenant_details"}),
    ],
    ids=["owner", "admin", "developer", "unknown role", "key"],
)
def test_each_role_and_key_may_call_only_its_operations(
    caller: Caller, allowed: set[str], operation_id: str
) -> None:
    assert authorize(caller, operation_id) == ("let in" if operation_id in allowed else "InsufficientScope")


@pytest.mark.parametrize("operation_id", sorted(ANY_ROLE | ADMINS | OWNERS))
@pytest.mark.parametrize(
    "caller", [Caller(DISABLED, user=ADA), Caller(DISABLED, key=KEY)], ids=["user", "key"]
)
def test_a_disabled_tenant_may_call_no_operation(caller: Caller, operation_id: str) -> None:
    assert authorize(caller, operation_id) == "TenantDisabled"


def test_the_actor_is_the_user_or_the_key() -> None:
    assert BY_USER.actor("192.0.2.1", "a-request") == Actor("user", ADA.id, "192.0.2.1", "a-request")
    assert BY_KEY.actor("192.0.2.1", "a-request") == Actor("api_key", KEY.id, "192.0.2.1", "a-request")
    assert BY_USER.signed_in_user() == ADA
    with pytest.raises(InsufficientScope):
        BY_KEY.signed_in_user()


def test_authorization_passes_requests_without_a_caller() -> None:
    # Connexion has already answered 401, unless the operation is public or there is none.
    assert authorize(None, "log_in") == authorize(None, None) == "let in"


def test_the_operation_id_is_kept_in_the_state_for_the_log() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    scope: Scope = {
        "type": "http",
        "state": {},
        "extensions": {"connexion_routing": {"operation_id": "log_in"}},
    }
    middleware = LimitMiddleware(app, operations={}, limits=NO_LIMITS)
    asyncio.run(middleware(scope, None, None))  # type: ignore[arg-type]
    assert scope["state"] == {"operation_id": "log_in"}
    assert operation_id_of(scope) == "log_in"
