"""Where blocking work runs: threads for handlers, for passwords, for Stripe, for receivers.

bcrypt takes a quarter of a second of a core. In shared threads a login storm would stop everything else; here
a login queues for two seconds and is then refused. Stripe may take eight seconds to time out, a tenant's
receiver fifteen: no other request waits for those either.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from time import perf_counter
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from billing import metrics
from billing.errors import Overloaded
from billing.threads import Threads

Handler = TypeVar("Handler", bound=Callable[..., object])
T = TypeVar("T")

PASSWORD_THREADS = 2
# More than one wave of callers: once one has waited too long, the circuit breaker fails the others at once.
STRIPE_THREADS = 16
WEBHOOK_THREADS = 16
LONGEST_WAIT_SECONDS = 2
# How often `emptied` checks whether the last calls have ended.
CHECKED_EVERY_SECONDS = 0.05

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


class Lane(enum.Enum):
    """Kinds of work that must not wait for each other."""

    GENERAL = "general"
    PASSWORDS = "passwords"
    STRIPE = "stripe"
    WEBHOOKS = "webhooks"


def runs_in(lane: Lane) -> Callable[[Handler], Handler]:
    """Mark a handler to run in this lane."""

    def mark(handler: Handler) -> Handler:
        handler.lane = lane  # type: ignore[attr-defined]
        return handler

    return mark


def lane_of(handler: Callable[..., object], *, waits: bool) -> Lane | None:
    """The lane a handler was marked with; else `GENERAL` if it may block, and None if it never does."""
    lane: Lane | None = getattr(handler, "lane", Lane.GENERAL if waits else None)
    return lane


class Lanes:
    """The threads of each lane."""

    def __init__(
        self, threads: Mapping[Lane, int], *, longest_wait_seconds: float = LONGEST_WAIT_SECONDS
    ) -> None:
        self._lanes = {
            lane: BoundedThreads(lane.value, count, longest_wait_seconds=longest_wait_seconds)
            for lane, count in threads.items()
        }

    def sample(self) -> None:
        """Set the gauges of each lane: its threads, those that are busy, and the calls that wait for one."""
        for lane, bounded in self._lanes.items():
            metrics.LANE_THREADS.set(bounded.count, lane.value)
            metrics.LANE_BUSY.set(bounded.busy, lane.value)
            metrics.LANE_WAITING.set(bounded.waiting, lane.value)

    async def run(self, lane: Lane, call: Callable[[], T], *, whose: Hashable = None) -> T:
        """Run a blocking call in the lane; raises `Overloaded` if no thread is free in time."""
        # Changes of password share one half, whosesoever: else a few tenants could keep everybody from logging in.
        share = lane if lane is Lane.PASSWORDS and whose is not None else whose
        return await self._lanes[lane].run(call, whose=share)

    async def emptied(self) -> None:
        """Wait until no call runs, not even one whose request is over."""
        while any(bounded.busy for bounded in self._lanes.values()):
            await asyncio.sleep(CHECKED_EVERY_SECONDS)


class BoundedThreads:
    """A bounded pool, of which one tenant has half at most: calls that wait for its lock block no others.

    A call keeps its place until it has ended, even if its request is past its deadline. Released sooner, such
    requests would pile up calls without bound.
    """

    def __init__(self, name: str, count: int, *, longest_wait_seconds: float = LONGEST_WAIT_SECONDS) -> None:
        self.name = name
        self.count = count
        self.busy = 0
        self.waiting = 0
        self._longest_wait_seconds = longest_wait_seconds
        self._free = asyncio.Semaphore(count)
        # For calls of no tenant: as many permits as there are threads, so that none waits for this one.
        self._unshared = asyncio.Semaphore(count)
        # Each exists while a call holds it or waits for it.
        self._shares = WeakValueDictionary[Hashable, asyncio.Semaphore]()
        self._threads = Threads(name)

    async def run(self, call: Callable[[], T], *, whose: Hashable = None) -> T:
        """Run the call in a thread; raises `Overloaded` if none is free in time, or none can be started.

        Calls of no tenant (`whose` is None) may have all of them.
        """
        share = self._unshared if whose is None else self._share_of(whose)
        await self._enter(share)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            self._threads.start(partial(self._work, call, answer, copy_context(), share))
        except RuntimeError:
            self._leave(share)
            raise Overloaded from None
        return await answer

    def _share_of(self, whose: Hashable) -> asyncio.Semaphore:
        share = self._shares.get(whose)
        if share is None:
            share = self._shares[whose] = asyncio.Semaphore((self.count + 1) // 2)
        return share

    async def _enter(self, share: asyncio.Semaphore) -> None:
        if share.locked() or self._free.locked():
            await self._wait(share)
        else:
            await self._acquire(share)  # At once.
        self.busy += 1

    async def _acquire(self, share: asyncio.Semaphore) -> None:
        await share.acquire()
        try:
            await self._free.acquire()
        except asyncio.CancelledError:
            share.release()
            raise

    async def _wait(self, share: asyncio.Semaphore) -> None:
        started = perf_counter()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._longest_wait_seconds):
                await self._acquire(share)
        except TimeoutError:
            metrics.LANE_REFUSED.count(self.name)
            raise Overloaded from None
        finally:
            self.waiting -= 1
        metrics.LANE_WAIT.observe(perf_counter() - started, self.name)

    def _work(
        self, call: Callable[[], T], answer: asyncio.Future[T], context: Context, share: asyncio.Semaphore
    ) -> Callable[[], None]:
        settle = outcome_of(partial(context.run, call), answer)

        def announce() -> None:
            with suppress(RuntimeError):  # The event loop may be closed by now.
                answer.get_loop().call_soon_threadsafe(self._end, answer, settle, share, context=context)

        return announce

    def _end(self, answer: asyncio.Future[T], settle: Callable[[], None], share: asyncio.Semaphore) -> None:
        self._leave(share)
        if answer.done():
            log.warning("a call ended after its request")
        else:
            settle()

    def _leave(self, share: asyncio.Semaphore) -> None:
        self.busy -= 1
        self._free.release()
        share.release()


def outcome_of(call: Callable[[], T], answer: asyncio.Future[T]) -> Callable[[], None]:
    """Make the call; returns what sets its result or its exception on the answer."""
    try:
        return partial(answer.set_result, call())
    except StopIteration as error:
        stopped = RuntimeError("The call raised StopIteration.")  # No future accepts one.
        stopped.__cause__ = error
        return partial(answer.set_exception, stopped)
    # Raised again where the answer is awaited.
    except BaseException as error:
        return partial(answer.set_exception, error)
