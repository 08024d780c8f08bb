"""`billing worker`: what is done beside requests, in a process of its own or as the companion of `billing serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

import click
import structlog

from billing import stripe_connect
from billing.cli.console import done, opened_store
from billing.clock import utc_now
from billing.connections import connections_of
from billing.http import logs
from billing.settings import Settings
from billing.storage.store import Store
from billing.worker import Job, Worker

THREADS = 8
# A task may ask Stripe twice, eight seconds each.
END_SECONDS = 20
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.worker")


@click.command()
@click.option("--while-stdin-is-open", "follow", is_flag=True, hidden=True)
def worker(*, follow: bool) -> None:
    """Do what is done beside requests, until Ctrl-C or SIGTERM.

    It tells Stripe of disconnections and looks after connected accounts. `billing serve` runs one beside the
    API; any number may run, on any number of machines.

    \b
    Example:
      billing serve --no-worker
      billing worker
    """
    logs.configure(tty=sys.stderr.isatty())
    with opened_store(connections=THREADS + 1) as (settings, store):
        work = Worker(store, jobs(settings, store), utc_now, threads=THREADS)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: work.stop())
        if follow:
            threading.Thread(target=stop_at_end_of_input, args=(work,), daemon=True).start()
        else:
            done("The worker is running. Ctrl-C stops.")
        work.run()


def jobs(settings: Settings, store: Store) -> dict[str, Job]:
    """What is done for each kind of task."""
    connections = connections_of(settings, store, utc_now)
    return {
        stripe_connect.CHECK: connections.check,
        stripe_connect.DEAUTHORIZE: connections.deauthorize,
    }


def stop_at_end_of_input(work: Worker) -> None:
    """Stop when whoever started us closes our stdin, which the kernel does for one who was killed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    work.stop()


class Companion:
    """A `billing worker` that lives as long as the block, and is started again if it ends before."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._keep_running, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._watcher.join(END_SECONDS)
        if self._process is not None:
            self._process.kill()

    def _keep_running(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "billing.cli", "worker", "--while-stdin-is-open"],
                stdin=subprocess.PIPE,
            )
            self._process.wait()
            if not self._stopping.is_set():
                log.error("the worker ended, and is started again", exit_code=self._process.returncode)
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
