"""Where handlers run: a few threads for all, and two apart for passwords.

bcrypt takes a quarter of a second of a core. In the threads that everything else needs, a login storm
would stop everything else; here it queues for two seconds and is then told to come back.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import to_thread

from billing.errors import Overloaded

Handler = TypeVar("Handler", bound=Callable[..., object])
T = TypeVar("T")

PASSWORD_THREADS = 2
LONGEST_WAIT_SECONDS = 2


class Lane(enum.Enum):
    """Kinds of work that must not wait for each other."""

    GENERAL = "general"
    PASSWORDS = "passwords"


def runs_in(lane: Lane) -> Callable[[Handler], Handler]:
    """Say that a handler belongs to a lane of its own."""

    def mark(handler: Handler) -> Handler:
        handler.lane = lane  # type: ignore[attr-defined]
        return handler

    return mark


def lane_of(handler: Callable[..., object]) -> Lane:
    """The lane a handler was marked with; `GENERAL` if it was not."""
    lane: Lane = getattr(handler, "lane", Lane.GENERAL)
    return lane


class Lanes:
    """The threads of each lane."""

    def __init__(self, *, general_threads: int, longest_wait_seconds: float = LONGEST_WAIT_SECONDS) -> None:
        self._longest_wait_seconds = longest_wait_seconds
        self._limits = {
            Lane.GENERAL: anyio.CapacityLimiter(general_threads),
            Lane.PASSWORDS: anyio.CapacityLimiter(PASSWORD_THREADS),
        }

    async def run(self, lane: Lane, call: Callable[[], T]) -> T:
        """Run a blocking call in the lane; raises `Overloaded` if no thread is free in time."""
        limiter, borrower = self._limits[lane], object()
        try:
            with anyio.fail_after(self._longest_wait_seconds):
                await limiter.acquire_on_behalf_of(borrower)
        except TimeoutError:
            raise Overloaded from None
        try:
            # The thread is ours already: this limiter only counts it once more, and never waits.
            return await to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))
        finally:
            limiter.release_on_behalf_of(borrower)
