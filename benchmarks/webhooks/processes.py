"""What is measured: a PostgreSQL and a worker of its own, receivers, and what each has spent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import NullPool, create_engine, text

from benchmarks.webhooks.receiver import Seen
from billing.encryption import Vault
from billing.settings import Settings
from billing.storage import database
from billing.storage.store import Store

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 30
# Loopback is opened as development may.
OPENED = {
    "WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128",
    "WEBHOOK_ALLOW_HTTP": "on",
    "ENVIRONMENT": "development",
}


@dataclass(frozen=True)
class Installation:
    """A platform that nobody else uses: its store, and how its processes are started and watched."""

    store: Store
    settings: Settings
    environ: Mapping[str, str]
    postmaster: int
    postgres_version: str

    def postgres_seconds(self) -> float:
        """The CPU time of PostgreSQL, with that of connections that have ended."""
        return sum(cpu_seconds(pid, ended=True) for pid in [self.postmaster, *children_of(self.postmaster)])


@contextmanager
def installed() -> Iterator[Installation]:
    """An installation on disk, as durable as any, removed with the block."""
    with state_directory() as state_dir:
        environ = {"BILLING_STATE_DIR": str(state_dir), **OPENED}
        settings = Settings.load(environ, dotenv=None)
        with (
            closing(database.open_embedded(state_dir)) as opened,
            closing(Store(Vault(settings.encryption_keys), connections=4)) as store,
        ):
            store.open(opened.app_url)
            postmaster = int((state_dir / "postgres/data/postmaster.pid").read_text().split()[0])
            yield Installation(store, settings, environ, postmaster, version_of(opened.app_url))


@contextmanager
def state_directory() -> Iterator[Path]:
    """A directory on disk, removed when PostgreSQL has let go of it."""
    made = Path(tempfile.mkdtemp(prefix="billing-benchmark-"))
    made.chmod(0o711)  # Root gives PostgreSQL away, and its owner must get in.
    try:
        yield made
    finally:
        eventually(lambda: is_removed(made))


def is_removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def version_of(url: str) -> str:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return str(connection.scalar(text("SHOW server_version")))


@contextmanager
def working(installation: Installation) -> Iterator[int]:
    """A `billing worker`, ended with the block; its process id."""
    command = [sys.executable, "-m", "billing.cli", "worker", "--while-stdin-is-open"]
    environ = {**os.environ, **installation.environ}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_SECONDS)


@dataclass(frozen=True)
class Receivers:
    """The URLs of one that answers, one that never does, one that refuses; and what the first has seen."""

    healthy: str
    silent: str
    refusing: str
    seen: Callable[[], Seen]


@contextmanager
def receiving() -> Iterator[Receivers]:
    """Receivers as long as the block."""
    command = [sys.executable, "-m", "benchmarks.webhooks.receiver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def seen() -> Seen:
            print(file=questions, flush=True)
            found = Seen(**json.loads(answers.readline()))
            found.numbered = {int(number): at for number, at in found.numbered.items()}
            return found

        healthy, silent, refusing = (f"http://localhost:{port}/" for port in json.loads(answers.readline()))
        yield Receivers(healthy, silent, refusing, seen)
        questions.close()


# What a process has spent ------------------------------------------------------------------------


def cpu_seconds(pid: int, *, ended: bool = False) -> float:
    """The CPU time of a process, perhaps with that of its children that have ended; 0 if it is gone itself."""
    times = fields_of(pid)[11:15]
    return sum(map(int, times if ended else times[:2])) / TICKS_A_SECOND


def children_of(parent: int) -> list[int]:
    pids = [int(directory.name) for directory in Path("/proc").iterdir() if directory.name.isdigit()]
    return [pid for pid in pids if fields_of(pid)[1:2] == [str(parent)]]


def fields_of(pid: int) -> list[str]:
    """What proc(5) says of a process, from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def eventually(holds: Callable[[], bool], *, within_seconds: float = STOP_SECONDS) -> None:
    deadline = time.monotonic() + within_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("It never came about.")
        time.sleep(0.05)
