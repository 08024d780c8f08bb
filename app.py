"""The server: its parts from `billing/assembly.py`, put together as `app`, from start to shutdown."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
import structlog
from anyio import to_thread
from starlette.routing import Route
from starlette.types import ASGIApp

from billing import crashes, logs, metrics, tracing
from billing.assembly import (
    begin_telemetry,
    counters_for,
    metrics_for,
    new_store,
    passwords_for,
    policy_for,
    stripe_connections_for,
    tester_for,
)
from billing.clock import Clock, utc_now
from billing.errors import DatabaseUnavailable
from billing.failed_logins import FailedLogins
from billing.http import application, document, exposition, problems
from billing.http.idempotency import Idempotency
from billing.http.lanes import (
    PASSWORD_THREADS,
    STRIPE_THREADS,
    WEBHOOK_THREADS,
    BoundedThreads,
    Lane,
    Lanes,
)
from billing.http.limits import Limits
from billing.http.pages import pages
from billing.key_uses import KeyUses
from billing.keys import KeyDigests
from billing.limits import STANDARD, UNLIMITED, Counters, Meter, Policies
from billing.security import Authenticator
from billing.settings import Settings
from billing.storage.database import open_database
from billing.storage.driver import StorageError
from billing.storage.lookups import Lookups
from billing.storage.schema import SchemaError
from billing.storage.store import Store
from billing.threads import end_with_main_thread
from billing.tokens import Tokens

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")

NOTES_FLUSHED_EVERY_SECONDS = 1
SHARED_CONNECTIONS = 4
# For each step of the shutdown, and for the threads that still run after it.
SHUTDOWN_SECONDS = 3


def create_app(
    settings: Settings,
    *,
    clock: Clock = utc_now,
    policies: Policies = STANDARD,
    counters: Counters | None = None,
) -> ASGIApp:
    """Build the application for these settings. Its lifespan opens the database."""
    problems.configure(settings.public_base_url)
    contract = document.load()
    store = new_store(settings, connections=pool_size(settings))
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    digests = KeyDigests(settings.key_peppers)
    lookups, uses, failed_logins = Lookups(), KeyUses(), FailedLogins(clock)
    lanes = Lanes(threads_of(settings))
    served = document.served(contract, settings.public_base_url)
    begin_telemetry(settings, "billing-api")
    metrics_dir = metrics.keep(settings.prometheus_multiproc_dir) if settings.are_metrics_wanted else None
    counters = counters or counters_for(settings)
    meter = Meter(counters, settings.key_peppers.first[1], clock)
    edge = application.build(
        contract,
        services={
            "store": store,
            "clock": clock,
            "tokens": tokens,
            "digests": digests,
            "idempotency": Idempotency(store, clock),
            "connections": stripe_connections_for(settings, store, clock),
            "passwords": passwords_for(settings),
            "url_policy": policy_for(settings),
            "tester": tester_for(settings, store, clock),
            "base_url": settings.public_base_url,
            "failed_logins": failed_logins,
        },
        authenticator=Authenticator(lookups, tokens, digests, uses, clock),
        routes=[
            *pages(served=served, ready=readiness(store)),
            *metrics_routes(settings, metrics_dir, store, clock),
        ],
        lifespan=lambda _: running(
            settings, store, lookups, (uses, failed_logins), counters, lanes, (edge.sample, lanes.sample)
        ),
        lanes=lanes,
        allowed_origins=settings.cors_allowed_origins,
        trusted_proxies=settings.trusted_proxies,
        limits=Limits(meter, policies if settings.rate_limits else UNLIMITED, failed_logins),
        compiled=settings.compiled_operations,
        timeout_seconds=settings.request_timeout_seconds,
        https_only=settings.public_base_url.startswith("https:"),
    )
    return edge


def threads_of(settings: Settings) -> dict[Lane, int]:
    """How many threads each kind of work has."""
    return {
        Lane.GENERAL: settings.worker_threads,
        Lane.PASSWORDS: PASSWORD_THREADS,
        Lane.STRIPE: STRIPE_THREADS,
        Lane.WEBHOOKS: WEBHOOK_THREADS,
    }


def pool_size(settings: Settings) -> int:
    """One connection for each thread that may need one, one for readiness, and one for flushing the notes.

    Threads that wait for Stripe or for a webhook receiver hold none meanwhile, and share a few.
    """
    waiting = (Lane.STRIPE, Lane.WEBHOOKS)
    threads = threads_of(settings)
    return sum(count for lane, count in threads.items() if lane not in waiting) + SHARED_CONNECTIONS + 2


def metrics_routes(settings: Settings, directory: Path | None, store: Store, clock: Clock) -> list[Route]:
    """The metrics' route, for clients with the token; none without a token, or with a port of their own."""
    if directory is None or settings.metrics_token is None or settings.metrics_port is not None:
        return []
    return [exposition.route(metrics_for(settings, directory, store, clock), settings.metrics_token)]


