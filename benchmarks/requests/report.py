"""The tables, and the verdict on the targets."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

from benchmarks.installation import Installation
from benchmarks.requests.load import CORES, Window
from benchmarks.requests.rounds import FEWEST_ROUNDS, Results, Spread
from benchmarks.requests.servers import BENCH_BIN, OURS, TITLES
from billing.cli.console import table

OUR_LIBRARIES = ("connexion", "starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "psycopg2-binary")
PEERS_LIBRARIES = (
    *("starlette", "fastapi", "pydantic", "uvicorn", "uvloop", "httptools", "asyncpg", "sqlalchemy"),
    *("psycopg2-binary", "django", "djangorestframework", "djangorestframework-simplejwt", "gunicorn"),
)
ASK_VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
COLUMNS = (
    "",
    "clients",
    "server",
    "cpu us",
    "least-most",
    "postgresql cpu us",
    "requests/s",
    "p50 ms",
    "p99 ms",
)
RATIO_COLUMNS = ("cpu, ours to theirs", "clients", "server", "least", "median", "most", "target", "")


@dataclass(frozen=True)
class Target:
    """A target: at most this share of a peer's CPU per request."""

    case: str
    peer: str
    share: float


TARGETS = (
    Target("verify", "starlette", 1.0),
    Target("verify", "fastapi", 0.35),
    Target("verify", "django", 1 / 20),
    Target("me", "fastapi", 0.5),
    Target("refused", "fastapi", 0.5),
    Target("configure", "fastapi", 0.5),
)


@dataclass(frozen=True)
class Verdict:
    """A median, compared with its target."""

    target: Target
    clients: int
    ratio: Spread

    @property
    def share_of_target(self) -> float:
        return self.ratio.median / self.target.share

    def __str__(self) -> str:
        word = "met" if self.share_of_target <= 1 else "MISSED"
        against = f"{self.target.case} at {self.clients} clients is {self.ratio.median:.2f}"
        return f"{word}: {against} of {TITLES[self.target.peer]}, target {self.target.share:.2f}"


def surroundings(installation: Installation, *, pinned: bool, quiet: bool) -> Iterator[str]:
    """The machine, the versions, and the setup of the measurement."""
    machine = f"{os.cpu_count()} cores, {processor()}, {platform.system()} {platform.release()}"
    yield f"{machine}; load before {os.getloadavg()[0]:.1f}"
    yield f"PostgreSQL {installation.postgres_version}, on disk, fsync on, by its unix socket; {wrk_version()}"
    ours = ", ".join(f"{name} {version(name)}" for name in OUR_LIBRARIES)
    yield f"ours: Python {platform.python_version()}, {ours}"
    yield f"peers: Python {peers_python()}, {peers_versions()}"
    apart = (
        f"servers on core {CORES[0]}, PostgreSQL and wrk on the others"
        if pinned
        else "nothing pinned to a core"
    )
    yield f"{apart}; peers {'do not log' if quiet else 'log'} each request, we do"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


def wrk_version() -> str:
    output = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(output.split()[:2])


def peers_python() -> str:
    return peers_output("import platform; print(platform.python_version())")[0]


def peers_versions() -> str:
    versions = peers_output(ASK_VERSIONS, *PEERS_LIBRARIES)
    return ", ".join(f"{name} {found}" for name, found in zip(PEERS_LIBRARIES, versions, strict=True))


def peers_output(program: str, *arguments: str) -> list[str]:
    """What the peers' Python prints, word by word."""
    command = [str(BENCH_BIN / "python"), "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def figures(results: Results) -> str:
    plan = results.plan
    rows = [figures_of(results, *each) for each in product(plan.cases, plan.clients, plan.servers)]
    return str(table(COLUMNS, rows))


def figures_of(results: Results, case: str, clients: int, server: str) -> list[str]:
    def median(figure: Callable[[Window], float]) -> float:
        return results.spread(case, clients, server, figure).median

    cpu = results.spread(case, clients, server, lambda window: window.server_micros)
    return [
        case,
        str(clients),
        TITLES[server],
        f"{cpu.median:.0f}",
        f"{cpu.least:.0f}–{cpu.most:.0f}",
        f"{median(lambda window: window.postgres_micros):.0f}",
        f"{median(lambda window: window.requests_a_second):.0f}",
        f"{median(lambda window: window.p50):.2f}",
        f"{median(lambda window: window.p99):.2f}",
    ]


def ratios(results: Results) -> str:
    plan = results.plan
    peers = [name for name in plan.servers if name != OURS]
    targets = {(target.case, target.peer): target.share for target in TARGETS}
    rows = [
        ratio_of(results, case, clients, peer, targets.get((case, peer)))
        for case, clients, peer in product(plan.cases, plan.clients, peers)
    ]
    return str(table(RATIO_COLUMNS, rows))


def ratio_of(results: Results, case: str, clients: int, peer: str, share: float | None) -> list[str]:
    ratio = results.ratio(case, clients, peer)
    figures = [f"{each:.3f}" for each in (ratio.least, ratio.median, ratio.most)]
    target = ["", ""] if share is None else [f"{share:.2f}", "met" if ratio.median <= share else "MISSED"]
    return [case, str(clients), TITLES[peer], *figures, *target]


def worst(results: Results) -> Verdict | None:
    """The verdict furthest from its target, at any number of clients; None if no target was measured."""
    plan = results.plan
    verdicts = [
        Verdict(target, clients, results.ratio(target.case, clients, target.peer))
        for target, clients in product(TARGETS, plan.clients)
        if target.case in plan.cases and {target.peer, OURS} <= set(plan.servers)
    ]
    return max(verdicts, key=lambda verdict: verdict.share_of_target, default=None)


def conclusion(results: Results) -> str:
    """The ratios, and last the worst verdict; or why there are none."""
    if OURS not in results.plan.servers:
        return "We were not measured."
    if results.plan.rounds < FEWEST_ROUNDS:
        return (
            f"No ratios from {results.plan.rounds} rounds: {FEWEST_ROUNDS} is the least that says something."
        )
    return f"{ratios(results)}\n\n{worst(results) or 'No target was measured.'}"
