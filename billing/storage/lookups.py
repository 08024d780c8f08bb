"""The look-ups that every request needs, of a key and of a token, asked from the event loop itself.

A thread and a pooled connection for each would cost more than the question. Here a few connections of their own are
asked without waiting, by psycopg2's asynchronous side and by statements prepared once a connection. Whatever else is
asked of the database is asked through the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import select
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from time import monotonic
from typing import Any
from uuid import UUID

import orjson
import psycopg2
from anyio import to_thread
from psycopg2 import extensions
from sqlalchemy import Boolean, ColumnElement, DateTime, Integer, Text, Uuid
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import make_url

from billing import tracing
from billing.errors import DatabaseUnavailable
from billing.keys import ApiKey
from billing.storage import api_keys, tenants, users
from billing.storage.driver import CONNECT_ARGS, first_host, translated
from billing.storage.platform import FROM_TENANT, TENANT_ENDS
from billing.storage.shelf import listed
from billing.tenants import Tenant
from billing.tokens import Claims
from billing.users import User

LINES = 4
CONNECTING_SECONDS = 3.0
WAITING_SECONDS = 3.0
# A little more than the server's own statement_timeout: beyond it the server itself does not answer.
ANSWERING_SECONDS = 6.0
LOOKED_EVERY_SECONDS = 0.5

# What a pooler that hands out another server connection each time says of a prepared statement.
NOT_PREPARED = frozenset({"26000", "42P05"})
# The class of SQLSTATEs after which the server closes the connection.
SHUTTING_DOWN = "57P"

# Who asked just now is likely to ask again.
KNOWN_IDS = 4096

Row = Sequence[Any]
# What becomes of what JSON has for a column of this type; None where it is the same here.
READERS: Mapping[type, Callable[[str], Any] | None] = {
    Uuid: lru_cache(KNOWN_IDS)(UUID),
    DateTime: datetime.fromisoformat,
    Text: None,
    Integer: None,
    Boolean: None,
}


@dataclass(frozen=True)
class Question:
    """Two statements in one message, and so in one transaction: find the tenant, then read under its row security.

    Ids and times are sent as texts, and an answer is one array of JSON: psycopg2 takes longer over an object of ours,
    and over each column of each answer, than over all that in one piece.
    """

    name: str
    parameters: Mapping[str, str]
    scope: str
    columns: Sequence[ColumnElement[Any]]
    source: str

    def prepared(self) -> list[str]:
        """What a connection is told once."""
        types = ", ".join(self.parameters.values())
        places = {name: f"${n}" for n, name in enumerate(self.parameters, 1)}
        return [
            f"PREPARE {name} ({types}) AS {text.format(**places)}"
            for name, text in self._statements().items()
        ]

    def message(self, *, prepared: bool) -> str:
        """What is sent each time, with psycopg2's placeholders."""
        places = {name: f"%({name})s" for name in self.parameters}
        if prepared:
            return "; ".join(f"EXECUTE {name} ({', '.join(places.values())})" for name in self._statements())
        cast = {name: f"{place}::{self.parameters[name]}" for name, place in places.items()}
        return "; ".join(text.format(**cast) for text in self._statements().values())

    def read(self, answer: str) -> Row:
        """The columns, and the position."""
        row: list[Any] = orjson.loads(answer)
        for place, reader in self._readers:
            if row[place] is not None:
                row[place] = reader(row[place])
        return row

    def _statements(self) -> dict[str, str]:
        """By names that other texts do not have: behind a pooler, those of another release may still be prepared."""
        query = f"SELECT json_build_array({listed(self.columns)}, {POSITION})::text {self.source}"
        return {
            f"{self.name}_{part}_{hashlib.sha256(text.encode()).hexdigest()[:16]}": text
            for part, text in {"scope": self.scope, "row": query}.items()
        }

    @cached_property
    def _readers(self) -> Sequence[tuple[int, Callable[[str], Any]]]:
        readers = enumerate(READERS[type(column.type)] for column in self.columns)
        return [(place, reader) for place, reader in readers if reader]


# How far the log has come, where a replica is to be compared with it. Of what is inserted, not of what is flushed: a
# commit may be acknowledged before that.
POSITION = "CASE WHEN {positioned} THEN pg_current_wal_insert_lsn()::text END"
FIND_KEY = Question(
    "find_key",
    {"names": "text", "positioned": "boolean"},
    "SELECT set_config('app.tenant_id', tenant_id::text, true) "
    "FROM app.find('api_key', string_to_array({names}, ','))",
    (*tenants.COLUMNS, *api_keys.COLUMNS),
    f"{FROM_TENANT} JOIN api_keys ON api_keys.tenant_id = tenants.id "
    "WHERE api_keys.digest = ANY (string_to_array({names}, ','))",
)
FIND_USER = Question(
    "find_user",
    {
        "tenant_id": "uuid",
        "user_id": "uuid",
        "session_id": "uuid",
        "token_version": "numeric",  # A token may say any number.
        "now": "timestamptz",
        "positioned": "boolean",
    },
    "SELECT set_config('app.tenant_id', ({tenant_id})::text, true)",
    (*tenants.COLUMNS, *users.COLUMNS),
    f"{FROM_TENANT} JOIN users ON users.tenant_id = tenants.id "
    "JOIN sessions ON sessions.tenant_id = users.tenant_id AND sessions.user_id = users.id "
    "WHERE tenants.id = {tenant_id} AND users.id = {user_id} AND users.token_version = {token_version} "
    "AND users.is_active AND sessions.id = {session_id} AND sessions.ended_at IS NULL "
    "AND sessions.expires_at > {now}",
)


