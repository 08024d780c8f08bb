"""The worker: takes due tasks of its queue, of any tenant, and does them in threads; any number may run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import structlog

from billing import crashes, metrics, tracing
from billing.clock import Clock
from billing.errors import DatabaseUnavailable
from billing.storage.store import Store
from billing.tasks import Queue, Task

# While the database is down it is polled less often.
PATIENCE_SECONDS = 2.0

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.worker")

Job = Callable[[Task], None]


class Worker:
    """Does the tasks of one queue, each by the job of its kind.

    A task that fails, or whose worker is killed, is retried when its lease ends: every job can be repeated.
    """

    def __init__(
        self,
        store: Store,
        jobs: Mapping[str, Job],
        clock: Clock,
        *,
        threads: int,
        queue: Queue = "general",
        polled_every_seconds: float = 0.5,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._clock = clock
        self._threads = threads
        self._queue = queue
        self._polled_every_seconds = polled_every_seconds
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Take nothing more; `run` returns when what was begun is done."""
        self._stopping.set()

    def run(self) -> None:
        """Work until `stop`."""
        busy: dict[Future[None], Task] = {}
        try:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="task") as pool:
                while not self._stopping.is_set():
                    taken = self.take(self._threads - len(busy))
                    for task in taken:
                        busy[pool.submit(self.do, task)] = task
                    for future in self._done(busy, nothing_taken=not taken):
                        report(busy.pop(future), future.exception())
        finally:
            for future, task in busy.items():
                report(task, future.exception())

    def _done(self, busy: Collection[Future[None]], *, nothing_taken: bool) -> set[Future[None]]:
        """The tasks that have ended; waits up to a poll for one if all threads are busy or none was due."""
        if not busy:
            self._stopping.wait(self._polled_every_seconds)
        is_full = len(busy) == self._threads
        timeout = self._polled_every_seconds if nothing_taken or is_full else 0
        return wait(busy, timeout=timeout, return_when=FIRST_COMPLETED).done

    def take(self, most: int) -> list[Task]:
        """Take tasks that are due, as many as can be begun; none while the database is down."""
        if most == 0:
            return []
        try:
            taken = self._store.take_due(self._queue, self._clock(), most=most)
        except DatabaseUnavailable as error:
            log.warning(error.code(), cause=type(error.__cause__).__name__)
            self._stopping.wait(PATIENCE_SECONDS)
            return []
        metrics.POLLED.set(time.time(), self._queue)
        return taken

    def do(self, task: Task) -> None:
        """Do one task, by the job of its kind."""
        started = time.perf_counter()
        try:
            with structlog.contextvars.bound_contextvars(**named(task)), span_of(task):
                self._jobs[task.kind](task)
        finally:
            metrics.TASK_SECONDS.observe(time.perf_counter() - started, task.kind)


def span_of(task: Task) -> AbstractContextManager[object]:
    """The span of a task, the root of a trace of its own."""
    attributes: tracing.Attributes = {
        "billing.tenant_id": str(task.tenant_id),
        "billing.task_id": str(task.id),
        "billing.attempts": task.attempts,
    }
    return tracing.span(f"task {task.kind}", "consumer", attributes)


def named(task: Task) -> dict[str, str]:
    """The log fields that identify a task."""
    return {"task": task.kind, "task_id": str(task.id), "tenant_id": str(task.tenant_id)}


def report(task: Task, error: BaseException | None) -> None:
    """Count a task that has ended, and log its error, if any. A failed one is retried; the others go on."""
    metrics.TASKS.count(task.kind, "done" if error is None else "failed")
    whose = {**named(task), "attempts": task.attempts}
    if isinstance(error, DatabaseUnavailable):
        log.warning("a task waits for the database", cause=type(error.__cause__).__name__, **whose)
    elif error is not None:
        log.error("a task failed", exc_info=error, **whose)
        crashes.report(error, **named(task))
