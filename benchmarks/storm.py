"""`python -m benchmarks.storm`: 32 clients log in while 16 call `verify`; how each affects the other.

The best possible rate of logins beside `verify` is that of bcrypt alone, in a process of its own beside the same load.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
from sqlalchemy import create_engine, text

from benchmarks.installation import Installation, installed
from benchmarks.requests.cases import BASE, CASES, Request
from benchmarks.requests.load import Counted, require_right, script_of, wrk
from benchmarks.requests.population import Population
from benchmarks.requests.servers import Server, free_port, ours
from billing.cli.console import table
from billing.http.lanes import PASSWORD_THREADS
from billing.passwords import Passwords
from billing.storage.database import NAME

PASSWORD = "correct horse battery staple"
VERIFYING, LOGGING_IN = 16, 32
# The first logins all queue at once: the load is steady only when some of them have been answered.
RISING_SECONDS = 3
CHECKS = """
import sys, threading, time, bcrypt
threads, seconds, cost = map(int, sys.argv[1:])
hashed, ends = bcrypt.hashpw(b"password", bcrypt.gensalt(cost)), time.monotonic() + seconds
done = []
def check():
    while time.monotonic() < ends:
        bcrypt.checkpw(b"password", hashed)
        done.append(time.monotonic())
workers = [threading.Thread(target=check) for _ in range(threads)]
began = time.monotonic()
for each in workers: each.start()
for each in workers: each.join()
print(len(done) / (time.monotonic() - began))
"""
COLUMNS = (
    "",
    "verify/s",
    "verify p50 ms",
    "verify p99 ms",
    "logins/s",
    "refused logins/s",
    "bcrypt checks/s",
)


@dataclass(frozen=True)
class Storm:
    """The results: `verify` alone, beside bcrypt, and beside logins; and the rates of bcrypt checks and logins."""

    bcrypt_alone: float
    quiet: Counted
    beside_bcrypt: Counted
    bcrypt_beside: float
    stormy: Counted
    logins: Counted


@click.command()
@click.option(
    "--seconds", type=click.IntRange(5), default=20, show_default=True, help="How long each part is."
)
def main(seconds: int) -> None:
    """Measure `verify` quiet and in a storm of logins, and the logins beside bcrypt's own rate."""
    port = free_port()
    # The limits on logins, of an account and of an address, are what ends a storm; here it must go on.
    with installed(PORT=str(port), RATE_LIMITS="off") as installation:
        population = Population(installation)
        give_passwords(installation)
        with ours(installation, port) as server:
            storm = measured(installation, server, population, seconds)
        cost = installation.settings.password_cost
    click.echo(f"{report(storm)}\n\n{verdict(storm)} (bcrypt {version('bcrypt')}, cost {cost})")


def give_passwords(installation: Installation) -> None:
    """Give every user a password."""
    settings = installation.settings
    hashed = Passwords(settings.password_peppers, settings.password_cost).hash(PASSWORD)
    engine = create_engine(installation.cluster.url(NAME))
    with engine.begin() as connection:
        connection.execute(text("UPDATE users SET password_hash = :hashed"), {"hashed": hashed})
    engine.dispose()


def measured(installation: Installation, server: Server, population: Population, seconds: int) -> Storm:
    directory, cost = server.log.parent, installation.settings.password_cost
    verifying = script_of(directory / "verify.lua", CASES["verify"].requests(population, []))
    entering = logins(population)
    require_right(server, CASES["verify"], CASES["verify"].requests(population, [])[0])
    logging_in = script_of(directory / "login.lua", entering)
    alone = bcrypt_rate(seconds, cost)
    wrk(server, verifying, clients=VERIFYING, seconds=1)
    quiet = wrk(server, verifying, clients=VERIFYING, seconds=seconds)
    with bcrypt_running(seconds + 1, cost) as rate:
        beside = wrk(server, verifying, clients=VERIFYING, seconds=seconds)
    stormy, entered = both(server, verifying, logging_in, seconds)
    return Storm(alone, quiet, beside, rate[0], stormy, entered)


def both(server: Server, verifying: Path, logging_in: Path, seconds: int) -> tuple[Counted, Counted]:
    """The counts of `verify` and of logins, sent at the same time."""
    found: list[Counted] = []
    wrk(server, logging_in, clients=LOGGING_IN, seconds=RISING_SECONDS)
    storm = threading.Thread(
        target=lambda: found.append(wrk(server, logging_in, clients=LOGGING_IN, seconds=seconds + 1))
    )
    storm.start()
    calm = wrk(server, verifying, clients=VERIFYING, seconds=seconds)
    storm.join()
    return calm, found[0]


def logins(population: Population) -> list[Request]:
    return [
        Request("POST", f"{BASE}/login/", {}, {"email": member.email, "password": PASSWORD})
        for member in population.members
    ]


# bcrypt by itself ---------------------------------------------------------------------------------


def bcrypt_rate(seconds: int, cost: int) -> float:
    """bcrypt checks per second in as many threads as the server has for passwords, with no other load."""
    with bcrypt_running(seconds, cost) as rate:
        pass
    return rate[0]


@contextmanager
def bcrypt_running(seconds: int, cost: int) -> Iterator[Sequence[float]]:
    """Run bcrypt in a process of its own; its rate is in the list after the block."""
    arguments = [str(each) for each in (PASSWORD_THREADS, seconds, cost)]
    command = [sys.executable, "-c", CHECKS, *arguments]
    rate: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield rate
        rate.append(float(process.communicate()[0]))


# The report --------------------------------------------------------------------------------------


def report(storm: Storm) -> str:
    rows = [
        ["bcrypt alone", "", "", "", "", "", f"{storm.bcrypt_alone:.1f}"],
        ["verify alone", *verifying_cells(storm.quiet), "", "", ""],
        ["verify beside bcrypt", *verifying_cells(storm.beside_bcrypt), "", "", f"{storm.bcrypt_beside:.1f}"],
        ["verify beside logins", *verifying_cells(storm.stormy), *login_cells(storm.logins), ""],
    ]
    return table(COLUMNS, rows)


def verifying_cells(counted: Counted) -> list[str]:
    return [f"{counted.a_second:.0f}", f"{counted.p50:.2f}", f"{counted.p99:.2f}"]


def login_cells(counted: Counted) -> list[str]:
    """Logins and refusals per second: wrk counts refused requests among the requests."""
    refused = counted.refused / counted.seconds
    return [f"{counted.a_second - refused:.1f}", f"{refused:.1f}"]


def verdict(storm: Storm) -> str:
    done = storm.logins.a_second - storm.logins.refused / storm.logins.seconds
    slower = (
        f"p99 of verify is {storm.stormy.p99 / storm.quiet.p99:.1f} times its quiet value (target: at most 3)"
    )
    share = f"logins are {done / storm.bcrypt_beside:.0%} of bcrypt's own rate beside verify (target: 95 %)"
    return f"{slower}, {share}"


if __name__ == "__main__":
    main()