class Lookups:
    """Exact questions of one answer or none. Every failure to reach the database is `DatabaseUnavailable`."""

    def __init__(self, lines: int = LINES) -> None:
        self._most = lines
        self._url: str | None = None
        self._positioned = False
        self._lines: set[Line] = set()
        self._idle: list[Line] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[asyncio.Future[Line], float]] = deque()
        self._watch: asyncio.TimerHandle | None = None

    def open(self, url: str, *, positioned: bool = False) -> None:
        """Take the address of the database; connections are made when they are needed, on this event loop.

        `positioned` has each answer tell how far the database's log has come, for `Store.read`.
        """
        self._url = url
        self._positioned = positioned
        self._loop = asyncio.get_running_loop()
        self._look()

    async def find_key(self, digests: Sequence[str]) -> tuple[Tenant, ApiKey, str | None] | None:
        """The key stored under one of these digests, whose it is, and the position."""
        # A digest is `pepper id:hex`, with no comma in it.
        row = await self._ask(FIND_KEY, {"names": ",".join(digests), "positioned": self._positioned})
        if row is None:
            return None
        return Tenant(*row[:TENANT_ENDS]), ApiKey(*row[TENANT_ENDS:-1]), row[-1]

    async def find_user(self, claims: Claims, now: datetime) -> tuple[Tenant, User, str | None] | None:
        """The user whom an access token names, while user, version and session hold, and the position."""
        parameters = {
            "tenant_id": str(claims.tenant_id),
            "user_id": str(claims.user_id),
            "session_id": str(claims.session_id),
            "token_version": claims.token_version,
            "now": now.isoformat(),
            "positioned": self._positioned,
        }
        row = await self._ask(FIND_USER, parameters)
        if row is None:
            return None
        return Tenant(*row[:TENANT_ENDS]), User(*row[TENANT_ENDS:-1]), row[-1]

    def close(self) -> None:
        """Let go of every connection; who waits is told that there is none."""
        self._url = None
        if self._watch is not None:
            self._watch.cancel()
        for line in list(self._lines):
            line.drop()
        self._refuse_all_who_wait()

    async def _ask(self, question: Question, parameters: Mapping[str, Any]) -> Row | None:
        try:
            answer = await self._ask_once(question, parameters)
        except ConnectionError:
            answer = await self._ask_again(question, parameters)
        return question.read(answer) if answer else None

    async def _ask_again(self, question: Question, parameters: Mapping[str, Any]) -> str | None:
        # Its line had been closed since it was last asked, as after a restart: another may be well.
        try:
            return await self._ask_once(question, parameters)
        except ConnectionError as error:
            raise DatabaseUnavailable from error

    async def _ask_once(self, question: Question, parameters: Mapping[str, Any]) -> str | None:
        line = self._idle.pop() if self._idle else await self._next_line()
        try:
            if not tracing.is_on():
                return await line.ask(question, parameters)
            with tracing.span("database question", "client", db__system__name="postgresql"):
                return await line.ask(question, parameters)
        except psycopg2.Error as error:
            if error.pgcode not in NOT_PREPARED:
                raise translated(error) from error
        line.is_prepared = False
        return await self._ask_once(question, parameters)

    # Lines ---------------------------------------------------------------------------------------

    async def _next_line(self) -> Line:
        if self._url is None:
            raise DatabaseUnavailable
        if len(self._lines) + len(self._opening) < self._most:
            task = self._loop.create_task(self._open_line(self._url))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        waiting: asyncio.Future[Line] = self._loop.create_future()
        self._waiting.append((waiting, self._loop.time()))
        try:
            return await waiting
        except asyncio.CancelledError:
            # The request has ended, at its deadline, in the moment in which a line was found for it.
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.freed(waiting.result())
            raise

    async def _open_line(self, url: str) -> None:
        try:
            connection, is_prepared = await to_thread.run_sync(connect, url)
        except psycopg2.Error as error:
            # While there are lines, who waits gets one of them, or is refused in time.
            if not self._lines:
                self._refuse_all_who_wait(error)
            return
        line = Line(self, connection, self._loop, is_prepared=is_prepared)
        self._lines.add(line)
        self.freed(line)

    def freed(self, line: Line) -> None:
        """The line may be asked again: by who has waited longest, if anybody does."""
        while self._waiting:
            waiting, _ = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(line)
                return
        self._idle.append(line)

    def lost(self, line: Line) -> None:
        """The line is no more; those that nobody is asking will hardly be better, as after a restart."""
        self._lines.discard(line)
        idle, self._idle = self._idle, []
        for other in idle:
            other.drop()

    def _refuse_all_who_wait(self, cause: Exception | None = None) -> None:
        while self._waiting:
            refuse(self._waiting.popleft()[0], cause)

    def _look(self) -> None:
        """End what has taken too long. One look at all of them costs less than a timer for each question."""
        now = self._loop.time()
        for line in [
            line for line in self._lines if line.asked_at and now - line.asked_at > ANSWERING_SECONDS
        ]:
            line.drop()
        while self._waiting and now - self._waiting[0][1] > WAITING_SECONDS:
            refuse(self._waiting.popleft()[0])
        self._watch = self._loop.call_later(LOOKED_EVERY_SECONDS, self._look)


