"""`python -m benchmarks.requests`: measures for under 28 minutes, and prints tables; `--quick` for three."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.installation import Installation, installed
from benchmarks.requests import plots as plotting
from benchmarks.requests import profile as profiling
from benchmarks.requests import report
from benchmarks.requests.cases import CASES
from benchmarks.requests.load import WrongAnswer, apart, measure
from benchmarks.requests.population import Population, admit_peers
from benchmarks.requests.rounds import Plan, requests_for, run
from benchmarks.requests.servers import OURS, PEERS, free_port, ours, running

SERVERS = (OURS, *PEERS)


@click.command()
@click.option("--quick", is_flag=True, help="Two rounds at 16 clients: figures, and no verdict.")
@click.option("--server", "servers", multiple=True, type=click.Choice(SERVERS), help="Some servers only.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Some cases only.")
@click.option(
    "--clients", multiple=True, type=click.IntRange(1), help="How many at once. [default: 1, 16, 64]"
)
@click.option("--rounds", type=click.IntRange(1), help="How many rounds. [default: 5]")
@click.option("--seconds", type=click.IntRange(1), default=2, show_default=True, help="How long a window is.")
@click.option("--pin/--no-pin", default=True, help="Whether servers have a core to themselves.")
@click.option("--quiet-peers", is_flag=True, help="Peers log no requests; we do all the same.")
@click.option("--plots", is_flag=True, help="Write the figures of docs/performance.md.")
@click.option("--profile", is_flag=True, help="Only profile our server, under the first case chosen.")
@click.option("--native", is_flag=True, help="Profile C functions too.")
def main(
    quick: bool,
    servers: Sequence[str],
    cases: Sequence[str],
    clients: Sequence[int],
    rounds: int | None,
    seconds: int,
    pin: bool,
    quiet_peers: bool,
    plots: bool,
    profile: bool,
    native: bool,
) -> None:
    """Measure what a request costs us, and those whom a user would take instead."""
    plan = Plan(
        servers=servers or SERVERS,
        cases=cases or tuple(CASES),
        clients=clients or ((16,) if quick else (1, 16, 64)),
        rounds=rounds or (2 if quick else 5),
        seconds=seconds,
    )
    port = free_port()
    # As in production: behind a proxy that forwards the client's address, and with limits.
    with installed(PORT=str(port), RATE_LIMITS="on", TRUSTED_PROXIES="127.0.0.1/32") as installation:
        population = Population(installation)
        admit_peers(installation)
        if profile:
            click.echo(profiled(installation, population, plan, port=port, native=native))
            return
        with running(installation, population, plan.servers, port=port, quiet=quiet_peers) as started:
            if pin:
                apart(installation, started)
            for line in report.surroundings(installation, pinned=pin, quiet=quiet_peers):
                click.echo(line)
            note(f"about {plan.seconds_in_all // 60} minutes")
            results = run(installation, population, started, plan, note)
    if plots:
        note(f"written: {', '.join(path.name for path in plotting.write(results))}")
    click.echo(f"\n{report.figures(results)}\n\n{report.conclusion(results)}")


def profiled(
    installation: Installation, population: Population, plan: Plan, *, port: int, native: bool
) -> str:
    """Where our server's time goes under load, sampled for the seconds of a window."""
    case, clients, folded = (
        CASES[plan.cases[0]],
        plan.clients[0],
        Path(installation.environ["BILLING_STATE_DIR"], "stacks"),
    )
    with ours(installation, port) as server:
        apart(installation, [server])
        requests = requests_for(server, case, population)
        measure(installation, server, case, requests, clients=clients, seconds=2)
        with profiling.record(server, plan.seconds, folded, native=native) as spy:
            window = measure(installation, server, case, requests, clients=clients, seconds=plan.seconds + 1)
            spy.wait()
    summary = f"{case.name}, {clients} clients, {window.server_micros:.0f} µs a request while sampled"
    return f"{summary}; {profiling.tables(folded)}"


def note(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    try:
        main()
    except (WrongAnswer, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"Error: {error}")
