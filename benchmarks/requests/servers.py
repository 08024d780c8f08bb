"""The servers that are measured: ours as `billing serve` runs it, and the peers; one process each."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.installation import STOP_SECONDS, Installation, children_of, cpu_seconds
from benchmarks.requests.population import PEER, Population
from billing.storage.database import NAME

ROOT = Path(__file__).parents[2]
BENCH_BIN = ROOT / ".venv-bench/bin"
START_SECONDS = 60
POLL_SECONDS = 0.005
OURS = "ours"

# uvicorn's own defaults, which are uvloop, httptools, and a line in the log for each request.
UVICORN = ("-m", "uvicorn", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1")
GUNICORN = ("-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "1", "--threads", "8")


@dataclass(frozen=True)
class Peer:
    """An alternative: its name in the tables, its arguments, and further ones that turn its access log off."""

    title: str
    arguments: Sequence[str]
    quiet: Sequence[str]


PEERS = {
    "starlette": Peer(
        "Starlette + asyncpg", (*UVICORN, "benchmarks.peers.starlette_asyncpg:app"), ("--no-access-log",)
    ),
    "fastapi": Peer(
        "FastAPI + asyncpg", (*UVICORN, "benchmarks.peers.fastapi_asyncpg:app"), ("--no-access-log",)
    ),
    "fastapi-sqlalchemy": Peer(
        "FastAPI + SQLAlchemy", (*UVICORN, "benchmarks.peers.fastapi_sqlalchemy:app"), ("--no-access-log",)
    ),
    "django": Peer(
        "Django REST Framework",
        (*GUNICORN, "--access-logfile", "-", "benchmarks.peers.drf.wsgi:application"),
        ("--access-logfile", ""),
    ),
}
TITLES = {OURS: "ours", **{name: peer.title for name, peer in PEERS.items()}}


@dataclass(frozen=True)
class Server:
    """A running server: its process, port and log."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Its process and all its descendants."""
        return descendants(self.process.pid)

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in self.pids)

    def forget_log(self) -> None:
        """Empty the log, so that a long run does not fill the disk."""
        os.truncate(self.log, 0)


def descendants(pid: int) -> list[int]:
    return [pid, *(each for child in children_of(pid) for each in descendants(child))]


@contextmanager
def running(
    installation: Installation,
    population: Population,
    names: Sequence[str],
    *,
    port: int,
    quiet: bool = False,
) -> Iterator[list[Server]]:
    """Start the servers of these names, and wait until each answers; ours at the port that its tokens name."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                ours(installation, port)
                if name == OURS
                else peer(name, installation, population, port=free_port(), quiet=quiet)
            )
            for name in names
        ]


@contextmanager
def ours(installation: Installation, port: int, *options: str) -> Iterator[Server]:
    """Run `billing serve` with its defaults but for the port, and without its worker, which answers no requests."""
    command = [sys.executable, "-m", "billing.cli", "serve", "--no-worker", "--port", str(port), *options]
    log = Path(installation.environ["BILLING_STATE_DIR"], f"server-{port}.log")
    with started(OURS, command, installation.environ, port=port, log=log) as server:
        yield server


@contextmanager
def peer(
    name: str, installation: Installation, population: Population, *, port: int, quiet: bool
) -> Iterator[Server]:
    """One of `PEERS` on the same database."""
    chosen = PEERS[name]
    arguments = [
        argument.format(port=port) for argument in (*chosen.arguments, *(chosen.quiet if quiet else ()))
    ]
    log = Path(installation.environ["BILLING_STATE_DIR"], f"{name}.log")
    environ = environ_of_peers(installation, population)
    with started(name, [str(BENCH_BIN / "python"), *arguments], environ, port=port, log=log) as server:
        yield server


def environ_of_peers(installation: Installation, population: Population) -> dict[str, str]:
    cluster, (pepper_id, pepper) = installation.cluster, installation.settings.key_peppers.first
    return {
        "PGHOST": str(cluster.socket_dir),
        "PGPORT": str(cluster.port),
        "PGUSER": PEER,
        "PGPASSWORD": PEER,
        "PGDATABASE": NAME,
        "KEY_PEPPER_ID": pepper_id,
        "KEY_PEPPER": pepper.hex(),
        "JWT_SECRET": population.jwt_secret,
        "DJANGO_SETTINGS_MODULE": "benchmarks.peers.drf.settings",
    }


@contextmanager
def started(
    name: str, command: Sequence[str], environ: Mapping[str, str], *, port: int, log: Path
) -> Iterator[Server]:
    """Run a process that listens at the port, until the end of the block."""
    with (
        open(log, "ab") as sink,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        ) as process,
    ):
        server = Server(name, process, port, log)
        try:
            await_answer(server)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)


def await_answer(server: Server) -> None:
    """Wait until the server answers anything; raises `RuntimeError` with its log if it ends before, or takes too long.

    Ours listens before it can answer: connections made meanwhile wait.
    """
    deadline = time.monotonic() + START_SECONDS
    while not answers(server.port):
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.name} does not start:\n{server.log.read_text()[-2000:]}")
        time.sleep(POLL_SECONDS)


def answers(port: int) -> bool:
    """Whether a server at the port answers, with whatever status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status > 0
    except ConnectionError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
