"""The worker: runs due tasks, whatever else fails, and stops when the running ones are done."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, select, text

from billing import logs, tenants, worker
from billing.encryption import Vault
from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.driver import StorageError
from billing.storage.store import Store
from billing.storage.tables import tasks
from billing.tasks import LEASE, Queue, Task
from billing.worker import Job, Worker
from tests.clock import TurnedClock
from tests.conftest import TestDatabase
from tests.test_logs import restored

__all__ = ["restored"]

PATIENCE_SECONDS = 20
THREADS = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the worker notice soon that the database is back."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.05)


@pytest.fixture
def acme(store: Store, settings: Settings) -> UUID:
    return register(store, settings, "Acme")


def register(store: Store, settings: Settings, name: str) -> UUID:
    details = {"company_name": name, "email": f"ada@{name}.example"}
    with store.tenant(new_id()) as tx:
        digests = KeyDigests(settings.key_peppers)
        now = datetime.now(UTC)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=now).tenant.id


class Bench:
    """A worker's store and clock, and the tasks left there."""

    def __init__(self, store: Store, clock: TurnedClock, tenant_id: UUID) -> None:
        self.store = store
        self.clock = clock
        self.tenant_id = tenant_id

    def add(
        self, kind: str, subject: str = "-", *, queue: Queue = "general", tenant_id: UUID | None = None
    ) -> None:
        with self.store.tenant(tenant_id or self.tenant_id) as tx:
            tx.tasks.add(kind, new_id(), subject=subject, due_at=self.clock(), now=self.clock(), queue=queue)

    def finish(self, task: Task) -> None:
        with self.store.tenant(task.tenant_id) as tx:
            tx.tasks.finish(task)

    def left(self) -> list[str]:
        """The subjects of the tasks still to be done."""
        with self.store.tenant(self.tenant_id) as tx:
            ours = select(tasks.c.subject).where(tasks.c.kind.startswith("test."))
            return list(tx.tasks._connection.scalars(ours.order_by(tasks.c.subject)))

    @contextmanager
    def working(self, jobs: dict[str, Job], *, threads: int = THREADS, **more: Any) -> Iterator[Worker]:
        """A worker that runs during the block, and has stopped after it."""
        worker = Worker(
            self.store, jobs, self.clock, threads=threads, **{"polled_every_seconds": 0.02, **more}
        )
        runner = threading.Thread(target=worker.run)
        runner.start()
        try:
            yield worker
        finally:
            worker.stop()
            runner.join(PATIENCE_SECONDS)
        assert not runner.is_alive()


@pytest.fixture
def bench(settings: Settings, test_database: TestDatabase, store: Store, acme: UUID) -> Iterator[Bench]:
    wide = Store(Vault(settings.encryption_keys), connections=3 * THREADS)
    wide.open(test_database.app_url)
    yield Bench(wide, TurnedClock(), acme)
    wide.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "It never came about."
        time.sleep(0.01)


# Due tasks ---------------------------------------------------------------------------------------


def test_each_due_task_runs_once_by_the_job_of_its_kind(
    bench: Bench, store: Store, settings: Settings
) -> None:
    globex = register(store, settings, "Globex")
    done: list[tuple[str, UUID, str]] = []

    def job(name: str) -> Job:
        def do(task: Task) -> None:
            done.append((name, task.tenant_id, task.subject))
            bench.finish(task)

        return do

    bench.add("test.one", "a")
    with bench.working({"test.one": job("one"), "test.two": job("two")}):
        eventually(lambda: len(done) == 1)
        # Tasks added while it runs, too.
        bench.add("test.two", "b")
        bench.add("test.one", "c", tenant_id=globex)
        eventually(lambda: len(done) == 3)
        eventually(lambda: bench.left() == [])

    assert set(done) == {
        ("one", bench.tenant_id, "a"),
        ("two", bench.tenant_id, "b"),
        ("one", globex, "c"),
    }


def test_no_task_runs_before_it_is_due(bench: Bench) -> None:
    done: list[str] = []

    def do(task: Task) -> None:
        done.append(task.subject)
        bench.finish(task)

    with bench.store.tenant(bench.tenant_id) as tx:
        later = bench.clock() + LEASE
        tx.tasks.add("test.call", new_id(), subject="later", due_at=later, now=bench.clock())
    with bench.working({"test.call": do}):
        bench.add("test.call", "now")
        eventually(lambda: done == ["now"])
        # Otherwise turning the clock would end the lease of an unfinished task.
        eventually(lambda: bench.left() == ["later"])
        bench.clock.turn(seconds=LEASE.total_seconds())
        eventually(lambda: done == ["now", "later"])


def test_a_worker_runs_only_the_tasks_of_its_queue(bench: Bench) -> None:
    bench.add("test.call", "general")
    bench.add("test.call", "webhooks", queue="webhooks")
    with bench.working({"test.call": bench.finish}, queue="webhooks"):
        eventually(lambda: bench.left() == ["general"])
    assert bench.left() == ["general"]


