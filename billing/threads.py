"""Threads that do one piece of work after another, and that a process does not wait for when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread
from typing import TypeAlias

# After which a thread that has nothing to do ends.
IDLE_SECONDS = 10

# It raises nothing. What it returns is called when its thread is free for the next.
Work: TypeAlias = Callable[[], Callable[[], object]]


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
        tell = work()
        # In this order who is told finds a thread idle.
        self._idle.release()
        tell()
        return True

    def _next(self) -> Work | None:
        while True:
            with suppress(Empty):
                return self._work.get(timeout=IDLE_SECONDS)
            if self._idle.acquire(blocking=False):
                return None
