"""Limits: how many requests in which window of time, by which subject, and what is left."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from billing.clock import Clock

MINUTE = 60
HOUR = 60 * MINUTE
DIGEST_BYTES = 16
PLACES = 4096


@dataclass(frozen=True)
class Policy:
    """At most `quota` requests in each window of `seconds`."""

    name: str
    quota: int
    seconds: int


@dataclass(frozen=True)
class Brake:
    """Once an account has used up `over`, from all addresses together, `then` limits each address."""

    over: Policy
    then: Policy


@dataclass(frozen=True)
class Policies:
    """What is limited, grouped by the subject counted."""

    # Public operations, by address.
    by_address: Mapping[str, Policy]
    # Requests whose credentials are missing or bad, by address.
    bad_credentials: Policy | None
    # All other requests, by tenant: what each tier may do.
    by_tenant: Mapping[str, Policy]
    # Operations that cost others something, by tenant: in addition to the tier's limit.
    costly: Mapping[str, Policy]
    # Wrong passwords: at log-in by account and address, at a change of password by session.
    wrong_passwords: Mapping[str, Policy]
    # Wrong passwords of one account from many addresses. One address alone makes too few to trigger a brake.
    brakes: Mapping[str, Brake]


# docs/limits.md has the same in tables.
STANDARD = Policies(
    by_address={
        "register_tenant": Policy("register", 20, HOUR),
        "log_in": Policy("login", 10, MINUTE),
        "refresh_tokens": Policy("refresh", 60, MINUTE),
        "complete_stripe_connect": Policy("callback", 60, MINUTE),
    },
    bad_credentials=Policy("credentials", 60, MINUTE),
    by_tenant={
        "free": Policy("default", 600, MINUTE),
        "pro": Policy("default", 3_000, MINUTE),
        "enterprise": Policy("default", 12_000, MINUTE),
    },
    costly={
        "send_test_webhook": Policy("test-deliveries", 10, MINUTE),
        # Right passwords too: each check takes one of the threads that all logins share.
        "change_password": Policy("password-changes", 60, 5 * MINUTE),
        # Keys are kept for good. Revoking makes none, and must be possible whatever anybody else did.
        "regenerate_api_keys": Policy("key-changes", 300, HOUR),
        # Stripe limits the requests of the platform's account, which all tenants share.
        "get_stripe_status": Policy("stripe-status", 60, MINUTE),
        "start_stripe_connect": Policy("stripe-connect", 60, HOUR),
    },
    wrong_passwords={
        "log_in": Policy("login-failures", 5, 5 * MINUTE),
        "change_password": Policy("password-failures", 5, 5 * MINUTE),
    },
    brakes={"log_in": Brake(Policy("account-failures", 100, HOUR), Policy("braked-failures", 3, HOUR))},
)
# RATE_LIMITS=off.
UNLIMITED = Policies(
    by_address={}, bad_credentials=None, by_tenant={}, costly={}, wrong_passwords={}, brakes={}
)


@dataclass(frozen=True)
class Window:
    """One window of one policy for one subject. Its key does not reveal who that is."""

    policy: Policy
    key: str
    seconds_left: int


@dataclass(frozen=True)
class Usage:
    """How much of a window is used."""

    window: Window
    count: int

    @property
    def is_over(self) -> bool:
        return self.count > self.window.policy.quota

    @property
    def is_just_over(self) -> bool:
        """Whether this was the window's first request beyond the quota."""
        return self.count == self.window.policy.quota + 1

    @property
    def remaining(self) -> int:
        return max(0, self.window.policy.quota - self.count)


class Meter:
    """Counts, by policy and subject, in fixed windows.

    Each subject's windows have a phase of their own, so that not all begin at once. Their ends are computed,
    not stored: processes with the same clock and pepper agree on them. docs/decisions.md says why none slide.
    """

    def __init__(self, counters: Counters, pepper: bytes, clock: Clock) -> None:
        self._counters = counters
        self._pepper = hmac.digest(pepper, b"limits", "sha256")
        self._clock = clock
        # A subject counted just now is likely to be counted again.
        self._place = lru_cache(maxsize=PLACES)(self._place_of)

    def window(self, policy: Policy, subject: str) -> Window:
        """The current window."""
        name, phase = self._place(policy, subject)
        now = self._clock().timestamp() + phase
        number = int(now // policy.seconds)
        left = math.ceil((number + 1) * policy.seconds - now)
        return Window(policy, f"{name}:{number}", max(1, left))

    def _place_of(self, policy: Policy, subject: str) -> tuple[str, int]:
        """The name of a subject's windows, and by how many seconds they begin before the epoch's."""
        digest = hmac.digest(self._pepper, f"{policy.name}:{subject}".encode(), "sha256")[:DIGEST_BYTES]
        return f"{policy.name}:{digest.hex()}", int.from_bytes(digest[:4]) % policy.seconds

    async def count(self, policy: Policy, subject: str) -> Usage:
        """Count one request more."""
        window = self.window(policy, subject)
        return Usage(window, await self._counters.add(window.key, 1, seconds=policy.seconds))

    async def peek(self, policy: Policy, subject: str) -> Usage:
        """Read the count, without adding to it."""
        window = self.window(policy, subject)
        return Usage(window, await self._counters.add(window.key, 0, seconds=policy.seconds))

    async def take_back(self, usage: Usage) -> None:
        """Undo one count."""
        await self._counters.add(usage.window.key, -1, seconds=usage.window.policy.seconds)

    async def forget(self, usage: Usage) -> None:
        """Reset the window's count to zero."""
        await self._counters.forget(usage.window.key)


class Counters(Protocol):
    """Where counts are kept."""

    async def add(self, key: str, amount: int, *, seconds: int) -> int:
        """Add to a count, and return it. It is not needed for longer than `seconds`."""

    async def forget(self, key: str) -> None:
        """Forget a count."""

    async def close(self) -> None:
        """Close whatever is open."""
