"""How parts are made from the settings, for the server, its worker and the other commands alike."""

from __future__ import annotations

from pathlib import Path

from billing import crashes, tracing
from billing.clock import Clock
from billing.counters import InProcess
from billing.deliveries import Dispatcher, Tester
from billing.encryption import Vault
from billing.gateway import Gateway
from billing.http.exposition import Read, reader
from billing.limits import Counters
from billing.passwords import Passwords
from billing.settings import Settings, SettingsError
from billing.storage.store import Store
from billing.stripe_connections import StripeConnections
from billing.webhooks.egress import Egress
from billing.webhooks.endpoints import UrlPolicy


def new_store(settings: Settings, *, connections: int = 1) -> Store:
    """A store that is yet to be opened, with that many connections."""
    return Store(Vault(settings.encryption_keys), connections=connections)


def passwords_for(settings: Settings) -> Passwords:
    """Passwords hashed with this installation's peppers, at its cost."""
    return Passwords(settings.password_peppers, settings.password_cost)


def counters_for(settings: Settings) -> Counters:
    """The rate limits' counters: each process's own, or those in Redis if the settings name it.

    Raises `SettingsError` if its URL has parameters that are no use.
    """
    url = settings.rate_limit_storage_url
    if url is None:
        return InProcess()
    # Imported here, as importing the client of Redis takes longer than all the rest of the server.
    from billing.shared_counters import InRedis

    try:
        return InRedis(url, local=InProcess())
    except ValueError:
        raise SettingsError(
            "RATE_LIMIT_STORAGE_URL must have only parameters that redis-py knows, and can use."
        ) from None


# Stripe and webhooks -------------------------------------------------------------------------------


def stripe_connections_for(settings: Settings, store: Store, clock: Clock) -> StripeConnections:
    """The connections of this installation, by its own keys at Stripe."""
    gateway = Gateway(
        secret_key=settings.stripe_secret_key,
        client_id=settings.stripe_connect_client_id,
        api_base=settings.stripe_api_base,
        connect_base=settings.stripe_connect_base,
    )
    return StripeConnections(
        store,
        gateway,
        clock,
        base_url=settings.public_base_url,
        return_origins=settings.cors_allowed_origins,
    )


def policy_for(settings: Settings) -> UrlPolicy:
    """Which URLs this installation calls."""
    return UrlPolicy(
        allow_http=settings.webhook_allow_http, allow_localhost=bool(settings.webhook_allow_cidrs)
    )


def egress_for(settings: Settings, *, lookups: int = 16) -> Egress:
    """Egress as this installation's settings allow it, with so many names looked up at once."""
    return Egress(policy_for(settings), settings.webhook_allow_cidrs, lookups=lookups)


def dispatcher_for(settings: Settings, store: Store, clock: Clock, *, threads: int) -> Dispatcher:
    """A dispatcher as this installation's settings allow, with so many attempts at once."""
    # A lookup that hangs outlasts the attempt that gave up on it; names that do not hang must still find a thread.
    return Dispatcher(store, egress_for(settings, lookups=3 * threads), clock, threads=threads)


def tester_for(settings: Settings, store: Store, clock: Clock) -> Tester:
    """A tester as this installation's settings allow."""
    return Tester(store, egress_for(settings), clock, one_at_a_time=settings.rate_limits)


# Watching ------------------------------------------------------------------------------------------


def begin_telemetry(settings: Settings, service: str) -> None:
    """Begin tracing and error reporting, if the settings say where to."""
    if settings.otel_exporter_otlp_endpoint is not None:
        tracing.begin(settings.otel_exporter_otlp_endpoint, service)
    if settings.sentry_dsn is not None:
        crashes.begin(settings.sentry_dsn, settings.environment)


def metrics_for(settings: Settings, directory: Path, store: Store, clock: Clock) -> Read:
    """What renders the page of metrics from this directory, and from this installation's database."""
    return reader(directory, store, clock, is_embedded=settings.database_url is None)
