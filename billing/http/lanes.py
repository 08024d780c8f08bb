"""Where blocking work runs: threads for handlers, for passwords, for Stripe, for receivers.

bcrypt takes a quarter of a second of a core. In the threads that everything else needs, a login storm
would stop everything else; here it queues for two seconds and is then told to come back. Stripe may take
eight seconds to say nothing, a tenant's receiver fifteen: likewise nobody else's wait.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TypeVar

import anyio
from anyio import to_thread

from billing.errors import Overloaded

Handler = TypeVar("Handler", bound=Callable[..., object])
T = TypeVar("T")

PASSWORD_THREADS = 2
# More than one wave of callers: once Stripe has kept somebody waiting the others are answered at once.
STRIPE_THREADS = 16
WEBHOOK_THREADS = 16
LONGEST_WAIT_SECONDS = 2


class Lane(enum.Enum):
    """Kinds of work that must not wait for each other."""

    GENERAL = "general"
    PASSWORDS = "passwords"
    STRIPE = "stripe"
    WEBHOOKS = "webhooks"


def runs_in(lane: Lane) -> Callable[[Handler], Handler]:
    """Say that a handler belongs to a lane of its own."""

    def mark(handler: Handler) -> Handler:
        handler.lane = lane  # type: ignore[attr-defined]
        return handler

    return mark


def lane_of(handler: Callable[..., object], *, waits: bool) -> Lane | None:
    """The lane a handler was marked with; else `GENERAL` if it waits for anything, and none if it does not."""
    lane: Lane | None = getattr(handler, "lane", Lane.GENERAL if waits else None)
    return lane


class Lanes:
    """The threads of each lane."""

    def __init__(
        self, threads: Mapping[Lane, int], *, longest_wait_seconds: float = LONGEST_WAIT_SECONDS
    ) -> None:
        self._longest_wait_seconds = longest_wait_seconds
        self._limits = {lane: anyio.CapacityLimiter(count) for lane, count in threads.items()}

    async def run(self, lane: Lane, call: Callable[[], T]) -> T:
        """Run a blocking call in the lane; raises `Overloaded` if no thread is free in time."""
        limiter, borrower = self._limits[lane], object()
        try:
            with anyio.fail_after(self._longest_wait_seconds):
                await limiter.acquire_on_behalf_of(borrower)
        except TimeoutError:
            raise Overloaded from None
        try:
            # The lane's limit is taken; the one that anyio asks for here is never waited for.
            return await to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))
        finally:
            limiter.release_on_behalf_of(borrower)
