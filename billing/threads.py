"""Threads that do one piece of work after another, and that a process does not wait for when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread, main_thread
from typing import TypeAlias

import structlog

# After which a thread that has nothing to do ends.
IDLE_SECONDS = 10

# It raises nothing. What it returns is called when its thread is free for the next.
Work: TypeAlias = Callable[[], Callable[[], object]]

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


class Threads:
    """As many as there is work at once; how much that may be is for whoever brings it to say.

    A ThreadPoolExecutor, whatever it is told, has the process wait at its end for what hangs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # One for each thread that waits for work. Who has taken one brings some; who has not starts a thread.
        self._idle = Semaphore(0)
        self._work = SimpleQueue[Work]()

    def start(self, work: Work) -> None:
        """Have this done at once; raises RuntimeError, and does nothing, where the machine has no more threads."""
        if not self._idle.acquire(blocking=False):
            Thread(target=self._run, name=self._name, daemon=True).start()
        self._work.put(work)

    def _run(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Do what comes next; whether there was anything for a while."""
        work = self._next()
        if work is None:
            return False
        announce = work()
        # In this order who is told finds a thread idle.
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
    """Have the process end when its main thread has, even if others go on for longer than this.

    Python waits for anyio's, which make connections and do the last things, and one that hangs would keep a server
    that has drained from ending.
    """

    def end() -> None:
        main_thread().join()
        time.sleep(patience_seconds)
        log.error("a thread did not end: the process ends without it")
        os._exit(1)  # the one that waits for no thread

    Thread(target=end, name="end", daemon=True).start()
