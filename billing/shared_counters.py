"""Counts that many processes share in Redis, and a fallback while it does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from billing.counters import InProcess

T = TypeVar("T")

PREFIX = "billing"
# Redis answers in less than one hundredth of this; no request should wait longer to be counted.
DEADLINE_SECONDS = 0.1
# How long a Redis that did not answer is left alone.
REST_SECONDS = 5.0
CONNECTIONS = 16
# Iterations of the event loop, which may itself be late: an answer that arrives within them counts.
LOOP_ITERATIONS = 5

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


class InRedis:
    """Counts that processes share; while Redis does not answer, each goes on from the last counts it knew.

    Counting is never worth an outage: Redis has a tenth of a second to answer, and after a failure one
    request every few seconds tries again. And whoever can make Redis slow wins no second budget: its last
    counts are remembered, and what it missed is added later.
    """

    def __init__(
        self,
        url: str,
        *,
        local: InProcess,
        deadline_seconds: float = DEADLINE_SECONDS,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        """Raises `ValueError` for a parameter of the URL that the client does not know, or cannot use."""
        # Few: one for each request in flight would be opened at once after a start, and most of them too late.
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._pool = ConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            socket_connect_timeout=deadline_seconds,
            socket_timeout=deadline_seconds,
            retry=Retry(NoBackoff(), 1),  # A connection may have been closed since it was last used.
        )
        try:
            self._pool.make_connection()  # type: ignore[no-untyped-call]
        except (TypeError, RedisError) as error:
            raise ValueError from error
        self._redis = Redis(connection_pool=self._pool)
        self._local = local
        self._unsent = InProcess()
        # The event loop refers to tasks only weakly.
        self._counting: set[asyncio.Task[int]] = set()
        self._deadline_seconds = deadline_seconds
        self._rest_seconds = rest_seconds
        self._is_away = False
        self._asked_again_at = 0.0

    async def add(self, key: str, amount: int, *, seconds: int) -> int:
        # A task of its own: a request whose client disconnects is counted all the same, and once.
        counting = asyncio.create_task(self._count(key, amount, seconds))
        self._counting.add(counting)
        counting.add_done_callback(self._counting.discard)
        return await asyncio.shield(counting)

    async def _count(self, key: str, amount: int, seconds: int) -> int:
        # What Redis missed is not added by the request that finds out whether it is back: if that one's
        # answer is lost, it would be added twice.
        total = amount if self._is_away else amount + self._unsent.take(key)
        count = await self._ask(lambda: self._add(key, total, seconds))
        if count is None:
            await self._unsent.add(key, total, seconds=seconds)
            return await self._local.add(key, amount, seconds=seconds)
        count += self._unsent.counts.get(key, 0)
        self._local.put(key, count)
        return count

    async def forget(self, key: str) -> None:
        await self._local.forget(key)
        await self._unsent.forget(key)
        await self._ask(lambda: self._delete(key))

    async def _add(self, key: str, amount: int, seconds: int) -> int:
        name = _name(key)
        # Without MULTI, which costs two replies more: between the two commands nothing can go wrong. Each call
        # extends the expiry, which only has to outlast the window, as its number is in the key.
        async with self._redis.pipeline(transaction=False) as commands:
            commands.incrby(name, amount)
            commands.expire(name, seconds)
            count, _ = await commands.execute()
        return int(count)

    async def _delete(self, key: str) -> None:
        await self._redis.delete(_name(key))

    async def close(self) -> None:
        await self._pool.aclose()

    async def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Redis's answer, None if there is none in time; the wait for a free connection does not count."""
        async with self._free:
            return await self._ask_now(question)

    async def _ask_now(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        now = time.monotonic()
        if self._is_away and now < self._asked_again_at:
            return None
        # Requests that come while this one tries do not try as well.
        self._asked_again_at = now + self._rest_seconds
        try:
            answer = await self._in_time(question)
        except (RedisError, OSError) as error:  # A TimeoutError is an OSError.
            self._note_absence(error)
            return None
        self._note_presence()
        return answer

    async def _in_time(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # Not asyncio.timeout: while connecting, redis-py loses one in ten cancellations and goes on. A task
        # left behind here ends by the socket's own timeouts.
        asking = asyncio.create_task(question())
        await asyncio.wait({asking}, timeout=self._deadline_seconds)
        for _ in range(LOOP_ITERATIONS):
            await asyncio.sleep(0)
        if not asking.done():
            asking.add_done_callback(overlook)
            asking.cancel()
            raise TimeoutError
        return asking.result()

    def _note_absence(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            log.warning("Redis does not answer: requests are counted here alone", cause=type(error).__name__)

    def _note_presence(self) -> None:
        if self._is_away:
            self._is_away = False
            log.info("Redis answers again: requests are counted there")


def _name(key: str) -> str:
    return f"{PREFIX}:{key}"


def overlook(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception of a task that nobody awaits, or asyncio logs that it never was."""
    if not task.cancelled():
        task.exception()