def refuse(waiting: asyncio.Future[Any], cause: Exception | None = None) -> None:
    """Tell who waits for a line that there is none."""
    if not waiting.done():
        error = DatabaseUnavailable()
        error.__cause__ = cause
        waiting.set_exception(error)


class Line:
    """One connection, which answers one question at a time."""

    def __init__(
        self, lookups: Lookups, connection: Any, loop: asyncio.AbstractEventLoop, *, is_prepared: bool
    ) -> None:
        self.is_prepared = is_prepared
        self.asked_at = 0.0  # On the loop's clock; 0 while nothing is asked.
        self._lookups = lookups
        self._loop = loop
        self._connection = connection
        self._cursor = connection.cursor()
        self._answer: asyncio.Future[str | None] | None = None
        self._descriptor = connection.fileno()
        loop.add_reader(self._descriptor, self._read)

    def ask(self, question: Question, parameters: Mapping[str, Any]) -> asyncio.Future[str | None]:
        """Send the question. Nobody else may ask until the line is free again, even if nobody waits any more."""
        self._answer = answer = self._loop.create_future()
        self.asked_at = self._loop.time()
        try:
            # Sent at once and whole: it is short, and the socket's buffer is empty.
            self._cursor.execute(MESSAGES[question.name, self.is_prepared], parameters)
        except psycopg2.Error:
            self.drop()
        return answer

    def _read(self) -> None:
        if self._answer is None:  # Nothing was asked: what comes now is a farewell.
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
        self._lookups.freed(self)

    def drop(self) -> None:
        """Close the connection; who waits for its answer gets a `ConnectionError`."""
        self._lookups.lost(self)
        self._loop.remove_reader(self._descriptor)
        self._connection.close()
        answer, self._answer, self.asked_at = self._answer, None, 0.0
        if answer is not None and not answer.done():
            answer.set_exception(ConnectionError())


QUESTIONS = (FIND_KEY, FIND_USER)
MESSAGES = {(q.name, prepared): q.message(prepared=prepared) for q in QUESTIONS for prepared in (True, False)}


def connect(url: str) -> tuple[Any, bool]:
    """A connection that is ready to be asked, and whether its statements are prepared.

    In a thread: libpq looks names up without asking whether that may take long. Of several hosts each has its own
    time: libpq's asynchronous side knows no `connect_timeout`, and would wait for the first for ever.
    """
    _, arguments = PGDialect_psycopg2().create_connect_args(make_url(url))  # type: ignore[no-untyped-call]
    return first_host(arguments, _connect_to)


def _connect_to(arguments: Mapping[str, Any]) -> tuple[Any, bool]:
    connection = psycopg2.connect(**{**CONNECT_ARGS, **arguments}, async_=1)
    deadline = monotonic() + CONNECTING_SECONDS
    try:
        settle(connection, deadline)
        return connection, _prepare(connection, deadline)
    except BaseException:
        connection.close()
        raise


def _prepare(connection: Any, deadline: float) -> bool:
    cursor = connection.cursor()
    try:
        for statement in (statement for question in QUESTIONS for statement in question.prepared()):
            cursor.execute(statement)
            settle(connection, deadline)
    except psycopg2.Error as error:
        if error.pgcode not in NOT_PREPARED:
            raise
        return False
    return True


def settle(connection: Any, deadline: float) -> None:
    """Wait until the connection has done what it was told; raises `psycopg2.OperationalError` at the deadline."""
    while (state := connection.poll()) != extensions.POLL_OK:
        ready = select.poll()  # `select.select` takes no descriptor above 1,023.
        ready.register(connection, select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        left = deadline - monotonic()
        if left <= 0 or not ready.poll(left * 1000):
            raise psycopg2.OperationalError("no answer")
