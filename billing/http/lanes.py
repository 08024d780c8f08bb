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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import TypeVar

import structlog

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
        self._lanes = {lane: _Threads(lane, count) for lane, count in threads.items()}

    def sample(self) -> None:
        """Say how many threads each lane has, how many of them work, and how many wait for one."""
        for lane, threads in self._lanes.items():
            metrics.LANE_THREADS.set(threads.count, lane.value)
            metrics.LANE_BUSY.set(threads.busy, lane.value)
            metrics.LANE_WAITING.set(threads.waiting, lane.value)

    async def run(self, lane: Lane, call: Callable[[], T]) -> T:
        """Run a blocking call in the lane; raises `Overloaded` if no thread is free in time."""
        threads = self._lanes[lane]
        await threads.enter(self._longest_wait_seconds)
        return await threads.run(call)


class _Threads:
    """The threads of one lane. Each call has a place, from `enter` until its thread has ended.

    Given back sooner, when nobody waits for it any more, requests that are past their deadline would pile up calls
    without bound.
    """

    def __init__(self, lane: Lane, count: int) -> None:
        self.lane = lane
        self.count = count
        self.busy = 0
        self.waiting = 0
        self._free = asyncio.Semaphore(count)
        # Not anyio's threads, which cost each call twice as much.
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=lane.value)

    async def enter(self, longest_wait_seconds: float) -> None:
        """Take a place; raises `Overloaded` if none becomes free in time."""
        if self._free.locked():
            await self._wait(longest_wait_seconds)
        else:
            await self._free.acquire()  # At once.
        self.busy += 1

    async def _wait(self, longest_wait_seconds: float) -> None:
        started = perf_counter()
        self.waiting += 1
        try:
            async with asyncio.timeout(longest_wait_seconds):
                await self._free.acquire()
        except TimeoutError:
            metrics.LANE_REFUSED.count(self.lane.value)
            raise Overloaded from None
        finally:
            self.waiting -= 1
        metrics.LANE_WAIT.observe(perf_counter() - started, self.lane.value)

    async def run(self, call: Callable[[], T]) -> T:
        """What the call returns or raises, in a thread; it goes on if nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        running = self._pool.submit(copy_context().run, call)
        try:
            return await asyncio.wrap_future(running)
        finally:
            if running.done():
                self._leave()
            else:
                running.add_done_callback(partial(self._end_late, loop))

    def _leave(self) -> None:
        self.busy -= 1
        self._free.release()

    def _end_late(self, loop: asyncio.AbstractEventLoop, _: Future[T]) -> None:
        log.warning("a call ended after its request")
        with suppress(RuntimeError):  # The server may have ended before.
            loop.call_soon_threadsafe(self._leave)


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
