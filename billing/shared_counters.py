"""Counts that many processes share, in Redis; and what becomes of them while it does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog
from limits.aio.storage import RedisStorage
from limits.errors import StorageError
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from billing.counters import InProcess

T = TypeVar("T")

PREFIX = "billing"
# Redis answers in less than one hundredth of this; a request should not wait for longer to be counted.
DEADLINE_SECONDS = 0.1
# How long a Redis that did not answer is left alone.
REST_SECONDS = 5.0
CONNECTIONS = 16
# Of the event loop, which may itself have been late: an answer that is here by then counts.
TURNS = 5

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


class InRedis:
    """Counts that processes share; while Redis does not answer, each goes on from what it last knew.

    Being counted is never worth an outage: an answer has a tenth of a second, and after one that did not come
    one request every few seconds tries again. And whoever can make Redis slow wins no second budget: what it answered
    is remembered, and what it was not told it is told later.
    """

    def __init__(
        self,
        url: str,
        *,
        known: InProcess,
        deadline_seconds: float = DEADLINE_SECONDS,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        # Few: one for each request in flight would be opened at once after a start, and most of them too late.
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._pool = ConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            socket_connect_timeout=deadline_seconds,
            socket_timeout=deadline_seconds,
            retry=Retry(NoBackoff(), 1),  # A connection may have been closed since it was last used.
        )
        options: dict[str, Any] = {"connection_pool": self._pool}
        self._redis = RedisStorage(
            url, wrap_exceptions=True, implementation="redispy", key_prefix=PREFIX, **options
        )
        self._known = known
        self._untold = InProcess()
        self._deadline_seconds = deadline_seconds
        self._rest_seconds = rest_seconds
        self._is_away = False
        self._asked_again_at = 0.0

    async def add(self, key: str, amount: int, *, seconds: int) -> int:
        # What was not told is not put on the one that finds out whether Redis is back: its answer may be lost, and
        # then it would be told once more.
        told = amount if self._is_away else amount + self._untold.take(key)
        try:
            count = await self._ask(lambda: self._redis.incr(key, seconds, told))
        except asyncio.CancelledError:
            # The client left. Perhaps Redis was told: who counts twice is stricter, who forgets is not.
            await self._untold.add(key, told, seconds=seconds)
            raise
        if count is None:
            await self._untold.add(key, told, seconds=seconds)
            return await self._known.add(key, amount, seconds=seconds)
        count += self._untold.counts.get(key, 0)
        self._known.put(key, count)
        return count

    async def forget(self, key: str) -> None:
        await self._known.forget(key)
        await self._untold.forget(key)
        await self._ask(lambda: self._redis.clear(key))

    async def close(self) -> None:
        await self._pool.aclose()

    async def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Redis's answer, None if there is none in time. The wait for one's turn is ours, and not held against it."""
        async with self._free:
            return await self._ask_now(question)

    async def _ask_now(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        now = time.monotonic()
        if self._is_away and now < self._asked_again_at:
            return None
        # Whoever comes while this one tries does not try as well.
        self._asked_again_at = now + self._rest_seconds
        try:
            answer = await self._in_time(question)
        except (StorageError, OSError) as error:  # A TimeoutError is an OSError.
            self._note_absence(error)
            return None
        self._note_presence()
        return answer

    async def _in_time(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # Not asyncio.timeout: while connecting, the client loses one in ten cancellations and goes on. What is left
        # behind here ends by the socket's own timeouts.
        asking = asyncio.create_task(question())
        await asyncio.wait({asking}, timeout=self._deadline_seconds)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        if not asking.done():
            asking.add_done_callback(overlook)
            asking.cancel()
            raise TimeoutError
        return asking.result()

    def _note_absence(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            cause = error.__cause__ if isinstance(error, StorageError) else error
            log.warning("Redis does not answer: requests are counted here alone", cause=type(cause).__name__)

    def _note_presence(self) -> None:
        if self._is_away:
            self._is_away = False
            log.info("Redis answers again: requests are counted there")


def overlook(asked: asyncio.Task[Any]) -> None:
    """Look at what became of a question that nobody waits for, or asyncio logs that nobody did."""
    if not asked.cancelled():
        asked.exception()
