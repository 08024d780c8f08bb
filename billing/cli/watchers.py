"""How a server is observed: where its metrics are kept, and where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import click

from billing import metrics
from billing.assembly import metrics_for, new_store
from billing.cli.console import done
from billing.clock import utc_now
from billing.http.exposition import PATH, Exporter, Read
from billing.settings import Settings
from billing.storage.database import Database
from billing.storage.store import Store

LOOPBACK = "127.0.0.1"


def kept_metrics(settings: Settings) -> AbstractContextManager[object]:
    """The directory for the metrics of this process and of those that it starts, if metrics are wanted."""
    return metrics.directory() if settings.are_metrics_wanted else nullcontext()


@contextmanager
def server_metrics(settings: Settings, database: Database) -> Iterator[None]:
    """Serve the metrics of the API's processes and of the worker beside them, if there is a port for it."""
    with closing(new_store(settings)) as store:
        store.open(database.app_url)
        with exposed(settings, settings.prometheus_multiproc_dir, store):
            yield


@contextmanager
def worker_metrics(settings: Settings, store: Store, *, is_companion: bool) -> Iterator[None]:
    """Keep the worker's metrics; a companion's are read with the API's, any other worker has a port of its own."""
    if not settings.are_metrics_wanted:
        yield
        return
    directory = metrics.keep(settings.prometheus_multiproc_dir if is_companion else None)
    metrics.WORKERS.set(1)
    with (
        metrics.written(partial(store.sample, "worker")),
        nullcontext() if is_companion else exposed(settings, directory, store),
    ):
        yield


def exposed(settings: Settings, directory: Path | None, store: Store) -> AbstractContextManager[object]:
    """Serve the metrics, if there is to be a port for it. Without a token only this machine can read them."""
    if settings.metrics_port is None or directory is None:
        return nullcontext()
    host = settings.host if settings.metrics_token else LOOPBACK
    read = metrics_for(settings, directory, store, utc_now)
    server = listening(read, host, settings.metrics_port, settings.metrics_token)
    done(f"Metrics at http://{host}:{server.server_address[1]}{PATH}")
    return server


def listening(read: Read, host: str, port: int, token: str | None) -> Exporter:
    """Start the metrics server; raises `click.ClickException` if it cannot listen on its port."""
    try:
        return Exporter(read, host, port, token)
    except OSError as error:
        raise click.ClickException(f"Cannot listen on METRICS_PORT {port}: {error.strerror}.") from error
