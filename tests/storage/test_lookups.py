"""The look-ups on the event loop: right answers, and no wait for a connection that is broken, stopped or missing."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text

from billing import sessions, tenants
from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.keys import ApiKey, KeyDigests
from billing.settings import Settings
from billing.storage import api_keys, async_pool, users
from billing.storage.lookups import Lookups
from billing.storage.questions import FIND_KEY, FIND_USER, Question
from billing.storage.shelf import OF_TENANT
from billing.storage.store import Store
from billing.storage.tables import api_keys as table_of_keys
from billing.storage.tables import users as table_of_users
from billing.storage.tenants import GET
from billing.tenants import Registered, Tenant
from billing.tokens import Claims, Tokens
from billing.users import User, new_user
from billing.users import add as add_user
from tests.conftest import TestDatabase, waits_for_a_lock

T = TypeVar("T")
TEXT = 'Ünïcode "quoted" it\'s \\back\\ \U0001f600 {a,b} %s\x7f'
ODD: dict[str, dict[str, Any]] = {
    "tenants": {
        "company_name": TEXT,
        "domain": None,
        "updated_at": datetime(2026, 1, 15, 9, 30, 0, 120, UTC),
    },
    "webhook_endpoints": {"url": "https://hooks.acme.example/?a=%27"},
    "users": {"first_name": TEXT, "last_login": datetime(1999, 12, 31, 23, 59, 59, 999999, UTC)},
    "api_keys": {
        "expires_at": datetime(2026, 1, 15, 9, 30, 0, 100000, UTC),
        "revoked_at": datetime(2026, 1, 15, 9, 30, tzinfo=UTC),
        "last_used_at": datetime(2026, 1, 15, 9, 30, 0, 1, UTC),
    },
}
NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
SHORT = 0.3
NOWHERE = "postgresql+psycopg2://billing_app@127.0.0.1:1/billing"


@pytest.fixture
def digests(settings: Settings) -> KeyDigests:
    return KeyDigests(settings.key_peppers)


@pytest.fixture
def two(store: Store, digests: KeyDigests) -> list[Registered]:
    """Acme and Globex."""

    def register(name: str) -> Registered:
        details = {"company_name": name, "email": f"ada@{name}.example"}
        with store.tenant(new_id()) as tx:
            return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)

    return [register("acme"), register("globex")]


@pytest.fixture
def claims(store: Store, settings: Settings, two: list[Registered]) -> Claims:
    """The claims in the access token of Acme's owner."""
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(two[0].tenant.id) as tx:
        pair = sessions.start(tx, two[0].owner, tokens=tokens, now=NOW)
    return tokens.read_access(pair.access, NOW)


def ask(url: str, story: Callable[[Lookups], Awaitable[T]], *, connections: int = 2) -> T:
    async def run() -> T:
        opened = Lookups(connections)
        opened.open(url)
        try:
            return await story(opened)
        finally:
            opened.close()

    return asyncio.run(run())


# Answers -----------------------------------------------------------------------------------------


def test_each_key_finds_its_own_tenant(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests
) -> None:
    async def all_of_them(asked: Lookups) -> list[Any]:
        return [await asked.find_key(digests.candidates(new.text)) for made in two for new in made.keys]

    found = ask(test_database.app_url, all_of_them)
    assert found == [(made.tenant, new.key, None) for made in two for new in made.keys]


def test_concurrent_lookups_each_get_their_own_answer(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests
) -> None:
    asked_for = [two[n % 2].keys[n % 4] for n in range(200)]

    async def all_at_once(asked: Lookups) -> list[Any]:
        return await asyncio.gather(*(asked.find_key(digests.candidates(new.text)) for new in asked_for))

    found = ask(test_database.app_url, all_at_once)
    assert [(tenant.id, key.id) for tenant, key, _ in found] == [
        (new.key.tenant_id, new.key.id) for new in asked_for
    ]


