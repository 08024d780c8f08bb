"""`python -m benchmarks.webhooks`: measures for some five minutes, and prints a table."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import click

from benchmarks.installation import Installation, installed
from benchmarks.webhooks.measurements import Latency, Throughput, latency, throughput
from benchmarks.webhooks.processes import OPENED
from billing.cli.console import table

COLUMNS = ("measured", "deliveries/s", "worker cpu us", "postgresql cpu us", "p50 ms", "p99 ms")


CASES: tuple[dict[str, Any], ...] = (
    {"endpoints": 100},
    {"endpoints": 100, "ending": True},
    {"endpoints": 4},
    # As with many tenants: each batch is one delivery.
    {"endpoints": 2000, "events": 2000},
)


@click.command()
@click.option(
    "--events",
    default=10_000,
    show_default=True,
    help="How many the throughput is measured with; one case has 2,000.",
)
@click.option(
    "--seconds", default=30.0, show_default=True, help="How long a latency is measured; 0 leaves it out."
)
def main(events: int, seconds: float) -> None:
    """Measure one `billing worker` on a durable PostgreSQL and receivers that take 50 ms."""
    with installed(**OPENED) as installation:
        click.echo(surroundings(installation))
        rows = [many(throughput(installation, **{"events": events, **case})) for case in CASES]
        rows += [
            soon(latency(installation, beside=each, seconds=seconds))
            for each in ("-", "silent", "refusing")
            if seconds
        ]
    click.echo(table(COLUMNS, rows))


def surroundings(installation: Installation) -> str:
    load = f"{os.getloadavg()[0]:.1f}"
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, load before {load}; Python {platform.python_version()}, "
        f"PostgreSQL {installation.postgres_version}, requests {version('requests')}"
    )


def many(measured: Throughput) -> list[str]:
    figures = (measured.deliveries_a_second, measured.worker_micros, measured.postgres_micros)
    return [
        f"{measured.events} events, {measured.endpoints} endpoints{', which end each connection' * measured.ending}",
        *map("{:.0f}".format, figures),
        "",
        "",
    ]


def soon(measured: Latency) -> list[str]:
    beside = "alone" if measured.beside == "-" else f"beside 100 that are {measured.beside}"
    figures = f"{measured.p50:.0f}", f"{measured.p99:.0f}"
    return [f"{measured.events} events to one endpoint, {beside}", "", "", "", *figures]


if __name__ == "__main__":
    main()
