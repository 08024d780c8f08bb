"""`billing serve`: checks settings, port and database first, then hands the socket to uvicorn."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType

import click
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.watchfilesreload import WatchFilesReload

from billing import logs
from billing.assembly import counters_for
from billing.cli.companion import Companion
from billing.cli.console import allow_descriptors, opened_database
from billing.cli.watchers import kept_metrics, server_metrics
from billing.settings import Settings
from billing.storage.database import Database

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent

BACKLOG = 2048
# Longer than browsers and proxies leave a connection idle between two requests of one page.
KEEP_ALIVE_SECONDS = 15
# A request may take 15 s to arrive and a test delivery 15 s to be sent; orchestrators kill after 30 s.
DRAIN_SECONDS = 25
# A worker process answers its supervisor only after its imports, which take seconds on a busy machine.
WORKER_PATIENCE_SECONDS = 30


@click.command()
@click.option("--host", help="The address to listen on, instead of HOST (127.0.0.1).")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="The port, instead of PORT (8000); 0 is any free one."
)
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="How many processes serve."
)
@click.option("--reload", is_flag=True, help="Start anew when the code changes, for development.")
@click.option("--worker/--no-worker", default=True, help="Whether a `billing worker` runs beside the API.")
def serve(host: str | None, port: int | None, workers: int, reload: bool, worker: bool) -> None:
    """Serve the API until Ctrl-C or SIGTERM, which let requests in flight finish.

    Without DATABASE_URL a private PostgreSQL is started in the state directory. A worker runs beside the API,
    for what is done beside requests.

    \b
    Example:
      billing serve --port 8080 --workers 2
    """
    if reload and workers > 1:
        raise click.UsageError("--reload serves with one process: leave --workers out.")
    with suppress(KeyboardInterrupt):
        config = configuration(workers=workers, reload=reload)
        companion = Companion() if worker else None
        _serve(_settings(HOST=host, PORT=port), config, companion)


def _settings(**options: object) -> Settings:
    """Load the settings with these overrides, which apply in every process that we start too."""
    os.environ.update({name: str(value) for name, value in options.items() if value is not None})
    return Settings.load()


def _serve(settings: Settings, config: uvicorn.Config, companion: Companion | None) -> None:
    logs.configure(tty=sys.stderr.isatty())
    signal.signal(signal.SIGTERM, interrupt)
    allow_descriptors()
    counters_for(settings)  # What is wrong with its URL is said here once, and not by each worker process.
    with listen(settings.host, settings.port) as listener, kept_metrics(settings):
        settings = _settings(PORT=listener.getsockname()[1])
        with opened_database(settings) as database:
            click.echo(banner(settings, database))
            with server_metrics(settings, database), companion or nullcontext():
                run(config, listener, companion)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C, so that everything open gets closed."""
    raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, which workers share; connections made before they are up wait in its queue."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        raise click.ClickException(_why_not(error, host, port)) from error


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use: stop what uses it, or choose another with --port."
    reason = str(error.strerror).partition(" (while ")[0]
    return f"Cannot listen on port {port} of {host}: {reason}."


def configuration(*, workers: int = 1, reload: bool = False) -> uvicorn.Config:
    """uvicorn's configuration, which is also sent to worker processes and to the reloaded process."""
    return uvicorn.Config(
        "app:app",
        workers=workers,
        reload=reload,
        reload_dirs=watched_directories() if reload else None,
        reload_includes=["*.yaml", "*.html", "*.css", "*.js"] if reload else None,
        http="billing.http.protocol:Protocol",
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        callback_notify=follow_parent,
        timeout_notify=1,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_worker_healthcheck=WORKER_PATIENCE_SECONDS,
    )


async def follow_parent() -> None:
    """End with the supervisor: if that was killed, its workers would keep the port for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        signal.raise_signal(signal.SIGTERM)


def run(config: uvicorn.Config, listener: socket.socket, companion: Companion | None) -> None:
    """Serve until a signal; raises `click.ClickException` if the application does not start."""
    if config.reload:
        reloader = Reloader(config, target=uvicorn.Server(config).run, sockets=[listener])
        reloader.companion = companion
        reloader.run()
    elif config.workers > 1:
        _run_workers(Multiprocess(config, sockets=[listener]))
    else:
        _run_here(uvicorn.Server(config), listener)


class Reloader(WatchFilesReload):
    """uvicorn's reloader, which also restarts the worker beside the API."""

    companion: Companion | None = None

    def restart(self) -> None:
        if self.companion is not None:
            self.companion.renew()
        super().restart()


def _run_here(server: uvicorn.Server, listener: socket.socket) -> None:
    # From here on uvicorn handles signals: an interrupt raised in its loop before it does so would be lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    try:
        server.run(sockets=[listener])
    except SystemExit as end:
        raise not_started() from end


def _run_workers(supervisor: Multiprocess) -> None:
    supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise not_started()


def not_started() -> click.ClickException:
    """The error of an application that passed the checks and failed all the same."""
    return click.ClickException("The application did not start: the log above says why.")


def watched_directories() -> list[str]:
    """Where the code and the document are: never the state directory, nor a virtual environment."""
    return [str(place) for place in (PACKAGE, ROOT / "openapi") if place.is_dir()]


def banner(settings: Settings, database: Database) -> str:
    """The lines printed at start: where everything is."""
    base = settings.public_base_url
    where = f"embedded PostgreSQL in {settings.state_dir}" if database.is_embedded else database.place
    lines = {
        "API": f"{base}/api/v1/auth/tenants/",
        "Docs": f"{base}/docs/",
        "Document": f"{base}/openapi.json",
        "Listening on": f"{settings.host}, port {settings.port}",
        "Database": where,
        "Stripe": stripe_line(settings),
        "Webhooks": webhooks_line(settings),
        "Environment": settings.environment,
        "State": str(settings.state_dir),
    }
    return "\n".join([*(f"{name:<14}{value}" for name, value in lines.items()), "Ctrl-C stops."])


def stripe_line(settings: Settings) -> str:
    """Whether Stripe is configured, in which mode, and where."""
    if settings.stripe_secret_key is None:
        return "not configured: docs/stripe-connect.md"
    mode = "live" if "_live_" in settings.stripe_secret_key else "test"
    return f"{mode} mode, at {settings.stripe_connect_base}"


def webhooks_line(settings: Settings) -> str:
    """Where webhooks may be sent, and by which schemes."""
    opened = [str(network) for network in settings.webhook_allow_cidrs]
    places = ["public addresses", *opened]
    return f"to {' and '.join(places)}, by https{' and http' if settings.webhook_allow_http else ''}"