def test_an_unknown_key_finds_nothing(test_database: TestDatabase, two: list[Registered]) -> None:
    assert ask(test_database.app_url, lambda asked: asked.find_key(["k1:none", "'; --"])) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": new_id()},
        {"session_id": new_id()},
        {"token_version": 2},
        {"token_version": 10**30},
        {"tenant_id": new_id()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_token_with_a_changed_claim_finds_no_user(
    test_database: TestDatabase, two: list[Registered], claims: Claims, changes: dict[str, Any]
) -> None:
    async def both(asked: Lookups) -> list[Any]:
        return [await asked.find_user(said, NOW) for said in (claims, replace(claims, **changes))]

    assert ask(test_database.app_url, both) == [(two[0].tenant, two[0].owner, None), None]


def test_a_token_of_one_tenant_finds_no_user_of_another(
    test_database: TestDatabase, two: list[Registered], claims: Claims
) -> None:
    moved = replace(claims, tenant_id=two[1].tenant.id)
    assert ask(test_database.app_url, lambda asked: asked.find_user(moved, NOW)) is None


def test_an_expired_session_finds_no_user(test_database: TestDatabase, claims: Claims) -> None:
    end = NOW + sessions.FAMILY_LIFETIME

    async def before_and_then(asked: Lookups) -> list[bool]:
        moments = (end - timedelta(microseconds=1), end)
        return [await asked.find_user(claims, now) is not None for now in moments]

    assert ask(test_database.app_url, before_and_then) == [True, False]


def test_a_session_finds_no_other_user_of_its_tenant(
    test_database: TestDatabase, store: Store, two: list[Registered], claims: Claims
) -> None:
    bob = new_user(claims.tenant_id, {"email": "bob@acme.example"}, role="owner", now=NOW)
    with store.tenant(claims.tenant_id) as tx:
        add_user(tx, bob, password_hash="-", now=NOW)
    of_a_colleague = replace(claims, user_id=bob.id)
    assert ask(test_database.app_url, lambda asked: asked.find_user(of_a_colleague, NOW)) is None


@pytest.mark.parametrize("is_prepared", [True, False])
def test_values_of_every_kind_are_read_as_by_the_store(
    test_database: TestDatabase,
    superuser: Engine,
    two: list[Registered],
    digests: KeyDigests,
    claims: Claims,
    is_prepared: bool,
) -> None:
    key = two[0].keys[0]
    with superuser.begin() as connection:
        for table, values in ODD.items():
            given = ", ".join(f"{column} = :{column}" for column in values)
            connection.execute(text(f"UPDATE {table} SET {given}"), values)

    async def both(asked: Lookups) -> list[Any]:
        await asked.find_key(["none"])
        asked._pool._idle[0].is_prepared = is_prepared
        return [await asked.find_key(digests.candidates(key.text)), await asked.find_user(claims, NOW)]

    by_key, by_token = ask(test_database.app_url, both, connections=1)
    with superuser.connect() as connection:
        tenant = connection.execute(GET, {OF_TENANT: two[0].tenant.id}).one()
        kept = connection.execute(select(*api_keys.COLUMNS).where(table_of_keys.c.id == key.key.id)).one()
        user = connection.execute(select(*users.COLUMNS).where(table_of_users.c.id == claims.user_id)).one()
    assert by_key == (Tenant(*tenant), ApiKey(*kept), None)
    assert by_token == (Tenant(*tenant), User(*user), None)
    assert by_key[0].company_name == ODD["tenants"]["company_name"]
    assert by_key[1].expires_at == ODD["api_keys"]["expires_at"]


# Prepared, or not --------------------------------------------------------------------------------


def test_statements_that_a_pooler_forgot_are_sent_in_full(
    test_database: TestDatabase, superuser: Engine, two: list[Registered], digests: KeyDigests, claims: Claims
) -> None:
    """As behind PgBouncer, which hands out another server connection each time."""

    async def after_forgetting(asked: Lookups) -> list[Any]:
        await asked.find_key(["none"])
        connection = asked._pool._idle.pop()
        connection._answer = answer = asyncio.get_running_loop().create_future()
        connection._cursor.execute("DEALLOCATE ALL; SELECT 1")
        await answer
        found = [
            await asked.find_key(digests.candidates(two[1].keys[0].text)),
            await asked.find_user(claims, NOW),
        ]
        assert not connection.is_prepared
        return found

    key, user = ask(test_database.app_url, after_forgetting, connections=1)
    assert (key[0], user[0]) == (two[1].tenant, two[0].tenant)


def test_statements_prepared_by_another_client_are_sent_in_full(test_database: TestDatabase) -> None:
    """As behind a pooler, whose connection another of our processes used before."""
    connection, is_prepared = async_pool.connect(test_database.app_url)
    try:
        assert is_prepared
        assert not async_pool._prepare(connection, time.monotonic() + 10)
    finally:
        connection.close()


def test_statements_of_another_release_have_other_names() -> None:
    """Behind a pooler a statement stays prepared on its connection, under its name."""
    ours = set(FIND_KEY.prepared())
    for theirs in (replace(FIND_KEY, columns=FIND_KEY.columns[1:]), replace(FIND_KEY, scope="SELECT 1")):
        [changed] = set(theirs.prepared()) - ours
        assert changed.split()[1] not in {statement.split()[1] for statement in ours}


@pytest.mark.parametrize("question", [FIND_KEY, FIND_USER], ids=lambda question: question.name)
def test_a_question_is_sent_as_one_message(question: Question) -> None:
    # Two statements in one message are one transaction: the setting is gone when the answer arrives.
    for prepared in (True, False):
        assert question.message(prepared=prepared).count(";") == 1


def test_a_lookup_leaves_no_tenant_on_its_connection(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests, claims: Claims
) -> None:
    """As behind PgBouncer, which hands it to another client."""

    async def left(asked: Lookups) -> str | None:
        connection = asked._pool._idle.pop()
        connection._answer = answer = asyncio.get_running_loop().create_future()
        connection._cursor.execute("SELECT current_setting('app.tenant_id', true)")
        return await answer

    async def after_each(asked: Lookups) -> list[str | None]:
        assert await asked.find_key(digests.candidates(two[0].keys[0].text)) is not None
        by_key = await left(asked)
        assert await asked.find_user(claims, NOW) is not None
        return [by_key, await left(asked)]

    assert not any(ask(test_database.app_url, after_each, connections=1))


def test_a_key_is_looked_up_by_id_even_with_a_generic_plan(
    test_database: TestDatabase, digests: KeyDigests, two: list[Registered]
) -> None:
    """By digest, a plan for any number of names would read every key that the tenant ever had."""
    engine = create_engine(test_database.app_url)
    values = {"names": ",".join(digests.candidates(two[0].keys[0].text)), "positioned": False}
    scope, row = FIND_KEY.message(prepared=True).split("; ")
    with engine.connect() as connection:
        for statement in (*FIND_KEY.prepared(), "SET plan_cache_mode = force_generic_plan"):
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("SET enable_seqscan = off")
        connection.exec_driver_sql(scope, values)
        plan = "".join(connection.exec_driver_sql(f"EXPLAIN {row}", values).scalars())
    engine.dispose()
    # Either of the two indexes with that column: on a table with few rows they cost the same.
    assert re.search(r"\(id = (\(InitPlan|\$\d)", plan)
    assert "digest" not in plan


# Failures ----------------------------------------------------------------------------------------


def backends(superuser: Engine) -> list[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE usename = 'billing_app' AND query LIKE '%find_key%'"
    with superuser.connect() as connection:
        return list(connection.scalars(text(query)))


@contextmanager
def low_descriptors_taken() -> Iterator[None]:
    """Descriptors opened within are 1,024 or above, which `select.select` does not support."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while taken[-1] < 1023:
            taken.append(os.dup(taken[0]))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lookups_work_with_descriptors_above_1023(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)
    with low_descriptors_taken():
        assert ask(test_database.app_url, lambda asked: asked.find_key(candidates)) is not None


def test_a_closed_connection_is_replaced(
    test_database: TestDatabase, superuser: Engine, two: list[Registered], digests: KeyDigests
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)

    async def through_a_restart(asked: Lookups) -> list[Any]:
        before = await asyncio.gather(*(asked.find_key(candidates) for _ in range(4)))
        with superuser.connect() as connection:
            for pid in backends(superuser):
                connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        # Immediately, before the loop has noticed, and again after it has.
        at_once = await asyncio.gather(*(asked.find_key(candidates) for _ in range(4)))
        await asyncio.sleep(SHORT)
        return [*before, *at_once, await asked.find_key(candidates)]

    found = ask(test_database.app_url, through_a_restart)
    assert [tenant for tenant, *_ in found] == [two[0].tenant] * 9


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("connections", [1, 4])
def test_a_stopped_backend_is_abandoned_for_another(
    test_database: TestDatabase,
    two: list[Registered],
    digests: KeyDigests,
    monkeypatch: pytest.MonkeyPatch,
    connections: int,
) -> None:
    monkeypatch.setattr(async_pool, "ANSWERING_SECONDS", SHORT)
    monkeypatch.setattr(async_pool, "CHECKED_EVERY_SECONDS", SHORT / 10)
    candidates = digests.candidates(two[0].keys[0].text)

    async def past_it(asked: Lookups) -> list[Any]:
        first, *_ = await asyncio.gather(*(asked.find_key(candidates) for _ in range(connections)))
        while len(asked._pool._connections) < connections:
            await asyncio.sleep(0.01)
        before = set(asked._pool._connections)
        with stopped([one._connection.info.backend_pid for one in before]):
            found = [first, await asked.find_key(candidates)]
        # Idle connections are not kept either.
        assert not before & asked._pool._connections
        return found

    found = ask(test_database.app_url, past_it, connections=connections)
    assert [tenant for tenant, *_ in found] == [two[0].tenant] * 2


def test_existing_connections_answer_all_when_no_more_can_be_opened(
    test_database: TestDatabase, superuser: Engine, two: list[Registered], digests: KeyDigests
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)

    def limit(to: str) -> None:
        with superuser.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{superuser.url.database}" CONNECTION LIMIT {to}')

    async def story(asked: Lookups) -> list[Any]:
        await asked.find_key(candidates)
        limit("1")
        return await asyncio.gather(*(asked.find_key(candidates) for _ in range(50)))

    try:
        found = ask(test_database.app_url, story, connections=4)
    finally:
        limit("-1")
    assert [tenant for tenant, *_ in found] == [two[0].tenant] * 50


def test_without_a_database_every_lookup_fails_promptly(monkeypatch: pytest.MonkeyPatch) -> None:
    # Far longer than the test allows: no lookup may wait for a connection that cannot come.
    monkeypatch.setattr(async_pool, "WAITING_SECONDS", 60)

    async def many(asked: Lookups) -> list[BaseException | Any]:
        answers = (asked.find_key([str(n)]) for n in range(20))
        return await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 5)

    assert {type(answer) for answer in ask(NOWHERE, many)} == {DatabaseUnavailable}


def test_lookups_fail_before_opening_and_after_closing() -> None:
    async def story() -> None:
        asked = Lookups()
        with pytest.raises(DatabaseUnavailable):
            await asked.find_key(["a"])
        asked.open(NOWHERE)
        waiting = asyncio.ensure_future(asked.find_key(["a"]))
        await asyncio.sleep(0)
        asked.close()
        with pytest.raises(DatabaseUnavailable):
            await waiting

    asyncio.run(story())


def test_a_connection_established_after_closing_is_closed(test_database: TestDatabase) -> None:
    async def story() -> None:
        asked = Lookups()
        asked.open(test_database.app_url)
        waiting = asyncio.ensure_future(asked.find_key(["a"]))
        await asyncio.sleep(0)
        asked.close()
        with pytest.raises(DatabaseUnavailable):
            await waiting
        opening = list(asked._pool._opening)
        assert opening
        await asyncio.gather(*opening)
        assert not asked._pool._connections

    asyncio.run(story())


def test_a_cancelled_lookup_leaves_the_connection_usable(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests
) -> None:
    async def story(asked: Lookups) -> Any:
        for _ in range(20):
            left = asyncio.ensure_future(asked.find_key(digests.candidates(two[0].keys[0].text)))
            await asyncio.sleep(0)
            left.cancel()
            found = await asked.find_key(digests.candidates(two[1].keys[0].text))
            assert found is not None
            assert found[0] == two[1].tenant
        return len(asked._pool._connections)

    assert ask(test_database.app_url, story, connections=1) == 1


def test_the_longest_waiter_is_served_and_a_cancelled_one_is_skipped(
    test_database: TestDatabase, two: list[Registered], digests: KeyDigests
) -> None:
    served: list[str] = []

    async def wait(asked: Lookups, name: str) -> None:
        await asked.find_key(digests.candidates(two[0].keys[0].text))
        served.append(name)

    async def story(asked: Lookups) -> None:
        await wait(asked, "nobody else")
        taken = asked._pool._idle.pop()
        left, first, second = waiting = [
            asyncio.ensure_future(wait(asked, name)) for name in ("left", "first", "second")
        ]
        await asyncio.sleep(0)
        asked._pool.freed(taken)
        left.cancel()  # At the moment it is given the connection.
        await asyncio.wait(waiting)
        assert left.cancelled()
        assert first.exception() is second.exception() is None

    ask(test_database.app_url, story, connections=1)
    assert served == ["nobody else", "first", "second"]


def test_waiting_too_long_for_a_connection_fails(
    test_database: TestDatabase,
    two: list[Registered],
    digests: KeyDigests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(async_pool, "WAITING_SECONDS", SHORT)
    monkeypatch.setattr(async_pool, "CHECKED_EVERY_SECONDS", SHORT / 10)

    async def story(asked: Lookups) -> None:
        await asked.find_key(["none"])
        asked._pool._idle.clear()  # As if another lookup were using it.
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(asked.find_key(["none"]), 10)

    ask(test_database.app_url, story, connections=1)


def test_an_idle_connection_is_kept(test_database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_pool, "CHECKED_EVERY_SECONDS", SHORT / 100)

    async def story(asked: Lookups) -> bool:
        await asked.find_key(["none"])
        monkeypatch.setattr(async_pool, "ANSWERING_SECONDS", SHORT / 10)
        before = set(asked._pool._connections)
        await asyncio.sleep(SHORT)
        return bool(before) and asked._pool._connections == before

    assert ask(test_database.app_url, story, connections=1)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_locked_table_makes_the_database_unavailable(
    test_database: TestDatabase,
    superuser: Engine,
    two: list[Registered],
    digests: KeyDigests,
    is_open: bool,
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)

    async def story(asked: Lookups) -> Any:
        # Otherwise it waits for the lock already while the connection is made.
        if is_open:
            await asked.find_key(candidates)
        with superuser.begin() as connection:
            connection.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(DatabaseUnavailable):
                await asked.find_key(candidates)
        return await asked.find_key(candidates)

    assert ask(test_database.app_url, story)[0] == two[0].tenant


def test_a_lookup_unanswered_twice_fails(
    test_database: TestDatabase,
    superuser: Engine,
    two: list[Registered],
    digests: KeyDigests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(async_pool, "ANSWERING_SECONDS", SHORT)
    monkeypatch.setattr(async_pool, "CHECKED_EVERY_SECONDS", SHORT / 10)
    candidates = digests.candidates(two[0].keys[0].text)

    async def story(asked: Lookups) -> Any:
        await asked.find_key(candidates)
        with superuser.begin() as connection:
            # A table that the statements touch only when executed, not when prepared.
            connection.execute(text("LOCK TABLE directory IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(DatabaseUnavailable):
                await asked.find_key(candidates)
        return await asked.find_key(candidates)

    assert ask(test_database.app_url, story)[0] == two[0].tenant


def test_a_lookup_is_repeated_when_its_backend_is_terminated(
    test_database: TestDatabase, superuser: Engine, two: list[Registered], digests: KeyDigests
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)

    async def story(asked: Lookups) -> Any:
        await asked.find_key(candidates)
        [first] = asked._pool._connections
        with superuser.begin() as connection:
            connection.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
            asking = asyncio.ensure_future(asked.find_key(candidates))
            while not waits_for_a_lock(superuser):
                await asyncio.sleep(0.01)
            ended = {"pid": first._connection.info.backend_pid}
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), ended)
        return await asking

    assert ask(test_database.app_url, story, connections=1)[0] == two[0].tenant


def test_closing_fails_waiting_lookups_and_closes_connections(
    test_database: TestDatabase, superuser: Engine, two: list[Registered], digests: KeyDigests
) -> None:
    candidates = digests.candidates(two[0].keys[0].text)

    async def story() -> list[int]:
        asked = Lookups(1)
        asked.open(test_database.app_url)
        await asked.find_key(candidates)
        [kept] = asked._pool._connections
        pids = [kept._connection.info.backend_pid]
        asked._pool._idle.clear()  # As if another lookup were using it.
        waiting = asyncio.ensure_future(asked.find_key(candidates))
        await asyncio.sleep(0)
        asked.close()
        for question in (waiting, asked.find_key(candidates)):
            with pytest.raises(DatabaseUnavailable):
                await asyncio.wait_for(question, SHORT)
        return pids

    left = asyncio.run(story())
    until = time.monotonic() + 10
    while set(left) & set(backends(superuser)):
        assert time.monotonic() < until, "It is still open."
        time.sleep(0.01)


def test_a_host_that_hangs_is_skipped(
    test_database: TestDatabase, two: list[Registered], claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover when the old primary is only stopped: it accepts connections and never answers."""
    monkeypatch.setattr(async_pool, "CONNECTING_SECONDS", 1.0)
    well = make_url(test_database.app_url)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        hosts = (f"127.0.0.1:{hanging.getsockname()[1]}", f"{well.query['host']}:{well.query['port']}")
        query = {"host": hosts, "target_session_attrs": "read-write"}
        url = well.set(query=query).render_as_string(hide_password=False)
        found = ask(url, lambda opened: opened.find_user(claims, NOW))
    assert found is not None
    assert found[0].id == two[0].tenant.id
