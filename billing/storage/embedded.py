"""A private PostgreSQL in the state directory, shared by every process that asks for one.

It rests on two file locks, because the kernel releases a flock however its holder dies. `postgres.use` is held,
shared, by each process that uses the server. `postgres.lock` is held, through one inherited descriptor, by
the watcher, by postgres and by its children: a process that gets it knows that no part of a former server is
alive, and starts the next. The watcher (`python -m billing.storage.embedded`) is the parent of postgres. It stops
postgres when it gets `postgres.use` exclusively; on Linux the kernel stops postgres when the watcher is killed. In
each process that uses the server a thread tries `postgres.lock`: that is how a killed server is restarted.

    STATE_DIR/postgres.use  postgres.lock  postgres.log
    STATE_DIR/postgres/data  run/.s.PGSQL.5432  password    made as postgres.new, renamed when complete
    STATE_DIR/postgresql-18.4/                              a copy of the binaries, where one is needed
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from billing.storage import binaries
from billing.storage.binaries import Account, Binaries, EmbeddedPostgresError

__all__ = ["Cluster", "EmbeddedPostgresError", "Server", "start"]

PORT = 5432  # A part of the socket's name only: nothing listens on TCP.
SUPERUSER = "postgres"
SOCKET_PATH_BYTES = 100  # The kernel takes 103 (macOS) or 107.
POLL_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
LOG_BYTES = 1_000_000
PR_SET_PDEATHSIG = 1

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # Statements bear secrets: none may reach the log, neither with an error nor as the detail of a crash. So no error
    # is logged at all, not even a deadlock: `pg_stat_database` counts those.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
}

log = logging.getLogger(__name__)


# What a caller sees -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What a caller needs to connect."""

    socket_dir: Path
    port: int
    superuser: str
    password: str = field(repr=False)

    def url(self, database: str, *, user: str | None = None, password: str | None = None) -> str:
        """A URL for SQLAlchemy, over the unix socket; as the superuser unless a user is given."""
        user, password = (user, password) if user else (self.superuser, self.password)
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        where = f"host={quote(str(self.socket_dir), safe='')}&port={self.port}"
        return f"postgresql+psycopg2://{login}@/{quote(database, safe='')}?{where}"


class Server:
    """A use of the shared server, until `close` or the end of the process (and of its forked children).

    While it lasts, a thread restarts the server, on the same socket, if it was killed.
    """

    def __init__(self, cluster: Cluster, use: int, revive: Callable[[], bool]) -> None:
        self.cluster = cluster
        self._use = use
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, args=(revive,), name="postgres", daemon=True)
        self._keeper.start()

    def _keep(self, revive: Callable[[], bool]) -> None:
        pause = POLL_SECONDS
        while not self._closed.wait(pause):
            try:
                quiet = not revive()
            except (EmbeddedPostgresError, OSError):  # Such as one descriptor too many.
                log.exception("The embedded PostgreSQL cannot be revived yet")
                quiet = False
            pause = POLL_SECONDS if quiet else min(2 * pause, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        """End the use; the server stops soon after the last one. Closing twice is harmless."""
        if not self._closed.is_set():
            self._closed.set()
            self._keeper.join()
            os.close(self._use)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    state_dir: Path,
    *,
    bin_dir: Path | None = None,
    options: Mapping[str, str] = {},
    timeout_seconds: float = 60,
) -> Server:
    """Use the server of `state_dir`; make it and start it if need be.

    `bin_dir` holds PostgreSQL's programs, where those of the wheel are not wanted. `options` are settings of
    postgres; they apply only if this process starts it. As root, the directory is made passable (`o+x`) for the
    user who runs postgres. Raises EmbeddedPostgresError.
    """
    deadline = time.monotonic() + timeout_seconds
    with ExitStack() as undo:
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            place = Place(state_dir, bin_dir)
            use = _use(place, deadline)
            undo.callback(os.close, use)
            cluster = _await(place, options, deadline)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The state directory {state_dir} cannot be used ({error}): "
                "set BILLING_STATE_DIR to one that belongs to this user."
            ) from error
        undo.pop_all()
    return Server(cluster, use, lambda: _revive(place, options))


# Where things are ---------------------------------------------------------------------------------