def test_two_workers_run_each_task_once(bench: Bench) -> None:
    done: list[str] = []

    def do(task: Task) -> None:
        done.append(task.subject)
        bench.finish(task)

    subjects = [f"{number:02}" for number in range(40)]
    with bench.working({"test.call": do}), bench.working({"test.call": do}):
        for subject in subjects:
            bench.add("test.call", subject)
        eventually(lambda: bench.left() == [])

    assert sorted(done) == subjects


# Failures ----------------------------------------------------------------------------------------

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(restored: None, capsys: pytest.CaptureFixture[str]) -> Lines:
    """The events logged as JSON, up to now. While the worker runs one may be missed."""
    logs.configure(tty=False)
    said: list[str] = []

    def lines() -> list[dict[str, Any]]:
        said.extend(capsys.readouterr().err.splitlines())
        return [json.loads(line) for line in said]

    return lines


def test_a_failed_task_is_logged_once_without_secrets_and_retried(bench: Bench, lines: Lines) -> None:
    secret = f"sk_live_{secrets.token_hex(16)}"
    attempts: list[int] = []

    def fail_at_first(task: Task) -> None:
        attempts.append(task.attempts)
        if task.attempts == 1:
            raise ValueError(f"refused with {secret}")
        bench.finish(task)

    bench.add("test.fails", "fails")
    bench.add("test.works", "works")
    with bench.working({"test.fails": fail_at_first, "test.works": bench.finish}):
        eventually(lambda: bench.left() == ["fails"])
        bench.add("test.works", "works after it")
        eventually(lambda: bench.left() == ["fails"])
        eventually(lambda: attempts == [1])

        bench.clock.turn(seconds=LEASE.total_seconds())
        eventually(lambda: bench.left() == [])

    assert attempts == [1, 2]
    [failure] = failures(lines())
    assert failure["level"] == "error"
    assert "ValueError" in failure["exception"]
    assert secret not in json.dumps(lines())


def failures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "a task failed"]


def test_a_task_of_an_unknown_kind_does_not_stop_others(
    bench: Bench, superuser: Engine, lines: Lines
) -> None:
    bench.add("test.unknown", "unknown")
    bench.add("test.works", "works")
    with bench.working({"test.works": bench.finish}):
        eventually(lambda: bench.left() == ["unknown"])
        eventually(lambda: tries(superuser) == 1)

    assert len(failures(lines())) == 1


def tries(superuser: Engine) -> int | None:
    query = select(tasks.c.attempts).where(tasks.c.kind.startswith("test."))
    with superuser.connect() as connection:
        return connection.scalar(query)


def test_a_task_without_a_database_is_retried_without_a_traceback(
    bench: Bench, superuser: Engine, lines: Lines
) -> None:
    def fail_at_first(task: Task) -> None:
        if task.attempts == 1:
            raise DatabaseUnavailable
        bench.finish(task)

    bench.add("test.call")
    with bench.working({"test.call": fail_at_first}):
        eventually(lambda: tries(superuser) == 1)
        bench.clock.turn(seconds=LEASE.total_seconds())
        eventually(lambda: bench.left() == [])

    assert [line["event"] for line in lines()] == ["a task waits for the database"]
    assert not any("exception" in line for line in lines())


# Threads -----------------------------------------------------------------------------------------


class Gate:
    """A job that does not end until the gate is opened."""

    def __init__(self, bench: Bench) -> None:
        self.inside = 0
        self.most_inside = 0
        self._bench = bench
        self._open = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, task: Task) -> None:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
        assert self._open.wait(PATIENCE_SECONDS)
        self._bench.finish(task)
        with self._lock:
            self.inside -= 1

    def open(self) -> None:
        self._open.set()


def test_slow_tasks_do_not_block_others_while_a_thread_is_free(bench: Bench) -> None:
    gate = Gate(bench)
    for number in range(THREADS - 1):
        bench.add("test.slow", f"slow {number}")
    with bench.working({"test.slow": gate, "test.quick": bench.finish}):
        eventually(lambda: gate.inside == THREADS - 1)
        for number in range(5):
            bench.add("test.quick", f"quick {number}")
        eventually(lambda: bench.left() == [f"slow {number}" for number in range(THREADS - 1)])
        assert gate.inside == THREADS - 1
        gate.open()
        eventually(lambda: bench.left() == [])


def test_a_worker_takes_no_more_tasks_than_it_has_threads(bench: Bench, superuser: Engine) -> None:
    gate = Gate(bench)
    for number in range(2 * THREADS):
        bench.add("test.slow", f"slow {number}")
    with bench.working({"test.slow": gate}):
        eventually(lambda: gate.inside == THREADS)
        # The rest is left for other workers.
        time.sleep(0.1)
        with superuser.connect() as connection:
            taken = select(tasks).where(tasks.c.kind == "test.slow", tasks.c.attempts > 0)
            assert len(connection.execute(taken).all()) == THREADS
        gate.open()
        eventually(lambda: bench.left() == [])
    assert gate.most_inside == THREADS


