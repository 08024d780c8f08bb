"""Limits in HTTP: a request over one is answered 429, and each answer says what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Scope

from billing.errors import IdempotencyInProgress, InvalidCredentials, RateLimited, WrongPassword
from billing.failed_logins import FailedLogins
from billing.http.addresses import network_of
from billing.http.document import Operation
from billing.http.replies import Rendered
from billing.http.wiring import actor_of, caller_of
from billing.limits import Brake, Meter, Policies, Policy, Usage
from billing.security import Caller
from billing.users import normalise_email

# All clients on a Unix socket share one address.
NO_ADDRESS = "local"

Endpoint = Callable[[Scope], Awaitable[Rendered]]


class Limits:
    """Counts a server's requests against its limits: each method is a step of a request."""

    def __init__(self, meter: Meter, policies: Policies, failed_logins: FailedLogins) -> None:
        self._meter = meter
        self._policies = policies
        self._failed_logins = failed_logins

    async def admit(self, scope: Scope, operation: Operation) -> None:
        """Count a public operation by address, before anything else is checked; raises `RateLimited`."""
        policy = self._policies.by_address.get(operation.operation_id)
        if policy is not None:
            await self._require(scope, policy, address_of(scope))

    async def count_bad_credentials(self, scope: Scope) -> None:
        """Count missing or bad credentials by address; raises `RateLimited`.

        Good ones are accepted all the same: others at their address must not be able to lock them out.
        """
        if self._policies.bad_credentials is not None:
            await self._require(scope, self._policies.bad_credentials, address_of(scope))

    async def admit_caller(self, scope: Scope) -> None:
        """Count by tenant, once the caller is known; raises `RateLimited`."""
        caller: Caller = scope["state"]["caller"]
        policy = self._policies.by_tenant.get(caller.tenant.tier)
        if policy is not None:
            await self._require(scope, policy, tenant_subject(caller, scope))

    async def admit_cost(self, scope: Scope, operation: Operation) -> None:
        """Count what costs others something, once the caller is authorised; raises `RateLimited`."""
        policy = self._policies.costly.get(operation.operation_id)
        if policy is not None:
            usage = await self._require(scope, policy, str(scope["state"]["caller"].tenant_id))
            scope["state"]["cost"] = usage

    def excusing_repeats(self, operation: Operation, endpoint: Endpoint) -> Endpoint:
        """Wrap the endpoint: a repeat of a request in progress is not counted, as it costs others nothing.

        A request whose server died is in progress until its lease ends, and its client keeps repeating it.
        """
        if operation.operation_id not in self._policies.costly:
            return endpoint

        async def attempt(scope: Scope) -> Rendered:
            try:
                return await endpoint(scope)
            except IdempotencyInProgress:
                await self._meter.take_back(scope["state"]["cost"])
                raise

        return attempt

    def throttled(self, operation: Operation, endpoint: Endpoint) -> Endpoint:
        """Wrap the endpoint: where it checks a password, it is called only until too many were wrong.

        An attempt is counted before it is made, or many at once would pass together. It stays counted if the
        password was wrong, clears the count if it was right, and is taken back if the result is unknown.
        """
        usual = self._policies.wrong_passwords.get(operation.operation_id)
        brake = self._policies.brakes.get(operation.operation_id)
        if usual is None:
            return endpoint

        async def attempt(scope: Scope) -> Rendered:
            policy = brake.then if brake and await self._is_on(brake, scope) else usual
            usage = await self._count(scope, policy, password_subject(scope))
            if usage.is_over:
                self._note_refusal(scope, usage)
                raise refusal(usage)
            try:
                answer = await endpoint(scope)
            except (InvalidCredentials, WrongPassword):
                if brake is not None:
                    await self._meter.count(brake.over, email_of(scope))
                raise
            except (Exception, asyncio.CancelledError):
                await self._meter.take_back(usage)
                raise
            # A refusal kept under an Idempotency-Key is returned, not raised: taken back like those.
            await (self._meter.forget if answer.status < 400 else self._meter.take_back)(usage)
            return answer

        return attempt

    async def _is_on(self, brake: Brake, scope: Scope) -> bool:
        # Its count is in no header: it is about what others do.
        return not (await self._meter.peek(brake.over, email_of(scope))).remaining

    def _note_refusal(self, scope: Scope, usage: Usage) -> None:
        # Whether there is such an account is looked up later: here it would take time.
        if caller_of(scope) is None and usage.is_just_over:
            self._failed_logins.note_throttled(actor_of(scope), email_of(scope), usage.window.policy.name)

    async def _require(self, scope: Scope, policy: Policy, subject: str) -> Usage:
        usage = await self._count(scope, policy, subject)
        if usage.is_over:
            raise refusal(usage)
        return usage

    async def _count(self, scope: Scope, policy: Policy, subject: str) -> Usage:
        usage = await self._meter.count(policy, subject)
        add_ratelimit_headers(scope, usage)
        return usage


def refusal(usage: Usage) -> RateLimited:
    """The error: which limit, and when to retry."""
    policy = usage.window.policy
    return RateLimited(
        f"The limit `{policy.name}` is reached: {policy.quota} within {policy.seconds} seconds.",
        retry_after_seconds=usage.window.seconds_left,
    )


def add_ratelimit_headers(scope: Scope, usage: Usage) -> None:
    """Add what is left of this limit to the answer's headers (draft-ietf-httpapi-ratelimit-headers)."""
    policy, left = usage.window.policy, usage.window.seconds_left
    scope["state"]["answer_headers"] += [
        (b"ratelimit-policy", f'"{policy.name}";q={policy.quota};w={policy.seconds}'.encode()),
        (b"ratelimit", f'"{policy.name}";r={usage.remaining};t={left}'.encode()),
    ]


def address_of(scope: Scope) -> str:
    """The subject of a limit by address."""
    return network_of(scope["state"]["client_address"] or NO_ADDRESS)


def tenant_subject(caller: Caller, scope: Scope) -> str:
    """The subject of a tenant's limit: its users, its secret keys, or an address that uses a publishable key.

    A publishable key can be read in pages by anybody, so each address has its own share with it. And whatever
    the keys do, users have theirs, as only they can revoke an abused key.
    """
    if caller.key is None:
        return f"{caller.tenant_id} users"
    if caller.key.is_publishable:
        return f"{caller.tenant_id} {address_of(scope)}"
    return str(caller.tenant_id)


def password_subject(scope: Scope) -> str:
    """The subject of a limit on wrong passwords: a user's session, or an account as seen from one address.

    So nobody can lock an account for its owner, neither from elsewhere nor with a stolen session, as a thief
    cannot begin another. Unknown accounts are counted too, so that answers do not show which exist.
    """
    caller = caller_of(scope)
    if caller is not None:
        return str(caller.session_id or caller.id)
    return f"{address_of(scope)} {email_of(scope)}"


def email_of(scope: Scope) -> str:
    """The email of a login, whether there is such an account or not."""
    return normalise_email(scope["state"]["body"]["email"])
