"""A few connections used from the event loop itself, each with one question in flight at a time."""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any

import psycopg2
from anyio import to_thread
from psycopg2 import extensions

from billing import tracing
from billing.errors import DatabaseUnavailable
from billing.storage.driver import connect_args, first_host, translate
from billing.storage.questions import MESSAGES, QUESTIONS, Question, Row

CONNECTIONS = 4
CONNECTING_SECONDS = 3.0
WAITING_SECONDS = 3.0
# A little more than the server's own statement_timeout: past it the server itself is not responding.
ANSWERING_SECONDS = 6.0
CHECKED_EVERY_SECONDS = 0.5

# The SQLSTATEs of prepared statements that are unknown, or exist already, behind a pooler that switches connections.
NOT_PREPARED = frozenset({"26000", "42P05"})
# The class of SQLSTATEs after which the server closes the connection.
SHUTTING_DOWN = "57P"


class AsyncPool:
    """psycopg2 connections in asynchronous mode: up to a limit, opened on demand."""

    def __init__(self, connections: int = CONNECTIONS) -> None:
        self._most = connections
        self._url: str | None = None
        self._connections: set[AsyncConnection] = set()
        self._idle: list[AsyncConnection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[asyncio.Future[AsyncConnection], float]] = deque()
        self._watch: asyncio.TimerHandle | None = None

    def open(self, url: str) -> None:
        """Set the database URL, and bind the pool to this event loop."""
        self._url = url
        self._loop = asyncio.get_running_loop()
        self._drop_overdue()

    def close(self) -> None:
        """Close every connection; callers waiting for one get `DatabaseUnavailable`."""
        self._url = None
        if self._watch is not None:
            self._watch.cancel()
        for connection in list(self._connections):
            connection.drop()
        self._refuse_all_who_wait()

    async def ask(self, question: Question, parameters: Mapping[str, Any]) -> Row | None:
        """Return the one row, or None; raises `DatabaseUnavailable` and `StorageError`."""
        try:
            answer = await self._ask_once(question, parameters)
        except ConnectionError:
            answer = await self._ask_again(question, parameters)
        return question.read(answer) if answer else None

    async def _ask_again(self, question: Question, parameters: Mapping[str, Any]) -> str | None:
        # The connection was lost, as after a restart of the server: another may work.
        try:
            return await self._ask_once(question, parameters)
        except ConnectionError as error:
            raise DatabaseUnavailable from error

    async def _ask_once(self, question: Question, parameters: Mapping[str, Any]) -> str | None:
        connection = self._idle.pop() if self._idle else await self._next_connection()
        try:
            if not tracing.is_on():
                return await connection.ask(question, parameters)
            with tracing.span("database question", "client", {"db.system.name": "postgresql"}):
                return await connection.ask(question, parameters)
        except psycopg2.Error as error:
            if error.pgcode not in NOT_PREPARED:
                raise translate(error) from error
        connection.is_prepared = False
        return await self._ask_once(question, parameters)

    async def _next_connection(self) -> AsyncConnection:
        if self._url is None:
            raise DatabaseUnavailable
        if len(self._connections) + len(self._opening) < self._most:
            task = self._loop.create_task(self._open_one(self._url))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        waiting: asyncio.Future[AsyncConnection] = self._loop.create_future()
        self._waiting.append((waiting, self._loop.time()))
        try:
            return await waiting
        except asyncio.CancelledError:
            # The request was cancelled, at its deadline, just as it was given a connection.
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.freed(waiting.result())
            raise

    async def _open_one(self, url: str) -> None:
        try:
            opened, is_prepared = await to_thread.run_sync(connect, url)
        except psycopg2.Error as error:
            # While there are connections, the waiting callers get one of them, or time out.
            if not self._connections:
                self._refuse_all_who_wait(error)
            return
        if self._url is None:  # The pool was closed meanwhile.
            opened.close()
            return
        connection = AsyncConnection(self, opened, self._loop, is_prepared=is_prepared)
        self._connections.add(connection)
        self.freed(connection)

    def freed(self, connection: AsyncConnection) -> None:
        """Hand the connection to the caller that has waited longest, or else keep it as idle."""
        while self._waiting:
            waiting, _ = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(connection)
                return
        self._idle.append(connection)

    def lost(self, connection: AsyncConnection) -> None:
        """Forget a closed connection, and drop the idle ones: a restart would have closed them too."""
        self._connections.discard(connection)
        idle, self._idle = self._idle, []
        for other in idle:
            other.drop()

    def _refuse_all_who_wait(self, cause: Exception | None = None) -> None:
        while self._waiting:
            refuse(self._waiting.popleft()[0], cause)

    def _drop_overdue(self) -> None:
        """Drop overdue connections and refuse overdue waiters: cheaper than a timer for each question."""
        now = self._loop.time()
        overdue = [c for c in self._connections if c.asked_at and now - c.asked_at > ANSWERING_SECONDS]
        for connection in overdue:
            connection.drop()
        while self._waiting and now - self._waiting[0][1] > WAITING_SECONDS:
            refuse(self._waiting.popleft()[0])
        self._watch = self._loop.call_later(CHECKED_EVERY_SECONDS, self._drop_overdue)