@asynccontextmanager
async def running(
    settings: Settings,
    store: Store,
    lookups: Lookups,
    notes: Sequence[Notes],
    counters: Counters,
    lanes: Lanes,
    samples: Sequence[Callable[[], None]],
) -> AsyncIterator[None]:
    """The server's lifespan: open the database, flush notes and metrics while it runs, and close everything."""
    database = await to_thread.run_sync(open_database, settings)
    try:
        store.open(database.app_url, replica_url=database.replica_url)
        await to_thread.run_sync(store.require_ready)
        await to_thread.run_sync(store.require_safe)
        lookups.open(database.app_url, positioned=database.replica_url is not None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_flushing, notes, store)
            with metrics.written(*samples, partial(store.sample, "api")):
                yield
            tasks.cancel_scope.cancel()
    finally:
        lookups.close()
        end_with_main_thread(SHUTDOWN_SECONDS)
        for last in (lanes.emptied, counters.close):
            with anyio.move_on_after(SHUTDOWN_SECONDS, shield=True):
                await last()
        await at_shutdown(store.close)
        await at_shutdown(database.close)
        await at_shutdown(tracing.end)


async def at_shutdown(call: Callable[[], None]) -> None:
    """Make one blocking call of the shutdown, and wait at most `SHUTDOWN_SECONDS` for it."""
    with anyio.move_on_after(SHUTDOWN_SECONDS, shield=True):
        await to_thread.run_sync(call, abandon_on_cancel=True)


class Notes(Protocol):
    """What requests note in memory, to be written to the database outside of them."""

    def flush(self, store: Store) -> None: ...


async def keep_flushing(notes: Sequence[Notes], store: Store) -> None:
    """Flush the notes once a second, and a last time at the end."""
    try:
        while True:
            await anyio.sleep(NOTES_FLUSHED_EVERY_SECONDS)
            with suppress(RuntimeError):  # No thread can be started; the next time one may.
                await to_thread.run_sync(flush, notes, store, abandon_on_cancel=True)
    finally:
        await at_shutdown(partial(flush, notes, store))


def flush(notes: Sequence[Notes], store: Store) -> None:
    """Write the notes to the database. Failures are only reported: raised, they would end the server and its pool."""
    for noted in notes:
        try:
            noted.flush(store)
        except Exception as error:
            what, cause = type(noted).__name__, type(error).__name__
            log.warning("notes were not written down", what=what, cause=cause)
            if not isinstance(error, DatabaseUnavailable | StorageError):
                crashes.report(error)


def readiness(store: Store) -> Callable[[], Awaitable[None]]:
    """The check behind `/readyz`: one runs at a time, and requests that come meanwhile share its result.

    It raises `DatabaseUnavailable`. `/readyz` is public, and a flood of requests must not make a server look unready.
    """
    thread = BoundedThreads("readiness", 1)
    looking: asyncio.Task[None] | None = None

    def require_ready() -> None:
        try:
            store.require_ready()
        except SchemaError as error:
            raise DatabaseUnavailable from error

    async def look() -> None:
        nonlocal looking
        if looking is None or looking.done():
            looking = asyncio.create_task(thread.run(require_ready))
        await asyncio.shield(looking)

    return look


logs.configure(tty=sys.stderr.isatty())
if __name__ == "__main__":
    from billing.cli import main

    main(["serve", *sys.argv[1:]], prog_name="billing")  # Which imports this file again, by its name.
elif __name__ != "__mp_main__":  # A spawned process imports its parent's main module under this.
    app = create_app(Settings.load())
