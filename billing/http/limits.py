"""Limits on the wire: who is over one is answered 429, and each answer says what is left."""

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

# Whoever asks by a Unix socket is one and the same.
NO_ADDRESS = "local"

Endpoint = Callable[[Scope], Awaitable[Rendered]]


class Limits:
    """What counts the requests of a server: each method is a step of a request."""

    def __init__(self, meter: Meter, policies: Policies, failed_logins: FailedLogins) -> None:
        self._meter = meter
        self._policies = policies
        self._failed_logins = failed_logins

    async def admit(self, scope: Scope, operation: Operation) -> None:
        """Count a public operation by address, before anything is looked at; raises `RateLimited`."""
        policy = self._policies.by_address.get(operation.operation_id)
        if policy is not None:
            await self._require(scope, policy, address_of(scope))

    async def note_stranger(self, scope: Scope) -> None:
        """Count by address that credentials were missing or bad; raises `RateLimited`.

        Good ones are let in all the same: whoever shares their address must not be able to lock them out.
        """
        if self._policies.strangers is not None:
            await self._require(scope, self._policies.strangers, address_of(scope))

    async def admit_caller(self, scope: Scope) -> None:
        """Count by tenant, once the caller is known; raises `RateLimited`."""
        caller: Caller = scope["state"]["caller"]
        policy = self._policies.by_tenant.get(caller.tenant.tier)
        if policy is not None:
            await self._require(scope, policy, share_of(caller, scope))

    async def admit_cost(self, scope: Scope, operation: Operation) -> None:
        """Count what costs others something, once it is known that the caller may do it; raises `RateLimited`."""
        policy = self._policies.costly.get(operation.operation_id)
        if policy is not None:
            usage = await self._require(scope, policy, str(scope["state"]["caller"].tenant_id))
            scope["state"]["cost"] = usage

    def excusing_repeats(self, operation: Operation, endpoint: Endpoint) -> Endpoint:
        """The endpoint; a repeat of a request that is in progress is not counted, as it costs others nothing.

        One whose server was lost is in progress until its lease ends, and its client asks again and again.
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
        """The endpoint; where it checks a password, only until too many were wrong.

        An attempt is counted before it is made, or many at once would pass together. It stays counted if the
        password was wrong, is forgotten with those before it if it was right, and is taken back if nobody knows.
        """
        usual = self._policies.wrong_passwords.get(operation.operation_id)
        brake = self._policies.brakes.get(operation.operation_id)
        if usual is None:
            return endpoint

        async def attempt(scope: Scope) -> Rendered:
            policy = brake.then if brake and await self._is_on(brake, scope) else usual
            usage = await self._count(scope, policy, holder_of(scope))
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
            # A refusal kept under an Idempotency-Key comes as an answer: the password was right.
            await (self._meter.forget if answer.status < 400 else self._meter.take_back)(usage)
            return answer

        return attempt

    async def _is_on(self, brake: Brake, scope: Scope) -> bool:
        # Its count is told to nobody: it is what others do.
        return not (await self._meter.peek(brake.over, email_of(scope))).remaining

    def _note_refusal(self, scope: Scope, usage: Usage) -> None:
        # Whose account it is, and whether anybody's, is found out later: here it would take time.
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
    """Why, and until when."""
    policy = usage.window.policy
    return RateLimited(
        f"The limit `{policy.name}` is reached: {policy.quota} within {policy.seconds} seconds.",
        retry_after_seconds=usage.window.seconds_left,
    )


def add_ratelimit_headers(scope: Scope, usage: Usage) -> None:
    """Have the answer say what is left, beside what it says of other limits (draft-ietf-httpapi-ratelimit-headers)."""
    policy, left = usage.window.policy, usage.window.seconds_left
    scope["state"]["answer_headers"] += [
        (b"ratelimit-policy", f'"{policy.name}";q={policy.quota};w={policy.seconds}'.encode()),
        (b"ratelimit", f'"{policy.name}";r={usage.remaining};t={left}'.encode()),
    ]


def address_of(scope: Scope) -> str:
    """Whom a limit by address counts."""
    return network_of(scope["state"]["client_address"] or NO_ADDRESS)


def share_of(caller: Caller, scope: Scope) -> str:
    """Which part of a tenant's limit a request is counted against.

    A publishable key stands in pages for anybody to read, so each address has its own share with it. And whatever
    the keys do, users have theirs, for only they can revoke a key that is abused.
    """
    if caller.key is None:
        return f"{caller.tenant_id} users"
    if caller.key.is_publishable:
        return f"{caller.tenant_id} {address_of(scope)}"
    return str(caller.tenant_id)


def holder_of(scope: Scope) -> str:
    """Whose password is tried: that of the user of a session, or of an account as seen from one address.

    So nobody can lock an account for its owner, neither from elsewhere nor with a session that was stolen, as a thief
    cannot begin another. Accounts are counted known or not, so that none is told apart.
    """
    caller = caller_of(scope)
    if caller is not None:
        return str(caller.session_id or caller.id)
    return f"{address_of(scope)} {email_of(scope)}"


def email_of(scope: Scope) -> str:
    """Which account it is that somebody logs in to, known or not."""
    return normalise_email(scope["state"]["body"]["email"])
