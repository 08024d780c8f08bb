"""`python -m benchmarks.soak`: ten minutes at the highest rate that two processes and their worker can serve.

All defaults are on, limits too. Nothing may be refused or break; the memory of the processes is noted each minute.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import click

from benchmarks.installation import installed, megabytes
from benchmarks.requests.cases import CASES, Request
from benchmarks.requests.load import Counted, script_of, wrk
from benchmarks.requests.population import Population
from benchmarks.requests.servers import Server, free_port, ours
from billing.cli.console import table

# Of ten requests one writes.
MIX = ("verify",) * 5 + ("me",) * 4 + ("configure",)
COLUMNS = ("minute", "requests/s", "p50 ms", "p99 ms", "refused", "broken", "server MB (PSS)")


@dataclass(frozen=True)
class Minute:
    """What was answered, and the memory of the server's processes afterwards."""

    counted: Counted
    megabytes: float


@click.command()
@click.option("--minutes", type=click.IntRange(1), default=10, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--seconds", type=click.IntRange(1), default=60, show_default=True, help="How long a minute is."
)
def main(minutes: int, clients: int, seconds: int) -> None:
    """Load a server with limits on for ten minutes; ends with 1 if anything was refused or broken."""
    port = free_port()
    with installed(PORT=str(port), RATE_LIMITS="on") as installation:
        population = Population(installation)
        with ours(installation, port, "--workers", "2", "--worker") as server:
            spent = [minute(server, mixed(population), clients, seconds) for _ in range(minutes)]
    click.echo(table(COLUMNS, [cells(number, each) for number, each in enumerate(spent, 1)]))
    click.echo(f"\n{verdict(spent)}")
    sys.exit(any(each.counted.refused or each.counted.broken for each in spent))


def mixed(population: Population) -> list[Request]:
    """The mix of requests for each tenant in turn, with new tokens, as a soak may last longer than their 15 minutes."""
    tokens = population.our_tokens()
    requests = {name: CASES[name].requests(population, tokens) for name in set(MIX)}
    rounds = range(max(map(len, requests.values())))
    return list(
        chain.from_iterable([requests[name][n % len(requests[name])] for name in MIX] for n in rounds)
    )


def minute(server: Server, requests: Sequence[Request], clients: int, seconds: int) -> Minute:
    server.forget_log()
    script = script_of(server.log.parent / "soak.lua", requests)
    counted = wrk(server, script, clients=clients, seconds=seconds)
    return Minute(counted, sum(megabytes(pid) for pid in server.pids))


def cells(number: int, each: Minute) -> list[str]:
    counted = each.counted
    figures = (counted.a_second, counted.p50, counted.p99)
    return [
        str(number),
        *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (0, 1, 1), strict=True)),
        str(counted.refused),
        str(counted.broken),
        f"{each.megabytes:.0f}",
    ]


def verdict(spent: Sequence[Minute]) -> str:
    answered = sum(each.counted.requests for each in spent)
    wrong = sum(each.counted.refused + each.counted.broken for each in spent)
    held = [each.megabytes for each in spent]
    return (
        f"{answered:,} requests, {wrong} refused or broken; "
        f"memory {held[0]:.0f} MB after the first minute, {held[-1]:.0f} MB after the last"
    )


if __name__ == "__main__":
    main()
