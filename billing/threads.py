"""Reusable threads, which a process does not wait for when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread, main_thread
from typing import TypeAlias

import structlog

# An idle thread ends after this time.
IDLE_SECONDS = 10

# It raises nothing. What it returns is called once its thread is free for the next work.
Work: TypeAlias = Callable[[], Callable[[], object]]

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


class Threads:
    """As many threads as there is work at once, which callers must bound.

    A ThreadPoolExecutor, whatever its settings, makes the process wait at exit for threads that hang.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # One permit per idle thread. Whoever brings work takes one; if there is none, a thread is started.
        self._idle = Semaphore(0)
        self._work = SimpleQueue[Work]()

    def start(self, work: Work) -> None:
        """Do this at once in a thread; raises RuntimeError, and does nothing, where none can be started."""
        if not self._idle.acquire(blocking=False):
            Thread(target=self._run, name=self._name, daemon=True).start()
        self._work.put(work)

    def _run(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Do the next work; False if none came for `IDLE_SECONDS`."""
        work = self._next()
        if work is None:
            return False
        announce = work()
        # In this order whoever is notified finds a thread idle.
        self._idle.release()
        announce()
        return True

    def _next(self) -> Work | None:
        while True:
            with suppress(Empty):
                return self._work.get(timeout=IDLE_SECONDS)
            if self._idle.acquire(blocking=False):
                return None


def end_with_main_thread(patience_seconds: float) -> None:
    """Have the process end at most so long after its main thread, even if other threads still run.

    Python waits for anyio's threads, which make connections and do the last things, and one that hangs would
    keep a drained server from ending.
    """

    def end() -> None:
        main_thread().join()
        time.sleep(patience_seconds)
        log.error("a thread did not end: the process ends without it")
        os._exit(1)  # the only exit that waits for no thread

    Thread(target=end, name="end", daemon=True).start()