def test_a_task_due_when_another_ends_is_taken_at_once(bench: Bench) -> None:
    asked = threading.Event()
    take = bench.store.take_due

    def ask(*given: Any, **more: Any) -> list[Task]:
        taken = take(*given, **more)
        if not taken:
            asked.set()
        return taken

    def lead(task: Task) -> None:
        asked.wait(PATIENCE_SECONDS)
        bench.add("test.last", "last")
        bench.finish(task)

    bench.store.take_due = ask  # type: ignore[method-assign]
    bench.add("test.first", "first")
    with bench.working({"test.first": lead, "test.last": bench.finish}, polled_every_seconds=600):
        eventually(lambda: bench.left() == [])


def test_stop_waits_for_running_tasks_and_takes_no_more(bench: Bench) -> None:
    gate = Gate(bench)
    bench.add("test.slow", "begun")
    worker = Worker(bench.store, {"test.slow": gate}, bench.clock, threads=THREADS)
    runner = threading.Thread(target=worker.run)
    runner.start()
    try:
        eventually(lambda: gate.inside == 1)
        worker.stop()
        bench.add("test.slow", "too late")
        runner.join(0.2)
        assert runner.is_alive()
    finally:
        gate.open()
        runner.join(PATIENCE_SECONDS)
    assert not runner.is_alive()
    assert bench.left() == ["too late"]


def test_a_failure_after_stop_is_logged(bench: Bench, lines: Lines) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fail_late(_: Task) -> None:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)
        raise ValueError

    bench.add("test.late")
    with bench.working({"test.late": fail_late}) as worker:
        assert begun.wait(PATIENCE_SECONDS)
        worker.stop()
        time.sleep(0.1)  # The worker looks for ended tasks a last time.
        go_on.set()
    assert [failure["task"] for failure in failures(lines())] == ["test.late"]


def test_a_tasks_failure_is_logged_while_the_worker_itself_fails(bench: Bench, lines: Lines) -> None:
    begun, has_failed = threading.Event(), threading.Event()
    take = bench.store.take_due

    def fail(*given: Any, **more: Any) -> list[Task]:
        if begun.is_set():
            has_failed.set()
            raise StorageError
        return take(*given, **more)

    def fail_late(_: Task) -> None:
        begun.set()
        has_failed.wait(PATIENCE_SECONDS)
        raise ValueError

    bench.store.take_due = fail  # type: ignore[method-assign]
    bench.add("test.late")
    worker = Worker(bench.store, {"test.late": fail_late}, bench.clock, threads=THREADS)
    with pytest.raises(StorageError):
        worker.run()
    assert [failure["task"] for failure in failures(lines())] == ["test.late"]


def test_a_worker_stopped_before_it_runs_takes_no_task(bench: Bench) -> None:
    bench.add("test.call", "left")
    worker = Worker(bench.store, {"test.call": bench.finish}, bench.clock, threads=THREADS)
    worker.stop()
    worker.run()

    assert bench.left() == ["left"]


# Without the database ----------------------------------------------------------------------------


@contextmanager
def away(test_database: TestDatabase) -> Iterator[None]:
    """The application's connections are cut, and new ones refused."""
    engine = create_engine(test_database.superuser_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        # The limit is for all but superusers.
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
        try:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND usename = 'billing_app'"
                )
            )
            yield
        finally:
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')
    engine.dispose()


def test_the_worker_continues_when_the_database_is_back(
    bench: Bench, test_database: TestDatabase, lines: Lines
) -> None:
    done: list[str] = []

    def do(task: Task) -> None:
        bench.finish(task)
        done.append(task.subject)

    with bench.working({"test.call": do}):
        bench.add("test.call", "before")
        eventually(lambda: done == ["before"])
        with away(test_database):
            eventually(lambda: len(unavailable(lines())) > 1)
        bench.add("test.call", "after")
        eventually(lambda: done == ["before", "after"])

    assert all("password" not in json.dumps(line) and "exception" not in line for line in lines())


def test_the_worker_stops_while_the_database_is_away(
    bench: Bench, test_database: TestDatabase, lines: Lines
) -> None:
    with bench.working({}) as worker, away(test_database):
        eventually(lambda: len(unavailable(lines())) > 0)
        worker.stop()


def test_a_wrong_database_address_is_retried_until_corrected(
    bench: Bench, test_database: TestDatabase, lines: Lines
) -> None:
    bench.add("test.call")
    bench.store.close()
    bench.store.open("postgresql+psycopg2://billing_app:hunter2@127.0.0.1:1/billing")
    with bench.working({"test.call": bench.finish}):
        eventually(lambda: len(unavailable(lines())) > 1)
        bench.store.open(test_database.app_url)
        eventually(lambda: bench.left() == [])

    assert "hunter2" not in json.dumps(lines())


def unavailable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == DatabaseUnavailable.code()]
