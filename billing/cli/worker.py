"""`billing worker`: runs background tasks, in a process of its own or as the companion of `billing serve`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import click

from billing import crashes, keys, logs, stripe_connect, tenants, tracing
from billing.assembly import begin_telemetry, dispatcher_for, stripe_connections_for
from billing.cli.console import allow_descriptors, done, opened_store
from billing.cli.watchers import worker_metrics
from billing.clock import utc_now
from billing.housekeeping import Housekeeping
from billing.settings import Settings
from billing.storage.store import Store
from billing.webhooks.delivery import DELIVER
from billing.worker import Job, Worker

GENERAL_THREADS = 8
CHECKING_THREADS = 8
# One thread per endpoint, and further ones for the attempts in flight to it. Nearly all of them wait.
ENDPOINT_THREADS = 128
SENDING_THREADS = 512
SLOW_THREADS = 32
# Shared by the threads, which are in a transaction for only a few milliseconds at a time.
CONNECTIONS = 16
AWAKE_EVERY_SECONDS = 0.2


@click.command()
@click.option("--while-stdin-is-open", "follow", is_flag=True, hidden=True)
def worker(*, follow: bool) -> None:
    """Do what is done beside requests, until Ctrl-C or SIGTERM.

    It delivers webhooks, tells Stripe of disconnections, looks after connected accounts, and forgets what is
    old. `billing serve` runs one beside the API; any number may run, on any number of machines.

    \b
    Example:
      billing serve --no-worker
      billing worker
    """
    logs.configure(tty=sys.stderr.isatty())
    allow_descriptors()
    with (
        opened_store(connections=CONNECTIONS) as (settings, store),
        worker_metrics(settings, store, is_companion=follow),
    ):
        begin_telemetry(settings, "billing-worker")
        crew = Crew(settings, store)
        for number in (signal.SIGINT, signal.SIGTERM):
            # A service manager may signal every process: a companion goes on until the server has finished.
            signal.signal(number, signal.SIG_IGN if follow else lambda *_: crew.stop())
        if follow:
            threading.Thread(target=stop_at_end_of_input, args=(crew,), daemon=True).start()
        else:
            done("The worker is running. Ctrl-C stops.")
        try:
            crew.run()
        finally:
            tracing.end()


class Crew:
    """One worker per queue. Failing or slow endpoints have a queue of their own, and hold up no others."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._is_asked = False
        self._prompt = dispatcher_for(settings, store, utc_now, threads=SENDING_THREADS)
        self._slow = dispatcher_for(settings, store, utc_now, threads=SLOW_THREADS)
        connections, house = stripe_connections_for(settings, store, utc_now), Housekeeping(store, utc_now)
        general: dict[str, Job] = {
            stripe_connect.DEAUTHORIZE: connections.deauthorize,
            keys.EXPIRING: house.announce_expiry,
            tenants.HOUSEKEEPING: house.tidy,
        }
        self._workers = [
            Worker(store, general, utc_now, threads=GENERAL_THREADS),
            Worker(
                store,
                {stripe_connect.CHECK: connections.check},
                utc_now,
                queue="checks",
                threads=CHECKING_THREADS,
            ),
            Worker(
                store,
                {DELIVER: self._prompt.deliver},
                utc_now,
                queue="webhooks",
                threads=ENDPOINT_THREADS,
                polled_every_seconds=0.2,
            ),
            Worker(
                store,
                {DELIVER: self._slow.deliver},
                utc_now,
                queue="slow_webhooks",
                threads=SLOW_THREADS,
            ),
        ]

    def run(self) -> None:
        """Work until `stop`. If one worker fails all end, and our parent or service manager restarts us."""
        with ThreadPoolExecutor(len(self._workers), thread_name_prefix="worker") as pool:
            running = [pool.submit(worker.run) for worker in self._workers]
            # Python runs signal handlers in this thread alone, and only while it is awake.
            while not self._is_asked and not wait(running, AWAKE_EVERY_SECONDS, FIRST_COMPLETED).done:
                pass
            for dispatcher in (self._prompt, self._slow):
                dispatcher.stop()
            for worker in self._workers:
                worker.stop()
        for one in running:
            if error := one.exception():
                crashes.report(error)
            one.result()

    def stop(self) -> None:
        """Have the workers take nothing more, and finish what is in flight.

        It only sets a flag: a signal handler may interrupt code that holds a lock which more work would need.
        """
        self._is_asked = True


def stop_at_end_of_input(crew: Crew) -> None:
    """Stop when our parent closes our stdin, which the kernel does if the parent was killed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    crew.stop()
