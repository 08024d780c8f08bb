"""Where blocking work runs: threads for handlers, for passwords, for Stripe, for receivers.

bcrypt takes a quarter of a second of a core. In the threads that everything else needs, a login storm
would stop everything else; here it queues for two seconds and is then told to come back. Stripe may take
eight seconds to say nothing, a tenant's receiver fifteen: likewise nobody else's wait.
"""

from __future__ import annotations

import asyncio
import enum
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import TypeVar

import anyio
import structlog
from anyio import to_thread

from billing import metrics
from billing.errors import Overloaded

Handler = TypeVar("Handler", bound=Callable[..., object])
T = TypeVar("T")

PASSWORD_THREADS = 2
# More than one wave of callers: once Stripe has kept somebody waiting the others are answered at once.
STRIPE_THREADS = 16
WEBHOOK_THREADS = 16
LONGEST_WAIT_SECONDS = 2

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


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

    def sample(self) -> None:
        """Say how many threads each lane has, how many of them work, and how many wait for one."""
        for lane, limiter in self._limits.items():
            metrics.LANE_THREADS.set(limiter.total_tokens, lane.value)
            metrics.LANE_BUSY.set(limiter.borrowed_tokens, lane.value)
            metrics.LANE_WAITING.set(limiter.statistics().tasks_waiting, lane.value)

    async def run(self, lane: Lane, call: Callable[[], T]) -> T:
        """Run a blocking call in the lane; raises `Overloaded` if no thread is free in time."""
        limiter, borrower = self._limits[lane], object()
        must_wait, started = limiter.available_tokens < 1, perf_counter()
        try:
            with anyio.fail_after(self._longest_wait_seconds):
                await limiter.acquire_on_behalf_of(borrower)
        except TimeoutError:
            metrics.LANE_REFUSED.count(lane.value)
            raise Overloaded from None
        if must_wait:
            metrics.LANE_WAIT.observe(perf_counter() - started, lane.value)
        place = _Place(partial(limiter.release_on_behalf_of, borrower))
        try:
            # The lane's limit is taken; the one that anyio asks for here is never waited for.
            return await to_thread.run_sync(
                partial(place.run, call), limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True
            )
        finally:
            place.leave()


class _Place:
    """A call's place in its lane: free when its thread has ended, even if nobody waits for that any more.

    Given back sooner, requests that are past their deadline would pile up threads without bound.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._is_running = False
        self._is_left = False

    def run(self, call: Callable[[], T]) -> T:
        """The call itself, in its thread; raises `Overloaded` if it was given up before it began."""
        with self._lock:
            if self._is_left:
                raise Overloaded
            self._is_running = True
        try:
            return call()
        finally:
            with self._lock:
                self._is_running = False
                is_left = self._is_left
            if is_left:
                self._end_late()

    def leave(self) -> None:
        """Wait no longer."""
        with self._lock:
            self._is_left = True
            is_running = self._is_running
        if not is_running:
            self._release()

    def _end_late(self) -> None:
        log.warning("a call ended after its request")
        with suppress(RuntimeError):  # The server may have ended before.
            self._loop.call_soon_threadsafe(self._release)


def end_with_main_thread(patience_seconds: float) -> None:
    """Have the process end when its main thread has, even if others go on for longer than this.

    Python waits for each of them, and one that hangs would keep a server that has drained from ending.
    """

    def end() -> None:
        threading.main_thread().join()
        time.sleep(patience_seconds)
        log.error("a thread did not end: the process ends without it")
        os._exit(1)

    threading.Thread(target=end, name="end", daemon=True).start()
