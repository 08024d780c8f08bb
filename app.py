"""The only place that knows everyone: settings → store, clock, services → `app`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol

import anyio
import structlog
from anyio import to_thread
from starlette.types import ASGIApp

from billing import crashes, logs, metrics, tracing
from billing.cli import main
from billing.cli.watchers import begin_telemetry
from billing.clock import Clock, utc_now
from billing.counters import InProcess
from billing.deliveries import policy_for, tester_for
from billing.encryption import Vault
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
from billing.limits import UNLIMITED, Counters, Meter, Policies
from billing.passwords import Passwords
from billing.security import Authenticator
from billing.settings import Settings
from billing.storage.database import open_database
from billing.storage.driver import StorageError
from billing.storage.lookups import Lookups
from billing.storage.schema import SchemaError
from billing.storage.store import Store
from billing.stripe_connections import stripe_connections_for
from billing.threads import end_with_main_thread
from billing.tokens import Tokens

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")

NOTES_FLUSHED_EVERY_SECONDS = 1
SHARED_CONNECTIONS = 4
# For each of the last things, and for the threads that then still run.
FAREWELL_SECONDS = 3
POLICIES = Policies()


def create_app(
    settings: Settings,
    *,
    clock: Clock = utc_now,
    policies: Policies = POLICIES,
    counters: Counters | None = None,
) -> ASGIApp:
    """The application for these settings. The database is opened by its lifespan."""
    problems.configure(settings.public_base_url)
    contract = document.load()
    store = Store(Vault(settings.encryption_keys), connections=pool_size(settings))
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    digests = KeyDigests(settings.key_peppers)
    lookups, uses, failed_logins = Lookups(), KeyUses(), FailedLogins(clock)
    lanes = Lanes(threads_of(settings))
    served = document.served(contract, settings.public_base_url)
    begin_telemetry(settings, "billing-api")
    figures = metrics.keep(settings.prometheus_multiproc_dir) if settings.are_figures_wanted else None
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
            "passwords": Passwords(settings.password_peppers, settings.password_cost),
            "url_policy": policy_for(settings),
            "tester": tester_for(settings, store, clock),
            "base_url": settings.public_base_url,
            "failed_logins": failed_logins,
        },
        authenticator=Authenticator(lookups, tokens, digests, uses, clock),
        routes=[
            *pages(served=served, ready=readiness(store)),
            *exposition.routes(settings, figures, store, clock),
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
    """One for each thread that may want one, and one each for readiness and for what was noted.

    Threads that wait for Stripe or for a receiver want none meanwhile, and share a few.
    """
    waiting = (Lane.STRIPE, Lane.WEBHOOKS)
    threads = threads_of(settings)
    return sum(count for lane, count in threads.items() if lane not in waiting) + SHARED_CONNECTIONS + 2


def counters_for(settings: Settings) -> Counters:
    """Where this installation counts: in its processes, unless the settings name a place that they share."""
    url = settings.rate_limit_storage_url
    if url is None:
        return InProcess()
    # Importing Redis's client takes longer than all the rest of the server.
    from billing.shared_counters import InRedis

    return InRedis(url, known=InProcess())


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
    """Everything that lives as long as the server: the database, the pool, the counts, what is to be written down."""
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
        end_with_main_thread(FAREWELL_SECONDS)
        for last in (lanes.emptied, counters.close):
            with anyio.move_on_after(FAREWELL_SECONDS, shield=True):
                await last()
        await farewell(store.close)
        await farewell(database.close)
        await farewell(tracing.end)


async def farewell(call: Callable[[], None]) -> None:
    """Do one of the last things, and wait for it no longer than makes sense."""
    with anyio.move_on_after(FAREWELL_SECONDS, shield=True):
        await to_thread.run_sync(call, abandon_on_cancel=True)


class Notes(Protocol):
    """What requests leave behind in memory, to be written down outside of them."""

    def flush(self, store: Store) -> None: ...


async def keep_flushing(notes: Sequence[Notes], store: Store) -> None:
    """Write down what was noted, once a second and a last time at the end."""
    try:
        while True:
            await anyio.sleep(NOTES_FLUSHED_EVERY_SECONDS)
            with suppress(RuntimeError):  # No thread can be started: the next time there may be one.
                await to_thread.run_sync(flush, notes, store, abandon_on_cancel=True)
    finally:
        await farewell(partial(flush, notes, store))


def flush(notes: Sequence[Notes], store: Store) -> None:
    """A note that cannot be written must not end the server, whatever the reason: its pool would go with it."""
    for noted in notes:
        try:
            noted.flush(store)
        except Exception as error:
            what, cause = type(noted).__name__, type(error).__name__
            log.warning("notes were not written down", what=what, cause=cause)
            if not isinstance(error, DatabaseUnavailable | StorageError):
                crashes.report(error)


def readiness(store: Store) -> Callable[[], Awaitable[None]]:
    """What `/readyz` asks: one look at a time, and whoever asks meanwhile gets its answer.

    Raises `DatabaseUnavailable`. Anybody may ask, and a flood must not make a server look unready.
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
    main(["serve", *sys.argv[1:]], prog_name="billing")  # Which imports this file again, by its name.
elif __name__ != "__mp_main__":  # A worker's look at what its parent was started with.
    app = create_app(Settings.load())