def refuse(waiting: asyncio.Future[Any], cause: Exception | None = None) -> None:
    """Fail a caller's wait for a connection with `DatabaseUnavailable`."""
    if not waiting.done():
        error = DatabaseUnavailable()
        error.__cause__ = cause
        waiting.set_exception(error)


class AsyncConnection:
    """One connection, with one question in flight at a time."""

    def __init__(
        self, pool: AsyncPool, connection: Any, loop: asyncio.AbstractEventLoop, *, is_prepared: bool
    ) -> None:
        self.is_prepared = is_prepared
        self.asked_at = 0.0  # On the loop's clock; 0 while nothing is asked.
        self._pool = pool
        self._loop = loop
        self._connection = connection
        self._cursor = connection.cursor()
        self._answer: asyncio.Future[str | None] | None = None
        self._descriptor = connection.fileno()
        loop.add_reader(self._descriptor, self._read)

    def ask(self, question: Question, parameters: Mapping[str, Any]) -> asyncio.Future[str | None]:
        """Send the question. The connection stays busy until the answer has come, even if its caller has gone."""
        self._answer = answer = self._loop.create_future()
        self.asked_at = self._loop.time()
        try:
            # Sent at once and whole: it is short, and the socket's buffer is empty.
            self._cursor.execute(MESSAGES[question.name, self.is_prepared], parameters)
        except psycopg2.Error:
            self.drop()
        return answer

    def _read(self) -> None:
        if self._answer is None:  # No question is in flight: the server is closing the connection.
            self.drop()
            return
        try:
            if self._connection.poll() == extensions.POLL_READ:
                return
            row = self._cursor.fetchone()
            answer = row[0] if row else None
        except psycopg2.Error as error:
            if self._connection.closed or error.pgcode is None or error.pgcode.startswith(SHUTTING_DOWN):
                self.drop()
            else:
                self._finish(error=error)
        else:
            self._finish(answer)

    def _finish(self, answer: str | None = None, *, error: psycopg2.Error | None = None) -> None:
        awaited, self._answer, self.asked_at = self._answer, None, 0.0
        if awaited is not None and not awaited.done():
            awaited.set_result(answer) if error is None else awaited.set_exception(error)
        self._pool.freed(self)

    def drop(self) -> None:
        """Close the connection; the caller waiting for its answer gets a `ConnectionError`."""
        self._pool.lost(self)
        self._loop.remove_reader(self._descriptor)
        self._connection.close()
        answer, self._answer, self.asked_at = self._answer, None, 0.0
        if answer is not None and not answer.done():
            answer.set_exception(ConnectionError())


def connect(url: str) -> tuple[Any, bool]:
    """Return a connection ready for questions, and whether its statements are prepared.

    Runs in a thread, as libpq resolves names synchronously. Each of several hosts has its own deadline: in
    asynchronous mode libpq ignores `connect_timeout`, and would wait for the first host for ever.
    """
    return first_host(connect_args(url), _connect_to)


def _connect_to(arguments: Mapping[str, Any]) -> tuple[Any, bool]:
    connection = psycopg2.connect(**arguments, async_=1)
    deadline = monotonic() + CONNECTING_SECONDS
    try:
        wait_until_ready(connection, deadline)
        return connection, _prepare(connection, deadline)
    except BaseException:
        connection.close()
        raise


def _prepare(connection: Any, deadline: float) -> bool:
    cursor = connection.cursor()
    try:
        for statement in (statement for question in QUESTIONS for statement in question.prepared()):
            cursor.execute(statement)
            wait_until_ready(connection, deadline)
    except psycopg2.Error as error:
        if error.pgcode not in NOT_PREPARED:
            raise
        return False
    return True


def wait_until_ready(connection: Any, deadline: float) -> None:
    """Wait until the connection's current operation is done; raises `psycopg2.OperationalError` at the deadline."""
    while (state := connection.poll()) != extensions.POLL_OK:
        ready = select.poll()  # `select.select` takes no descriptor above 1,023.
        ready.register(connection, select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        left = deadline - monotonic()
        if left <= 0 or not ready.poll(left * 1000):
            raise psycopg2.OperationalError("no answer")
