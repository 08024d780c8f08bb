"""A streaming replica of the tests' PostgreSQL, made by its programs: it can be stopped, paused, killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, create_engine, exc, text

from billing.storage import binaries, embedded
from billing.storage.embedded import Cluster
from tests.conftest import VOLATILE

PATIENCE_SECONDS = 30


@dataclass
class Standby:
    """A replica, and its superuser."""

    cluster: Cluster
    command: list[str]
    account: binaries.Account
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                **self.account.popen,
                cwd="/",
                env=binaries.environment(),
                stdout=log,
                stderr=log,
            )
        eventually(self.answers, self.log)

    def answers(self) -> bool:
        try:
            return bool(self.ask("SELECT pg_is_in_recovery()"))
        except exc.OperationalError:
            return False

    def ask(self, question: str) -> object:
        engine = self.engine()
        try:
            with engine.connect() as connection:
                return connection.scalar(text(question))
        finally:
            engine.dispose()

    def engine(self) -> Engine:
        return create_engine(self.cluster.url("postgres"), isolation_level="AUTOCOMMIT")

    def kill(self) -> None:
        """End all of its processes at once, as a failing machine would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(PATIENCE_SECONDS)
            self.process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Receive WAL, but replay none of it."""
        self.ask("SELECT pg_wal_replay_pause()")
        eventually(lambda: self.ask("SELECT pg_get_wal_replay_pause_state()") == "paused", self.log)
        try:
            yield
        finally:
            self.ask("SELECT pg_wal_replay_resume()")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Suspend all of its processes."""
        assert self.process is not None
        pids = [self.process.pid, *children_of(self.process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def catch_up(self, primary: Engine) -> str:
        """Wait until all WAL written so far is replayed; return its position. Others may write meanwhile."""
        with primary.connect() as connection:
            # The two report a position at the end of a page differently: one more record settles it.
            connection.execute(text("SELECT pg_logical_emit_message(true, 'test', '')"))
            written: str = connection.execute(text("SELECT pg_current_wal_insert_lsn()::text")).scalar_one()
        question = f"SELECT pg_last_wal_replay_lsn() >= '{written}'"
        eventually(lambda: bool(self.ask(question)), self.log)
        return written


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(child) for child in listed.stdout.split()]


def eventually(condition: object, log: Path) -> None:
    assert callable(condition)
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, log.read_text(errors="replace")[-2000:]
        time.sleep(0.05)


@contextmanager
def standby_of(primary: Cluster, state: Path, chosen: Path | None, name: str) -> Iterator[Standby]:
    """A replica that runs for the duration of the block."""
    data = embedded.Place(state, chosen).data
    account = binaries.account_for(data)
    programs = binaries.within_reach(binaries.find(data, chosen), account, state).directory
    # Short, because the path of a socket is limited.
    home = state / name
    account.make_dir(home)
    try:
        copy(primary, programs, account, home / "data")
        cluster = Cluster(home, primary.port, primary.superuser, primary.password)
        # The name by which a primary knows it.
        own = {"unix_socket_directories": str(home), "cluster_name": name}
        settings = {**embedded.SETTINGS, **VOLATILE, **own}
        command = [str(programs / "postgres"), "-D", str(home / "data"), "-p", str(primary.port)]
        log = state / f"{name}.log"
        standby = Standby(
            cluster, command + [f"--{key}={value}" for key, value in settings.items()], account, log
        )
        try:
            standby.start()
            yield standby
        finally:
            standby.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def copy(primary: Cluster, programs: Path, account: binaries.Account, data: Path) -> None:
    where = [f"--host={primary.socket_dir}", f"--port={primary.port}", f"--username={primary.superuser}"]
    command = [str(programs / "pg_basebackup"), f"--pgdata={data}", *where]
    done = subprocess.run(
        [*command, "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"],
        **account.popen,
        cwd="/",
        env={**binaries.environment(), "PGPASSWORD": primary.password},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
