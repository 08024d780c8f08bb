"""A private installation on a PostgreSQL of its own; and the CPU time and memory of processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import NullPool, create_engine, text

from billing.encryption import Vault
from billing.settings import Settings
from billing.storage import database, embedded
from billing.storage.store import Store

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 30


@dataclass(frozen=True)
class Installation:
    """A private installation: its store, and what is needed to start and observe its processes."""

    store: Store
    settings: Settings
    environ: Mapping[str, str]
    postmaster: int
    postgres_version: str
    cluster: embedded.Cluster

    @property
    def postgres_processes(self) -> list[int]:
        return [self.postmaster, *children_of(self.postmaster)]

    def postgres_seconds(self) -> float:
        """The CPU time of PostgreSQL, including closed connections."""
        return sum(cpu_seconds(pid, ended=True) for pid in self.postgres_processes)


@contextmanager
def installed(postgres: Mapping[str, str] = {}, /, **variables: str) -> Iterator[Installation]:
    """An installation on disk, fully durable, with these settings of PostgreSQL and of ours; removed with the block."""
    with state_directory() as state_dir:
        given = {"ENVIRONMENT": "development", "RATE_LIMITS": "off", **variables}
        environ = {"BILLING_STATE_DIR": str(state_dir), **given}
        settings = Settings.load(environ, dotenv=None)
        with (
            closing(database.open_embedded(state_dir, options=dict(postgres))) as opened,
            closing(Store(Vault(settings.encryption_keys), connections=4)) as store,
        ):
            store.open(opened.app_url)
            postmaster = int((state_dir / "postgres/data/postmaster.pid").read_text().split()[0])
            assert opened.server is not None
            version = version_of(opened.app_url)
            yield Installation(store, settings, environ, postmaster, version, opened.server.cluster)


@contextmanager
def state_directory() -> Iterator[Path]:
    """A directory on disk, removed once PostgreSQL no longer uses it."""
    made = Path(tempfile.mkdtemp(prefix="billing-benchmark-"))
    made.chmod(0o711)  # Root runs PostgreSQL as another user, who must get in.
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


# What a process has spent ------------------------------------------------------------------------


def cpu_seconds(pid: int, *, ended: bool = False) -> float:
    """The CPU time of a process, with `ended` also that of its ended children; 0 if it is gone itself."""
    times = fields_of(pid)[11:15]
    return sum(map(int, times if ended else times[:2])) / TICKS_A_SECOND


def children_of(parent: int) -> list[int]:
    pids = [int(directory.name) for directory in Path("/proc").iterdir() if directory.name.isdigit()]
    return [pid for pid in pids if fields_of(pid)[1:2] == [str(parent)]]


def fields_of(pid: int) -> list[str]:
    """The fields of a process's `stat` in proc(5), from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def megabytes(pid: int) -> float:
    """The proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def eventually(holds: Callable[[], bool], *, within_seconds: float = STOP_SECONDS) -> None:
    deadline = time.monotonic() + within_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("It never came about.")
        time.sleep(0.05)