class Place:
    """The files of one server."""

    def __init__(self, state_dir: Path, bin_dir: Path | None) -> None:
        self.bin_dir = bin_dir
        self.state_dir = state_dir.resolve()
        self.use = self.state_dir / "postgres.use"
        self.lock = self.state_dir / "postgres.lock"
        self.log = self.state_dir / "postgres.log"
        self.home = self.state_dir / "postgres"
        self.data = self.home / "data"

    def cluster(self) -> Cluster:
        """Raises FileNotFoundError before the first start."""
        password = (self.home / "password").read_text()
        return Cluster(self._socket_dir(password), PORT, SUPERUSER, password)

    def _socket_dir(self, password: str) -> Path:
        near = self.home / "run"
        # With a comma in it, libpq would take it for two hosts.
        if len(os.fsencode(near / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES and "," not in str(near):
            return near
        # Not $TMPDIR, which may differ between our processes. The name cannot be guessed, and so not taken.
        return Path("/tmp", f"billing-{hashlib.sha256(password.encode()).hexdigest()[:20]}")  # noqa: S108

    def failure(self, what: str) -> EmbeddedPostgresError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return EmbeddedPostgresError("\n".join([f"{what}. The end of {self.log}:", *lines[-8:]]))


# The two locks ------------------------------------------------------------------------------------


def _take(lock: Path, operation: int) -> int | None:
    """Return a descriptor that holds the lock, or None while a conflicting lock is held."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _use(place: Place, deadline: float) -> int:
    while (use := _take(place.use, fcntl.LOCK_SH)) is None:
        if time.monotonic() > deadline:
            raise place.failure(f"The PostgreSQL in {place.home} is being stopped, and does not end")
        time.sleep(POLL_SECONDS / 8)
    return use


def _await(place: Place, options: Mapping[str, str], deadline: float) -> Cluster:
    revived = False
    while (cluster := _answering(place)) is None:
        if time.monotonic() > deadline:
            raise place.failure(f"The PostgreSQL in {place.home} does not answer in time")
        if revived and _is_down(place):
            raise place.failure(f"The PostgreSQL in {place.home} ended while it was starting")
        revived = revived or _revive(place, options)
        time.sleep(POLL_SECONDS / 8)
    return cluster


def _answering(place: Place) -> Cluster | None:
    import psycopg2  # Here, because the watcher runs without site-packages.

    try:
        cluster = place.cluster()
        psycopg2.connect(
            host=str(cluster.socket_dir),
            port=cluster.port,
            user=cluster.superuser,
            password=cluster.password,
            dbname="postgres",
            connect_timeout=2,
        ).close()
    except (FileNotFoundError, psycopg2.OperationalError):
        return None
    return cluster


def _is_down(place: Place) -> bool:
    lock = _take(place.lock, fcntl.LOCK_EX)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _revive(place: Place, options: Mapping[str, str]) -> bool:
    """Start the server if no part of it is alive; returns whether it did."""
    try:
        lock = _take(place.lock, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            _launch(place, options, lock)
        finally:
            os.close(lock)
    except (OSError, subprocess.SubprocessError) as error:
        raise place.failure(f"PostgreSQL cannot be started in {place.home}: {error}") from error
    return True


# Starting -----------------------------------------------------------------------------------------


def _launch(place: Place, options: Mapping[str, str], lock: int) -> None:
    """Make what is missing, and hand the lock on to a new watcher."""
    account = binaries.account_for(place.data)
    _let_in(account, place.state_dir)
    chosen = binaries.within_reach(binaries.find(place.data, place.bin_dir), account, place.state_dir)
    if not place.home.exists():
        _initialise(place, chosen, account, lock)
    socket_dir = place.cluster().socket_dir
    _ensure_socket_dir(socket_dir, account)
    _drop_stale_pid_files(place.data, socket_dir)
    settings = {**SETTINGS, "unix_socket_directories": f'"{socket_dir}"', **options}
    command = [str(chosen.directory / "postgres"), "-D", str(place.data), "-p", str(PORT)]
    _spawn_watcher(place, account, lock, command + [f"--{name}={value}" for name, value in settings.items()])


def _let_in(account: Account, state_dir: Path) -> None:
    if not account.may_execute(state_dir.parent):
        raise EmbeddedPostgresError(
            f"PostgreSQL refuses to run as root, and user {account.uid}, who is to run it, cannot get "
            f"into {state_dir.parent}: set BILLING_STATE_DIR to a place that everybody may reach."
        )
    if not account.may_execute(state_dir):
        state_dir.chmod(stat.S_IMODE(state_dir.stat().st_mode) | stat.S_IXOTH)


def _initialise(place: Place, chosen: Binaries, account: Account, lock: int) -> None:
    """Make the cluster and its password under another name; one rename completes both."""
    new = place.home.with_name("postgres.new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
    # Root owns this directory, so that the account cannot place a symlink in it for root to follow.
    new.chmod(0o711 if account.popen else 0o700)
    account.make_dir(new / "data")
    account.make_dir(new / "run")
    account.write(new / "password", secrets.token_urlsafe(32))
    # initdb outlives us if we are killed; as it holds the lock, nobody removes the directory under it.
    chosen.initdb(new / "data", SUPERUSER, new / "password", account=account, keep_open=lock)
    _sync(new)
    new.rename(place.home)
    _sync(place.state_dir)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _ensure_socket_dir(path: Path, account: Account) -> None:
    with suppress(FileExistsError):
        account.make_dir(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o077:
        raise EmbeddedPostgresError(f"{path} should be a directory of user {account.uid} alone: remove it.")


def _drop_stale_pid_files(data: Path, socket_dir: Path) -> None:
    """Remove pid files that keep postgres from starting because their pid is another process's, or a zombie's.

    No server of ours is alive, since we hold the lock; the files of a postmaster started by hand are kept.
    """
    for file in (data / "postmaster.pid", socket_dir / f".s.PGSQL.{PORT}.lock"):
        # No file, no pid, no permission, no /proc: then postgres itself decides, and correctly.
        with suppress(OSError, IndexError):
            process = Path("/proc", file.read_text().split()[0])
            if process.exists() and not _works_in(process, data):
                file.unlink()


def _works_in(process: Path, directory: Path) -> bool:
    try:
        return (process / "cwd").readlink() == directory
    except FileNotFoundError:  # A zombie, which a container's first process may never reap.
        return False


def _spawn_watcher(place: Place, account: Account, lock: int, command: list[str]) -> None:
    if place.log.exists() and place.log.stat().st_size > LOG_BYTES:
        place.log.replace(place.log.with_suffix(".log.1"))
    watcher = [sys.executable, "-S", "-m", __name__, str(lock), str(place.use)]
    with open(
        os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "a"
    ) as log_file:
        subprocess.run(
            [*watcher, str(account.uid), str(account.gid), *command],
            # A session of its own: Ctrl-C must not end postgres before the application has closed its pool.
            start_new_session=True,
            pass_fds=(lock,),
            cwd="/",
            env={**binaries.environment(), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            check=True,
        )


# The watcher --------------------------------------------------------------------------------------


def _watch(lock: int, use: Path, account: Account, command: list[str]) -> None:
    """Run postgres until it ends, or until no process uses it."""
    # A signal to all processes (systemd) reaches the server's users too: postgres stops when they have ended.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    postgres = subprocess.Popen(command, **account.popen, pass_fds=(lock,), preexec_fn=_end_with(os.getpid()))
    while postgres.poll() is None and _take(use, fcntl.LOCK_EX) is None:
        time.sleep(POLL_SECONDS)
    postgres.send_signal(signal.SIGINT)
    print(f"watcher: postgres ended ({postgres.wait()})", flush=True)


def _end_with(parent: int) -> Callable[[], None] | None:
    """Tie a child's life to its parent's; without it (macOS) postgres outlives a watcher that is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def arm() -> None:
        # subprocess calls this after changing the user, which would have cleared the signal (prctl(2)).
        # SIGINT is the fast shutdown, which leaves nothing to recover.
        prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)

    return arm


def main(arguments: list[str]) -> None:
    """Watch; `arguments` are the lock's descriptor, the use file, uid, gid, and the command of postgres."""
    lock, use, uid, gid, *command = arguments
    # The starter waits for the first process; the second is not its child, and leaves it no zombie.
    if os.fork() == 0:
        _watch(int(lock), Path(use), Account(int(uid), int(gid)), command)


if __name__ == "__main__":
    main(sys.argv[1:])
