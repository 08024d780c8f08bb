"""Cuts a connection whose answer is overdue, as a server process that was stopped (SIGSTOP) would never answer.

PostgreSQL enforces `statement_timeout` itself, and the kernel notices a machine that is gone. Neither covers a process
that was stopped, or a COMMIT that waits for a standby: libpq would wait on, and block one of our threads.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from threading import Event, Lock, Thread
from weakref import WeakSet

import structlog

# Longer than PostgreSQL's own statement_timeout and the round trip. A message may hold several statements: together
# they have no longer.
STATEMENT_SECONDS = 8.0
LOOKS = 16  # Within that time.
NEVER = float("inf")

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.storage")


class Watchdog:
    """Cuts those of its connections whose answer is overdue, with one thread for all of them."""

    def __init__(self, seconds: float = STATEMENT_SECONDS) -> None:
        self._seconds = seconds
        self._lock = Lock()
        self._watched: WeakSet[WatchedSocket] = WeakSet()
        self._thread: Thread | None = None
        self._closing = Event()

    def close(self) -> None:
        """End the thread, as soon as no answer is waited for."""
        self._closing.set()

    def watch(self, descriptor: int) -> WatchedSocket:
        """Watch a connection; the caller tells by `with` blocks when an answer is waited for."""
        watched = WatchedSocket(descriptor, self._seconds)
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                thread = Thread(target=self._run, name="statements", daemon=True)
                thread.start()
                self._thread = thread
        return watched

    def _run(self) -> None:
        while self._cut_overdue() or not self._closing.is_set():
            time.sleep(self._seconds / LOOKS)

    def _cut_overdue(self) -> bool:
        """Cut the overdue connections; returns whether any answer is waited for."""
        now = time.monotonic()
        with self._lock:
            busy = [watched for watched in self._watched if watched.overdue_at < NEVER]
        for watched in busy:
            if watched.overdue_at < now:
                watched.cut()
        return bool(busy)


class WatchedSocket:
    """The socket under a connection, and the deadline for an answer on it. A `with` block is one message."""

    def __init__(self, descriptor: int, seconds: float) -> None:
        self.overdue_at = NEVER
        self._seconds = seconds
        self._lock = Lock()
        # A descriptor of our own for the same socket: libpq closes its own at an error, and the number may then be
        # another file's.
        self._socket: socket.socket | None = socket.socket(fileno=os.dup(descriptor))

    def __enter__(self) -> None:
        self.overdue_at = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        self.overdue_at = NEVER

    def __del__(self) -> None:
        self.close()

    def cut(self) -> None:
        """Shut the connection down; the thread that waits for its answer gets an `OperationalError`."""
        with self._lock:
            if self._socket is None or self.overdue_at > time.monotonic():  # It was answered just now.
                return
            log.warning("a statement took too long: its connection is cut", seconds=self._seconds)
            self.overdue_at = NEVER
            with suppress(OSError):  # The other side may have ended it.
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
