"""Tasks: each is taken once, of any tenant, by a worker that can reach nothing else of that tenant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, create_engine, exc, select, text

from billing import tenants
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import tasks
from billing.tasks import FIRST_RETRY, LEASE, LONGEST_RETRY, Queue, Task
from tests.conftest import TestDatabase

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
KIND = "test.call"
THREADS = 8
MANY = 2000


@pytest.fixture
def acme(store: Store, settings: Settings) -> UUID:
    return register(store, settings, "Acme")


@pytest.fixture
def globex(store: Store, settings: Settings) -> UUID:
    return register(store, settings, "Globex")


def register(store: Store, settings: Settings, name: str) -> UUID:
    details = {"company_name": name, "email": f"ada@{name}.example"}
    with store.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW).tenant.id


def add(
    store: Store,
    tenant_id: UUID,
    *,
    due_at: datetime = NOW,
    id: UUID | None = None,
    subject: str = "-",
    queue: Queue = "general",
    now: datetime = NOW,
) -> UUID:
    task_id = id or new_id()
    with store.tenant(tenant_id) as tx:
        tx.tasks.add(KIND, task_id, subject=subject, due_at=due_at, now=now, queue=queue)
    return task_id


def take(store: Store, now: datetime = NOW, *, queue: Queue = "general", most: int = 100) -> list[Task]:
    return store.take_due(queue, now, most=most)


def rows_of(superuser: Engine, tenant_id: UUID) -> list[dict[str, Any]]:
    """The tasks of these tests only: registration adds others, due later."""
    ours = tasks.c.kind.startswith("test."), tasks.c.tenant_id == tenant_id
    query = select(tasks).where(*ours).order_by(tasks.c.id)
    with superuser.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


# Taking ------------------------------------------------------------------------------------------


def test_due_tasks_of_any_tenant_are_taken_with_all_their_fields(
    store: Store, acme: UUID, globex: UUID
) -> None:
    first = add(store, acme, due_at=NOW - timedelta(seconds=1), subject="acct_acme")
    second = add(store, globex, subject="acct_globex")

    assert take(store) == [
        Task(acme, KIND, first, "acct_acme", "general", NOW, attempts=1, revision=0),
        Task(globex, KIND, second, "acct_globex", "general", NOW, attempts=1, revision=0),
    ]


def test_no_task_is_taken_before_it_is_due(store: Store, acme: UUID) -> None:
    task_id = add(store, acme)

    assert take(store, NOW - timedelta(microseconds=1)) == []
    assert [task.id for task in take(store, NOW)] == [task_id]


def test_the_tasks_due_earliest_are_taken_first(store: Store, acme: UUID, globex: UUID) -> None:
    # In no order, neither of time nor of tenants.
    added = {
        step: add(store, (acme, globex)[step % 2], due_at=NOW - timedelta(seconds=step))
        for step in (3, 0, 4, 1, 5, 2)
    }

    assert {task.id for task in take(store, most=4)} == {added[step] for step in (5, 4, 3, 2)}
    assert {task.id for task in take(store, most=4)} == {added[step] for step in (1, 0)}


def test_a_task_added_again_and_postponed_goes_to_the_back(store: Store, acme: UUID, globex: UUID) -> None:
    first = add(store, acme, due_at=NOW - timedelta(hours=1))
    second = add(store, globex, due_at=NOW - timedelta(minutes=1))
    [task] = take(store, most=1)
    add(store, acme, id=first)  # Added again meanwhile, so it is due at once.
    postpone(store, task, NOW)

    assert [task.id for task in take(store, most=1)] == [second]


def test_a_task_added_again_and_finished_goes_to_the_back(store: Store, acme: UUID, globex: UUID) -> None:
    first = add(store, acme, due_at=NOW - timedelta(hours=1), now=NOW - timedelta(days=1))
    second = add(store, globex, due_at=NOW - timedelta(minutes=1))
    [task] = take(store, most=1)
    add(store, acme, id=first)
    finish(store, task)

    assert [task.id for task in take(store, most=1)] == [second]


def test_each_queue_is_taken_from_separately(store: Store, acme: UUID) -> None:
    general, hooks = add(store, acme), add(store, acme, queue="webhooks")

    assert take(store, queue="slow_webhooks") == []
    assert [task.id for task in take(store, queue="webhooks")] == [hooks]
    assert [task.id for task in take(store)] == [general]


def test_a_held_task_is_taken_again_only_when_its_lease_expires(store: Store, acme: UUID) -> None:
    task_id = add(store, acme)

    assert [task.attempts for task in take(store)] == [1]
    assert take(store, NOW + LEASE - timedelta(microseconds=1)) == []
    assert [(task.id, task.attempts) for task in take(store, NOW + LEASE)] == [(task_id, 2)]
    assert take(store, NOW + LEASE) == []


def test_a_task_that_another_worker_is_taking_is_skipped(
    store: Store, superuser: Engine, acme: UUID, globex: UUID
) -> None:
    being_taken, left = add(store, acme), add(store, globex)
    with superuser.begin() as connection:
        connection.execute(select(tasks).where(tasks.c.id == being_taken).with_for_update())
        assert [task.id for task in take(store)] == [left]
    assert [task.id for task in take(store)] == [being_taken]


def test_a_task_whose_taking_is_rolled_back_is_still_due(store: Store, acme: UUID, app: Engine) -> None:
    task_id = add(store, acme)
    with app.connect() as connection:
        assert len(connection.execute(TAKE, {"at": NOW}).all()) == 1

    assert [(task.id, task.attempts) for task in take(store)] == [(task_id, 1)]


def test_eight_workers_take_each_of_two_thousand_tasks_once(
    settings: Settings,
    test_database: TestDatabase,
    superuser: Engine,
    store: Store,
    acme: UUID,
    globex: UUID,
) -> None:
    wide = Store(Vault(settings.encryption_keys), connections=THREADS)
    wide.open(test_database.app_url)
    ids = [new_id() for _ in range(MANY)]
    fill(superuser, [((acme, globex)[number % 2], task_id, NOW) for number, task_id in enumerate(ids)])

    def work(_number: int) -> list[Task]:
        taken = []
        while some := take(wide, most=10):
            taken += some
        return taken

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            taken = [task for mine in pool.map(work, range(THREADS)) for task in mine]
    finally:
        wide.close()
    assert Counter(task.id for task in taken) == Counter(ids)
    assert {task.attempts for task in taken} == {1}


def fill(superuser: Engine, rows: list[tuple[UUID, UUID, datetime]]) -> None:
    """Add tasks by the thousand: tenant, id, time."""
    rest = {"kind": KIND, "subject": "-", "queue": "general", "created_at": NOW, "attempts": 0, "revision": 0}
    values = [dict(zip(("tenant_id", "id", "due_at"), row, strict=True)) | rest for row in rows]
    with superuser.begin() as connection:
        connection.execute(tasks.insert(), values)


# Finishing ---------------------------------------------------------------------------------------


def finish(store: Store, task: Task) -> None:
    with store.tenant(task.tenant_id) as tx:
        tx.tasks.finish(task)


def postpone(store: Store, task: Task, due_at: datetime, *, queue: Queue | None = None) -> None:
    with store.tenant(task.tenant_id) as tx:
        tx.tasks.postpone(task, due_at, queue=queue)


def test_a_finished_task_is_gone(store: Store, superuser: Engine, acme: UUID) -> None:
    add(store, acme)
    [task] = take(store)
    finish(store, task)

    assert rows_of(superuser, acme) == []


def test_a_postponed_task_is_taken_at_its_time_without_waiting_for_the_lease(
    store: Store, acme: UUID
) -> None:
    add(store, acme)
    [task] = take(store)
    postpone(store, task, NOW + timedelta(seconds=5))

    assert take(store, NOW + timedelta(seconds=4)) == []
    assert [again.attempts for again in take(store, NOW + timedelta(seconds=5))] == [2]


def test_a_postponed_task_may_change_its_queue(store: Store, acme: UUID) -> None:
    add(store, acme, queue="webhooks")
    [task] = take(store, queue="webhooks")
    postpone(store, task, NOW, queue="slow_webhooks")

    assert take(store, queue="webhooks") == []
    [failing] = take(store, queue="slow_webhooks")
    postpone(store, failing, NOW)
    assert [again.attempts for again in take(store, queue="slow_webhooks")] == [3]


def test_a_worker_that_lost_the_lease_changes_nothing(store: Store, superuser: Engine, acme: UUID) -> None:
    add(store, acme)
    [lost] = take(store)
    [held] = take(store, NOW + LEASE)
    before = rows_of(superuser, acme)
    finish(store, lost)
    postpone(store, lost, NOW, queue="webhooks")

    assert rows_of(superuser, acme) == before
    finish(store, held)
    assert rows_of(superuser, acme) == []


def test_a_worker_whose_task_was_dropped_and_added_anew_changes_nothing(
    store: Store, superuser: Engine, acme: UUID
) -> None:
    task_id = add(store, acme)
    [lost] = take(store)
    with store.tenant(acme) as tx:
        tx.tasks.drop(KIND, subject=lost.subject)
    add(store, acme, id=task_id, now=NOW + timedelta(seconds=1))
    take(store)
    before = rows_of(superuser, acme)
    finish(store, lost)
    postpone(store, lost, NOW)

    assert rows_of(superuser, acme) == before


def test_finishing_leaves_other_tasks_of_the_tenant(store: Store, acme: UUID) -> None:
    add(store, acme, due_at=NOW - timedelta(seconds=1))
    other = add(store, acme)
    [task] = take(store, most=1)
    finish(store, task)

    assert [left.id for left in take(store)] == [other]


@pytest.mark.parametrize(
    ("attempts", "pause"),
    [
        (1, FIRST_RETRY),
        (2, 2 * FIRST_RETRY),
        (3, 4 * FIRST_RETRY),
        (9, 256 * FIRST_RETRY),
        (10, LONGEST_RETRY),
        (18, LONGEST_RETRY),
        (2**31 - 1, LONGEST_RETRY),
    ],
)
def test_each_failure_doubles_the_pause(attempts: int, pause: timedelta) -> None:
    task = Task(new_id(), KIND, new_id(), "-", "general", NOW, attempts, revision=0)

    assert task.retry_at(NOW) == NOW + pause


# Adding and dropping -----------------------------------------------------------------------------


@pytest.mark.parametrize("again", [timedelta(hours=-1), timedelta(hours=1)])
def test_adding_a_task_again_keeps_the_earlier_due_time(
    store: Store, superuser: Engine, acme: UUID, again: timedelta
) -> None:
    task_id = add(store, acme, due_at=NOW)
    [before] = rows_of(superuser, acme)
    add(store, acme, id=task_id, due_at=NOW + again, subject="another", now=NOW + timedelta(minutes=1))

    due_at = min(NOW, NOW + again)
    assert rows_of(superuser, acme) == [before | {"due_at": due_at, "revision": 1}]


def test_adding_a_held_task_again_does_not_release_it(store: Store, acme: UUID) -> None:
    task_id = add(store, acme)
    [first] = take(store)
    add(store, acme, id=task_id)

    assert take(store) == []
    finish(store, first)
    assert [(task.id, task.attempts) for task in take(store)] == [(task_id, 2)]


def test_a_held_task_that_was_added_again_is_not_postponed(store: Store, acme: UUID) -> None:
    task_id = add(store, acme)
    [first] = take(store)
    add(store, acme, id=task_id)
    postpone(store, first, NOW + timedelta(hours=1))

    [second] = take(store)
    postpone(store, second, NOW + timedelta(hours=1))
    assert take(store, NOW + timedelta(minutes=59)) == []


def test_two_kinds_and_two_tenants_may_share_an_id(store: Store, acme: UUID, globex: UUID) -> None:
    task_id = add(store, acme)
    add(store, globex, id=task_id)
    with store.tenant(acme) as tx:
        tx.tasks.add("test.other", task_id, subject="-", due_at=NOW, now=NOW)

    taken = take(store)
    assert {(task.tenant_id, task.kind) for task in taken} == {
        (acme, KIND),
        (acme, "test.other"),
        (globex, KIND),
    }
    assert {task.attempts for task in taken} == {1}


def test_dropping_removes_every_task_of_a_kind_and_subject(store: Store, acme: UUID, globex: UUID) -> None:
    for _ in range(2):
        add(store, acme, subject="acct_1")
    kept = {add(store, acme, subject="acct_2"), add(store, globex, subject="acct_1")}
    with store.tenant(acme) as tx:
        tx.tasks.add("test.other", new_id(), subject="acct_1", due_at=NOW, now=NOW)
        tx.tasks.drop(KIND, subject="acct_1")

    taken = take(store)
    assert {task.id for task in taken if task.kind == KIND} == kept
    assert [task.subject for task in taken if task.kind == "test.other"] == ["acct_1"]


def test_a_held_task_that_was_dropped_is_not_restored(store: Store, superuser: Engine, acme: UUID) -> None:
    add(store, acme)
    [task] = take(store)
    with store.tenant(acme) as tx:
        tx.tasks.drop(KIND, subject=task.subject)
        tx.tasks.postpone(task, NOW)
        tx.tasks.finish(task)
    assert rows_of(superuser, acme) == []


def test_a_task_whose_adding_is_rolled_back_is_not_taken(store: Store, acme: UUID) -> None:
    with pytest.raises(ZeroDivisionError), store.tenant(acme) as tx:
        tx.tasks.add(KIND, new_id(), subject="-", due_at=NOW, now=NOW)
        raise ZeroDivisionError

    assert take(store) == []


# Privileges --------------------------------------------------------------------------------------

TAKE = text("SELECT * FROM app.take_tasks('general', :at, :at + interval '1 minute', 10)")


@pytest.fixture
def app(test_database: TestDatabase) -> Iterator[Engine]:
    engine = create_engine(test_database.app_url)
    yield engine
    engine.dispose()


def become(connection: Connection, tenant_id: UUID) -> None:
    connection.execute(text("SELECT set_config('app.tenant_id', :id, true)"), {"id": str(tenant_id)})


def test_taking_is_the_applications_only_access_across_tenants(
    store: Store, superuser: Engine, app: Engine, acme: UUID, globex: UUID
) -> None:
    add(store, acme)
    before = rows_of(superuser, acme)
    for tenant_id in (None, globex):
        with app.begin() as connection:
            if tenant_id:
                become(connection, tenant_id)
            assert {row.tenant_id for row in connection.execute(select(tasks))} <= {tenant_id}
            connection.execute(tasks.update().values(attempts=7))
            connection.execute(tasks.delete())
    assert rows_of(superuser, acme) == before
    with app.begin() as connection:
        assert [row.tenant_id for row in connection.execute(TAKE, {"at": NOW})] == [acme]


def test_a_task_cannot_be_added_for_another_tenant_nor_moved_there(
    store: Store, app: Engine, acme: UUID, globex: UUID
) -> None:
    add(store, globex)
    copy = "SELECT :tenant, kind, :id, subject, queue, created_at, due_at FROM tasks"
    for statement in (
        f"INSERT INTO tasks (tenant_id, kind, id, subject, queue, created_at, due_at) {copy}",
        "UPDATE tasks SET tenant_id = :tenant, id = :id",
    ):
        with app.connect() as connection:
            become(connection, globex)
            with pytest.raises(exc.ProgrammingError, match="row-level security"):
                connection.execute(text(statement), {"tenant": acme, "id": new_id()})


def test_another_tenants_task_cannot_be_changed_even_when_known(
    store: Store, superuser: Engine, acme: UUID, globex: UUID
) -> None:
    add(store, acme)
    [task] = take(store)
    before = rows_of(superuser, acme)
    with store.tenant(globex) as tx:
        tx.tasks.finish(task)
        tx.tasks.postpone(task, NOW)
        tx.tasks.drop(task.kind, subject=task.subject)
    assert rows_of(superuser, acme) == before


def test_take_tasks_runs_as_the_lookup_role_and_only_the_application_may_call_it(
    superuser: Engine,
) -> None:
    query = text(
        "SELECT proowner::regrole::text AS owner, prosecdef, proconfig, "
        "ARRAY(SELECT grantee::regrole::text FROM aclexplode(proacl) ORDER BY 1) AS may "
        "FROM pg_proc WHERE oid = 'app.take_tasks'::regproc"
    )
    with superuser.connect() as connection:
        function = connection.execute(query).one()

    assert (function.owner, function.prosecdef) == ("billing_lookup", True)
    assert function.proconfig == ["search_path=pg_catalog, pg_temp"]
    # PUBLIC would be "-".
    assert function.may == ["billing_app", "billing_lookup"]


def test_another_role_may_not_take_tasks_even_with_access_to_the_schema(superuser: Engine) -> None:
    role = f"somebody_{new_id().hex}"
    with superuser.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA app TO {role}")
        connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
        with pytest.raises(exc.ProgrammingError, match="permission denied for function take_tasks"):
            connection.execute(TAKE, {"at": NOW})
        connection.rollback()


def test_the_lookup_role_has_only_the_privileges_its_functions_need(superuser: Engine) -> None:
    tables = text(
        "SELECT c.oid::regclass::text, a.privilege_type FROM pg_class c, aclexplode(c.relacl) a "
        "WHERE a.grantee = 'billing_lookup'::regrole"
    )
    columns = text(
        "SELECT c.attrelid::regclass || '.' || c.attname, a.privilege_type "
        "FROM pg_attribute c, aclexplode(c.attacl) a WHERE a.grantee = 'billing_lookup'::regrole"
    )
    owned = text("SELECT count(*) FROM pg_class WHERE relowner = 'billing_lookup'::regrole")
    with superuser.connect() as connection:
        granted = {tuple(row) for query in (tables, columns) for row in connection.execute(query)}
        assert connection.scalar(owned) == 0

    assert granted == {
        ("directory", "SELECT"),
        ("idempotency_keys", "DELETE"),
        ("idempotency_keys.tenant_id", "SELECT"),
        ("idempotency_keys.name", "SELECT"),
        ("idempotency_keys.expires_at", "SELECT"),
        ("idempotency_keys.expires_at", "UPDATE"),
        ("tasks", "SELECT"),
        ("tasks.leased_until", "UPDATE"),
        ("tasks.attempts", "UPDATE"),
        ("tasks.due_at", "UPDATE"),
        # To count the backlog.
        *((f"deliveries.{column}", "SELECT") for column in ("tenant_id", "status", "next_attempt_at")),
        *((f"webhook_endpoints.{column}", "SELECT") for column in ("tenant_id", "url", "disabled_reason")),
        ("webhook_endpoints.failing_since", "SELECT"),
        # To advance the head of an audit log to its next row.
        ("audit_heads", "SELECT"),
        ("audit_heads", "INSERT"),
        *((f"audit_heads.{column}", "UPDATE") for column in ("sequence", "hash")),
        *((f"audit_log.{column}", "SELECT") for column in ("tenant_id", "sequence", "hash")),
    }


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM tenants",
        "SELECT * FROM users",
        "SELECT * FROM stripe_connections",
        "SELECT * FROM events",
        "SELECT event_type FROM deliveries",
        "UPDATE deliveries SET status = status",
        "UPDATE tasks SET tenant_id = tenant_id",
        "UPDATE tasks SET subject = ''",
        "UPDATE tasks SET revision = revision",
        "DELETE FROM tasks",
        "TRUNCATE tasks",
        "INSERT INTO tasks SELECT * FROM tasks",
        "DELETE FROM directory",
        "SELECT answer FROM idempotency_keys",
        "UPDATE idempotency_keys SET answer = NULL",
        "CREATE FUNCTION app.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_the_lookup_role_may_not_execute(superuser: Engine, statement: str) -> None:
    with superuser.connect() as connection:
        connection.exec_driver_sql("SET LOCAL ROLE billing_lookup")
        with pytest.raises(exc.ProgrammingError, match="permission denied"):
            connection.exec_driver_sql(statement)
