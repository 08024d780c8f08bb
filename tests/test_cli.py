"""The command line: how a server starts, drains and stops, and the commands of an operator."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import requests
import structlog
from click.testing import CliRunner, Result
from dotenv import dotenv_values
from sqlalchemy import create_engine, text

from billing.cli import companion, main
from billing.cli.companion import END_SECONDS, Companion
from billing.cli.console import Moment
from billing.settings import KEYRINGS, Settings
from billing.storage import database
from billing.storage.database import Database
from billing.webhooks import replay
from tests.rawhttp import Connection, request
from tests.receivers import Received, Receiver, answers, receiving

ROOT = Path(__file__).parents[1]
API = "/api/v1/auth/tenants"
PASSWORD = "SecurePass123!"
OTHER_PASSWORD = "NewSecurePassword456!"
PATIENCE_SECONDS = 30
START_SECONDS = 90
VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

BILLING = (sys.executable, "-m", "billing.cli")
APP = (sys.executable, str(ROOT / "app.py"))


# Processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    """A state directory, in memory where possible; any user may enter it, as root runs PostgreSQL as another."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="billing-cli-", dir=memory if memory.is_dir() else None))
    made.chmod(0o711)
    yield made
    eventually(lambda: is_removed(made))  # PostgreSQL stops soon after its last user, not at once.


@pytest.fixture(scope="module")
def embedded(state_dir: Path) -> Iterator[Database]:
    """The database there, which all tests below share."""
    with contextlib.closing(database.open_embedded(state_dir, options=VOLATILE)) as opened:
        yield opened


@pytest.fixture(scope="module")
def environ(state_dir: Path, embedded: Database) -> dict[str, str]:
    """The whole environment of a command."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ours = {"BILLING_STATE_DIR": str(state_dir), "PASSWORD_COST": "4", "RATE_LIMITS": "off"}
    loopback = {"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128", "WEBHOOK_ALLOW_HTTP": "on"}
    return kept | ours | loopback | {"PYTHONPATH": str(ROOT)}


@dataclass
class Server:
    """A `billing serve`: its process, its address, its log."""

    process: subprocess.Popen[str]
    banner: dict[str, str]
    log: Path

    @property
    def url(self) -> str:
        return self.banner["Docs"].removesuffix("/docs/")

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def events(self, start: str) -> list[str]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line["event"] for line in lines if line["event"].startswith(start)]

    def workers(self) -> list[int]:
        return [int(event.rpartition("[")[2].rstrip("]")) for event in self.events("Started server process")]

    def await_started(self, *, workers: int) -> None:
        started = "Application startup complete"
        eventually(lambda: len(self.events(started)) >= workers, seconds=START_SECONDS)

    def companions(self) -> list[int]:
        """The processes of its companion."""
        return companions_of(self.process.pid)

    def await_companion(self, *, other_than: int = 0) -> int:
        """The companion, once it runs."""
        eventually(lambda: any(pid != other_than for pid in self.companions()))
        [companion] = self.companions()
        return companion

    def call(self, method: str, path: str, token: str | None = None, **body: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.request(
            method, f"{self.url}{API}{path}", json=body or None, headers=headers, timeout=10
        )

    def log_in(self, email: str, password: str) -> requests.Response:
        return self.call("POST", "/login/", email=email, password=password)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(
    environ: dict[str, str], *options: str, command: tuple[str, ...] = (*BILLING, "serve")
) -> Iterator[Server]:
    """A server on a free port, stopped at the end of the block."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".log") as log,
        subprocess.Popen(
            [*command, "--port", "0", *options],
            env=environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            server = Server(process, banner_of(process, Path(log.name)), Path(log.name))
            # It listens before it can answer, and on a busy machine importing takes seconds.
            requests.get(f"{server.url}/healthz", timeout=START_SECONDS)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE_SECONDS)


def banner_of(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    assert process.stdout
    banner: dict[str, str] = {}
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            return banner
        name, _, what = line.rstrip().partition("  ")
        banner[name] = what.strip()
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def server(environ: dict[str, str]) -> Iterator[Server]:
    with serving(environ) as server:
        yield server


def eventually(holds: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.05)


def is_removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A container's first process may never reap a zombie.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def companions_of(server: int) -> list[int]:
    """The `billing worker`s that are children of this process."""
    processes = (directory.name for directory in Path("/proc").iterdir() if directory.name.isdigit())
    return [int(pid) for pid in processes if parent_of(pid) == server and "worker" in command_of(pid)]


def parent_of(pid: str) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def command_of(pid: str) -> list[str]:
    """Empty for a process that has ended, even if it has not been waited for yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


# Commands ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` is in the current directory, and no setting in the environment that the test did not set."""
    monkeypatch.chdir(tmp_path)
    for name in ("BILLING_STATE_DIR", "DATABASE_URL", "MIGRATION_DATABASE_URL", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)


Run = Callable[..., Result]


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    def run(*arguments: str, input: str | bytes | None = None, code: int = 0, **more: str) -> Result:
        result = CliRunner().invoke(main, arguments, input=input, env=environ | more)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


def run_process(environ: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BILLING, *arguments],
        env=environ | more,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def sentence(stderr: str) -> str:
    """The one line on stderr."""
    assert stderr.startswith("Error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("Error: ").rstrip()


# Without a database --------------------------------------------------------------------------------


def commands(command: click.Command, name: str = "billing") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from commands(child, f"{name} {child.name}")


@pytest.mark.parametrize(("name", "command"), [pytest.param(*each, id=each[0]) for each in commands(main)])
def test_help_shows_usage_and_an_example(name: str, command: click.Command) -> None:
    output = CliRunner().invoke(main, [*name.split()[1:], "--help"]).stdout

    assert output.startswith(f"Usage: {name} ")
    assert "Example:\n" in output and name in output.partition("Example:\n")[2]


@pytest.mark.parametrize(("hard", "allowed"), [(8192, 4096), (4096, 4096), (512, 512)])
def test_the_descriptor_limit_is_raised_as_far_as_allowed(hard: int, allowed: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < hard:
        pytest.skip(f"This process may have {most} descriptors, and only root may raise that.")
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); "
        "from billing.cli.console import allow_descriptors; allow_descriptors(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == allowed


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("billing, version ")


def test_generated_secrets_are_all_that_production_requires() -> None:
    made = CliRunner().invoke(main, ["secrets", "generate"])
    given = {name: value or "" for name, value in dotenv_values(stream=io.StringIO(made.stdout)).items()}
    rest = {"DATABASE_URL": "postgresql://db/billing", "PUBLIC_BASE_URL": "https://billing.example"}

    assert set(given) == set(KEYRINGS)
    loaded = Settings.load({"ENVIRONMENT": "production", **rest, **given}, dotenv=None)
    assert loaded.environment == "production"
    assert "secrets" in made.stderr and made.stderr.count("\n") == 1


def test_generated_secrets_differ_each_time() -> None:
    made = [CliRunner().invoke(main, ["secrets", "generate"]).stdout for _ in range(2)]

    assert not set(made[0].splitlines()) & set(made[1].splitlines())


def test_bootstrap_sql_needs_no_settings() -> None:
    result = CliRunner().invoke(main, ["migrate", "--bootstrap-sql"], env={"PORT": "none"})

    assert result.exit_code == 0
    assert (
        "CREATE ROLE billing_app" in result.stdout
        and "CREATE DATABASE billing OWNER billing_owner" in result.stdout
    )


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({"PORT": "none"}, "serve", "PORT must be a whole number"),
        ({"ENVIRONMENT": "production"}, "serve", "JWT_KEYS"),
        (
            {"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"},
            "users list --tenant acme",
            "cannot be reached",
        ),
        (
            {"DATABASE_URL": "postgresql://me:hunter2@host:port/x"},
            "tenants list",
            "DATABASE_URL must be like",
        ),
        (
            {"DATABASE_URL": "postgresql://me:sec@hunter2@127.0.0.1:1/x"},
            "tenants list",
            "DATABASE_URL must be like",
        ),
        *(
            (
                {"RATE_LIMIT_STORAGE_URL": f"redis{url}=hunter2"},
                "serve --workers 2",
                "RATE_LIMIT_STORAGE_URL must have only parameters that redis-py knows",
            )
            for url in ("://cache/0?max_conections", "://cache/0?socket_timeout", "s://cache/0?ssl_cert_reqs")
        ),
        (
            {"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x?ssl=hunter2"},
            "serve",
            "DATABASE_URL must have only parameters that libpq knows",
        ),
        (
            {"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"},
            "migrate",
            "MIGRATION_DATABASE_URL is missing",
        ),
        (
            {"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"},
            "tenants list",
            "MIGRATION_DATABASE_URL is missing",
        ),
        (
            {
                "DATABASE_URL": "postgresql://127.0.0.1:1/x",
                "MIGRATION_DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x",
            },
            "migrate",
            "cannot be reached",
        ),
    ],
)
def test_an_invalid_setup_is_a_one_line_error(
    tmp_path: Path, settings: dict[str, str], arguments: str, expected: str
) -> None:
    environ = {"BILLING_STATE_DIR": str(tmp_path), **settings}

    ended = CliRunner().invoke(main, arguments.split(), env=environ)

    assert ended.exit_code == 1
    assert expected in sentence(ended.stderr)
    assert "hunter2" not in ended.output


@pytest.mark.parametrize(
    "arguments",
    [
        "serve --no-such",
        "serve --port 65536",
        "serve --workers 0",
        "serve --workers 2 --reload",
        "users add",
        "nothing",
    ],
)
def test_2_for_wrong_usage(arguments: str) -> None:
    assert CliRunner().invoke(main, arguments.split()).exit_code == 2


@pytest.mark.parametrize("arguments", ["tenants set-tier NAME pro", "audit list NAME", "NAME"])
def test_2_for_arguments_that_are_not_text(arguments: str) -> None:
    ended = CliRunner().invoke(main, arguments.replace("NAME", os.fsdecode(b"a\xff")).split())

    assert ended.exit_code == 2
    assert ended.stderr.endswith("Error: Arguments must be text in UTF-8.\n")


def test_a_full_disk_is_a_one_line_error() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*BILLING, "secrets", "generate"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert ended.returncode == 1
    assert ended.stderr.endswith("\nError: Cannot write: No space left on device.\n")


# Serving -------------------------------------------------------------------------------------------


def test_serve_prints_its_addresses_and_locations(server: Server, state_dir: Path) -> None:
    assert server.banner["Environment"] == "development"
    assert server.banner["State"] == str(state_dir)
    assert server.banner["Database"] == f"embedded PostgreSQL in {state_dir}"
    assert requests.get(server.banner["Docs"], timeout=10).status_code == 200
    # The base URL follows the port.
    assert requests.get(server.banner["Document"], timeout=10).json()["servers"][0]["url"] == server.url
    assert requests.post(f"{server.banner['API']}login/", timeout=10).status_code == 400


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://me:hunter2@db.example/billing", "db.example/billing"),
        ("postgresql://me:hunter2@db.example:5433/billing?sslmode=verify-full", "db.example:5433/billing"),
        ("postgresql://me:hunter2@/billing?host=one:5432&host=two:5432", "one:5432,two:5432/billing"),
    ],
)
def test_an_external_database_is_shown_without_its_password(url: str, place: str) -> None:
    assert Database(url, None).place == place


def test_responses_have_a_date_but_no_server_header(server: Server) -> None:
    answer = requests.get(f"{server.url}/healthz", headers={"X-Forwarded-For": "1.2.3.4"}, timeout=10)

    assert answer.status_code == 200
    assert "Date" in answer.headers and "Server" not in answer.headers


def test_sigterm_lets_a_request_in_flight_finish(environ: dict[str, str]) -> None:
    body = json.dumps({"email": "nobody@acme.example", "password": PASSWORD}).encode()
    head = request(
        "POST",
        f"{API}/login/",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Expect: 100-continue",
    )
    with serving(environ) as server, Connection(server.address, timeout_seconds=10) as slow:
        slow.send(head)
        assert slow.receive().status == 100
        server.process.terminate()
        eventually(lambda: refuses_connections(server))
        slow.send(body)

        assert slow.receive().code == "invalid-credentials"
        assert server.process.wait(PATIENCE_SECONDS) == 0
        assert server.events("Application shutdown complete")


def refuses_connections(server: Server) -> bool:
    try:
        Connection(server.address).__exit__()
    except ConnectionError:
        return True
    return False


def test_app_py_serves_until_sigint(environ: dict[str, str]) -> None:
    with serving(environ, command=(*APP,)) as server:
        server.await_started(workers=1)
        server.await_companion()

        assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
        assert server.end(signal.SIGINT) == 0
        assert len(server.workers()) == 1


def test_a_signal_during_startup_ends_the_server(environ: dict[str, str]) -> None:
    with serving(environ) as server:
        assert server.end() == 0


def test_a_port_in_use_is_a_one_line_error(server: Server, environ: dict[str, str]) -> None:
    port = server.address[1]

    ended = run_process(environ, "serve", "--port", str(port))

    assert ended.returncode == 1
    assert sentence(ended.stderr).startswith(f"Port {port} of 127.0.0.1 is in use")


def test_an_overprivileged_database_role_is_a_one_line_error(
    environ: dict[str, str], embedded: Database
) -> None:
    assert embedded.server
    url = embedded.server.cluster.url(database.NAME)

    ended = run_process(environ, "serve", "--port", "0", DATABASE_URL=url)

    assert ended.returncode == 1
    assert sentence(ended.stderr).endswith("connect as billing_app.")


def test_an_unreachable_database_is_a_one_line_error(environ: dict[str, str]) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/x"

    ended = run_process(environ, "serve", "--port", "0", DATABASE_URL=url)

    assert ended.returncode == 1
    assert sentence(ended.stderr).startswith("The database cannot be reached: ")
    assert "hunter2" not in ended.stdout + ended.stderr


def test_a_database_without_tables_is_a_one_line_error(run: Run, embedded: Database) -> None:
    assert embedded.server
    url = database.url(embedded.server.cluster, database.APP, "postgres")

    ended = run("users", "list", "--tenant", "acme", code=1, DATABASE_URL=url)

    assert sentence(ended.stderr).endswith("run `billing migrate`.")


def test_a_killed_server_process_is_replaced_and_all_end_with_the_supervisor(environ: dict[str, str]) -> None:
    with serving(environ, "--workers", "2") as server:
        server.await_started(workers=2)
        os.kill(server.workers()[0], signal.SIGKILL)
        server.await_started(workers=3)
        assert all(requests.get(f"{server.url}/readyz", timeout=10).ok for _ in range(10))
        companion = server.await_companion()

        server.end(signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, [*server.workers(), companion])))
        assert refuses_connections(server)


def test_two_servers_can_share_a_state_directory(server: Server, environ: dict[str, str]) -> None:
    tokens = register(server, "Shared Ltd.")["tokens"]
    with serving(environ, "--workers", "2") as other:
        other.await_started(workers=2)
        companion = other.await_companion()
        assert other.url != server.url
        assert other.log_in("ada@shared.example", PASSWORD).status_code == 200

        assert other.end() == 0
        assert not any(map(is_alive, [*other.workers(), companion]))
    assert server.call("GET", "/me/", tokens["access"]).status_code == 200


# Worker and companion ------------------------------------------------------------------------------


@contextmanager
def running_worker(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A running `billing worker`, killed at the end of the block."""
    command = [*BILLING, "worker"]
    with subprocess.Popen(
        command, env=environ, cwd="/", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            assert process.stderr.readline() == "The worker is running. Ctrl-C stops.\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_runs_until_a_signal(environ: dict[str, str], number: signal.Signals) -> None:
    with running_worker(environ) as process:
        process.send_signal(number)

        assert process.wait(PATIENCE_SECONDS) == 0
        assert process.stderr and process.stderr.read() == ""


def test_server_and_worker_raise_their_descriptor_limit(environ: dict[str, str]) -> None:
    few, most = 1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with (
        descriptors(few),
        serving(environ, "--no-worker") as server,
        running_worker(environ) as worker,
    ):
        allowed = [resource.prlimit(each.pid, resource.RLIMIT_NOFILE) for each in (server.process, worker)]

    assert allowed == [(min(4096, most), most)] * 2


@contextmanager
def descriptors(most: int) -> Iterator[None]:
    """A limit on the descriptors of this process, which those started in the block inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_without_a_database_is_a_one_line_error(environ: dict[str, str]) -> None:
    ended = run_process(environ, "worker", DATABASE_URL="postgresql://me:hunter2@127.0.0.1:1/x")

    assert ended.returncode == 1
    assert sentence(ended.stderr).startswith("The database cannot be reached: ")
    assert "hunter2" not in ended.stderr


def test_a_killed_companion_is_replaced_and_ends_with_the_server(environ: dict[str, str]) -> None:
    with serving(environ) as server:
        first = server.await_companion()
        os.kill(first, signal.SIGKILL)
        second = server.await_companion(other_than=first)
        assert server.events("the worker ended, and is started again")

        assert server.end() == 0
        assert not is_alive(second)


def test_ctrl_c_does_not_stop_the_companion_before_the_server(environ: dict[str, str]) -> None:
    head = request("POST", f"{API}/login/", "Content-Length: 2", "Expect: 100-continue")
    with serving(environ) as server, Connection(server.address, timeout_seconds=10) as slow:
        slow.send(head)
        assert slow.receive().status == 100
        companion = server.await_companion()
        # A terminal signals its whole foreground process group.
        os.killpg(server.process.pid, signal.SIGINT)
        eventually(lambda: refuses_connections(server))
        time.sleep(0.5)
        assert server.companions() == [companion]
        slow.send(b"{}")

        assert server.process.wait(PATIENCE_SECONDS) == 0
        assert not is_alive(companion)
        assert server.events("the worker ended") == []


def test_a_companion_stops_quickly_right_after_its_start(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with Companion():
        pass

    assert time.monotonic() - begun < END_SECONDS / 2
    assert companions_of(os.getpid()) == []


def test_a_companion_that_failed_to_start_is_started_again(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with structlog.testing.capture_logs() as events, Companion():
        eventually(lambda: bool(events))
        monkeypatch.setattr(sys, "executable", python)
        eventually(lambda: bool(companions_of(os.getpid())))

    assert events[0]["cause"] == "No such file or directory"


def test_renewing_a_companion_skips_the_pause_before_a_retry(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(companion, "FIRST_PAUSE_SECONDS", 3600)
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with structlog.testing.capture_logs() as events, Companion() as ours:
        eventually(lambda: bool(events))
        monkeypatch.setattr(sys, "executable", python)
        ours.renew()
        eventually(lambda: bool(companions_of(os.getpid())))


def test_a_companion_runs_the_servers_code_in_any_directory(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "billing").mkdir()
    (tmp_path / "billing/__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with structlog.testing.capture_logs() as events, Companion():
        eventually(lambda: bool(companions_of(os.getpid())))
        time.sleep(1)  # Enough time to exit.
    assert events == []


def test_a_code_change_restarts_the_server_and_its_companion(environ: dict[str, str], tmp_path: Path) -> None:
    for part in ("billing", "openapi"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "app.py", tmp_path)
    with serving(environ | {"PYTHONPATH": str(tmp_path)}, "--reload") as server:
        server.await_started(workers=1)
        first = server.await_companion()
        with (tmp_path / "billing" / "ids.py").open("a") as code:
            code.write("CHANGED = True\n")
        server.await_started(workers=2)
        second = server.await_companion(other_than=first)
        assert server.events("the worker ended") == []

        assert server.end() == 0
        assert not is_alive(second)


def test_serve_without_a_worker_starts_no_companion(environ: dict[str, str]) -> None:
    with serving(environ, "--no-worker") as server:
        server.await_started(workers=1)

        assert server.companions() == []


def test_the_help_of_serve_mentions_the_worker() -> None:
    output = CliRunner().invoke(main, ["serve", "--help"]).stdout

    assert "--worker / --no-worker" in output
    assert "A worker runs beside the API" in " ".join(output.split())


# Tenants -------------------------------------------------------------------------------------------


def register(server: Server, company_name: str) -> dict[str, Any]:
    email = f"ada@{company_name.split()[0].lower()}.example"
    answer = server.call("POST", "/register/", company_name=company_name, email=email, password=PASSWORD)
    assert answer.status_code == 201, answer.text
    registered: dict[str, Any] = answer.json()
    return registered


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return iter(range(1000))


@dataclass
class Tenant:
    """A registered tenant; every test has its own."""

    slug: str
    owner: str
    access: str
    key: str


@pytest.fixture
def tenant(server: Server, numbers: Iterator[int]) -> Tenant:
    made = register(server, f"Acme{next(numbers)} Inc.")
    tenant = made["tenant"]
    return Tenant(tenant["slug"], made["user"]["email"], made["tokens"]["access"], tenant["api_key_secret"])


def audited(embedded: Database, slug: str) -> list[tuple[str, str | None]]:
    """The operator's actions in this tenant's audit log, with their subjects."""
    assert embedded.server
    engine = create_engine(embedded.server.cluster.url(database.NAME))
    query = (
        "SELECT action, subject FROM audit_log JOIN tenants ON tenants.id = tenant_id "
        "WHERE slug = :slug AND actor_kind = 'operator' ORDER BY sequence"
    )
    with engine.connect() as connection:
        rows = [(row.action, row.subject) for row in connection.execute(text(query), {"slug": slug})]
    engine.dispose()
    return rows


def test_migrate_prints_the_revision(run: Run) -> None:
    assert run("migrate").stdout.strip().isalnum()


def test_migrate_connects_to_an_external_database_as_its_owner(run: Run, embedded: Database) -> None:
    urls = {"DATABASE_URL": embedded.app_url, "MIGRATION_DATABASE_URL": embedded.owner_url or ""}

    assert run("migrate", **urls).stdout == run("migrate").stdout


def test_tenants_list_shows_every_tenant(
    run: Run, tenant: Tenant, numbers: Iterator[int], server: Server
) -> None:
    register(server, f"Globex{next(numbers)} Ltd.")

    listed = json.loads(run("tenants", "list", "--json").stdout)
    lines = run("tenants", "list").stdout.splitlines()

    assert next(each for each in listed if each["slug"] == tenant.slug)["subscription_tier"] == "free"
    assert len(listed) >= 2 and len(lines) == len(listed) + 1
    assert lines[0].split()[:2] == ["SLUG", "COMPANY"]
    # Each column begins below the start of its name.
    assert len({line.index("free") for line in lines[1:]} | {lines[0].index("SUBSCRIPTION TIER")}) == 1


def test_a_company_name_cannot_send_terminal_control_codes(
    run: Run, server: Server, numbers: Iterator[int]
) -> None:
    register(server, f"Evil{next(numbers)} \x9b31m Ltd.")

    assert "\x9b" not in run("tenants", "list").stdout


def test_set_tier(run: Run, server: Server, tenant: Tenant, embedded: Database) -> None:
    run("tenants", "set-tier", tenant.slug, "pro")
    run("tenants", "set-tier", tenant.slug, "pro")

    assert server.call("GET", "/details/", tenant.key).json()["tenant"]["subscription_tier"] == "pro"
    assert audited(embedded, tenant.slug) == [("tenant.tier_changed", tenant.slug)]


def test_a_disabled_tenant_is_refused_until_it_is_enabled(
    run: Run, server: Server, tenant: Tenant, embedded: Database
) -> None:
    run("tenants", "disable", tenant.slug)
    refused = server.call("GET", "/verify/", tenant.key), server.call("GET", "/me/", tenant.access)
    run("tenants", "enable", tenant.slug)

    assert [answer.json()["code"] for answer in refused] == ["tenant-disabled"] * 2
    assert server.call("GET", "/verify/", tenant.key).status_code == 200
    assert server.call("GET", "/me/", tenant.access).status_code == 200
    assert [action for action, _ in audited(embedded, tenant.slug)] == ["tenant.disabled", "tenant.enabled"]


@pytest.mark.parametrize(
    "arguments",
    [
        "tenants disable nobody",
        "tenants set-tier nobody pro",
        "users list --tenant nobody",
        "webhooks list nobody",
        "webhooks replay nobody --failed",
    ],
)
def test_an_unknown_tenant_is_a_one_line_error(run: Run, arguments: str) -> None:
    assert sentence(run(*arguments.split(), code=1).stderr).startswith("There is no tenant with this slug")


@contextmanager
def locked(embedded: Database, tenant: Tenant) -> Iterator[None]:
    """Hold the tenant's lock in another transaction."""
    engine = create_engine(embedded.server.cluster.url(database.NAME))
    with engine.begin() as connection:
        query = text("SELECT FROM tenants WHERE slug = :slug FOR NO KEY UPDATE")
        connection.execute(query, {"slug": tenant.slug})
        yield
    engine.dispose()


@pytest.mark.parametrize(
    "arguments",
    [
        "tenants set-tier {slug} free",
        "tenants enable {slug}",
        "users set-role --tenant {slug} {owner} owner",
        "users disable --tenant {slug} {owner}",
    ],
)
def test_commands_that_depend_on_a_tenants_state_wait_for_its_lock(
    run: Run, tenant: Tenant, embedded: Database, arguments: str
) -> None:
    with locked(embedded, tenant):
        ended = run(*arguments.format(slug=tenant.slug, owner=tenant.owner).split(), code=1)
    assert sentence(ended.stderr).startswith("The database ")


# Users ---------------------------------------------------------------------------------------------


@dataclass
class Bob:
    """A user added at the console."""

    email: str
    tokens: dict[str, str]

    @property
    def access(self) -> str:
        return self.tokens["access"]


def add(run: Run, tenant: Tenant, *more: str, role: str = "developer", code: int = 0) -> Result:
    named = ("--tenant", tenant.slug, "--email", email_of(tenant), "--role", role)
    return run("users", "add", *named, "--password-stdin", *more, input=f"{OTHER_PASSWORD}\n", code=code)


def email_of(tenant: Tenant) -> str:
    return f"bob@{tenant.slug}.example"


@pytest.fixture
def bob(run: Run, server: Server, tenant: Tenant) -> Bob:
    add(run, tenant)
    return Bob(email_of(tenant), server.log_in(email_of(tenant), OTHER_PASSWORD).json()["tokens"])


def test_an_added_developer_logs_in_and_may_not_see_keys(
    server: Server, tenant: Tenant, bob: Bob, embedded: Database
) -> None:
    answer = server.call("GET", "/me/", bob.access).json()

    assert answer["user"]["role"] == "developer"
    assert answer["tenant"]["slug"] == tenant.slug
    assert server.call("GET", "/api-keys/", bob.access).status_code == 403
    assert audited(embedded, tenant.slug) == [("user.added", bob.email)]


def test_an_added_admin_may_see_keys(run: Run, server: Server, tenant: Tenant) -> None:
    add(run, tenant, role="admin")
    access = server.log_in(email_of(tenant), OTHER_PASSWORD).json()["tokens"]["access"]

    assert server.call("GET", "/api-keys/", access).status_code == 200


def test_a_generated_password_is_printed_alone_and_works(run: Run, server: Server, tenant: Tenant) -> None:
    email = email_of(tenant)
    result = run(
        "users", "add", "--tenant", tenant.slug, "--email", email, "--role", "owner", "--generate-password"
    )

    assert server.log_in(email, result.stdout.removesuffix("\n")).status_code == 200


def test_the_password_prompt_repeats_without_echo(
    server: Server, tenant: Tenant, environ: dict[str, str]
) -> None:
    email = email_of(tenant)
    command = [*BILLING, "users", "add", "--tenant", tenant.slug, "--email", email, "--role", "admin"]
    terminal, end = pty.openpty()
    with open(terminal, "r+b", buffering=0) as screen:
        with subprocess.Popen(
            command, env=environ, cwd="/", stdin=end, stdout=end, stderr=end, start_new_session=True
        ) as process:
            os.close(end)
            shown = type_at(screen, b"Password: ") + type_at(screen, b"Again: ")
            with suppress(OSError):  # Linux reports a closed terminal like this.
                while more := screen.read(1000):
                    shown += more
        assert process.returncode == 0, shown

    assert OTHER_PASSWORD.encode() not in shown
    assert server.log_in(email, OTHER_PASSWORD).status_code == 200


def type_at(screen: io.FileIO | Any, prompt: bytes) -> bytes:
    shown = b""
    while not shown.endswith(prompt):
        shown += screen.read(1)
    time.sleep(0.1)  # Input typed before the echo is off is discarded.
    screen.write(f"{OTHER_PASSWORD}\n".encode())
    return bytes(shown)


def test_without_a_terminal_the_password_must_come_from_an_option(run: Run, tenant: Tenant) -> None:
    result = run(
        "users", "add", "--tenant", tenant.slug, "--email", email_of(tenant), "--role", "admin", code=2
    )

    assert "--password-stdin" in result.stderr


@pytest.mark.parametrize(
    ("options", "password", "expected"),
    [
        (["--email", "no address"], OTHER_PASSWORD, "The API would refuse this email:"),
        (["--first-name", "B\x1b[0m"], OTHER_PASSWORD, "The API would refuse this first name:"),
        ([], "an old\0password of bob", "Email, names and password must be text in UTF-8, without NUL."),
        ([], "short", "The password must have 12 to 128 characters."),
        ([], "password1234", "The password is too easy to guess."),
    ],
)
def test_users_add_refuses_what_registration_refuses(
    run: Run, tenant: Tenant, options: list[str], password: str, expected: str
) -> None:
    named = ["--tenant", tenant.slug, "--email", email_of(tenant), "--role", "admin", "--password-stdin"]

    result = run("users", "add", *named, *options, input=f"{password}\n", code=1)

    assert sentence(result.stderr).startswith(expected)
    assert len(json.loads(run("users", "list", "--tenant", tenant.slug, "--json").stdout)) == 1


def test_a_taken_email_is_a_one_line_error(run: Run, tenant: Tenant, bob: Bob) -> None:
    assert sentence(add(run, tenant, code=1).stderr).startswith("The email is in use.")


def test_users_list(run: Run, tenant: Tenant, bob: Bob) -> None:
    listed = json.loads(run("users", "list", "--tenant", tenant.slug, "--json").stdout)
    lines = run("users", "list", "--tenant", tenant.slug).stdout.splitlines()

    assert [(user["email"], user["role"]) for user in listed] == [
        (tenant.owner, "owner"),
        (bob.email, "developer"),
    ]
    assert not any("password" in name for name in listed[0])
    assert lines[0].startswith("EMAIL") and lines[2].startswith(bob.email)


def test_a_role_change_applies_from_the_next_request(
    run: Run, server: Server, tenant: Tenant, bob: Bob
) -> None:
    run("users", "set-role", "--tenant", tenant.slug, bob.email.upper(), "admin")

    assert server.call("GET", "/api-keys/", bob.access).status_code == 200


def test_disabling_a_user_ends_their_sessions_for_good(
    run: Run, server: Server, tenant: Tenant, bob: Bob, embedded: Database
) -> None:
    run("users", "disable", "--tenant", tenant.slug, bob.email)
    assert server.call("GET", "/me/", bob.access).json()["code"] == "session-ended"
    assert server.log_in(bob.email, OTHER_PASSWORD).json()["code"] == "invalid-credentials"

    run("users", "enable", "--tenant", tenant.slug, bob.email)
    assert server.call("GET", "/me/", bob.access).status_code == 401
    assert server.call("POST", "/token/refresh/", refresh=bob.tokens["refresh"]).status_code == 401
    assert server.log_in(bob.email, OTHER_PASSWORD).status_code == 200
    assert [action for action, _ in audited(embedded, tenant.slug)] == [
        "user.added",
        "user.disabled",
        "user.enabled",
    ]


def test_resetting_a_password_ends_every_session(run: Run, server: Server, tenant: Tenant, bob: Bob) -> None:
    result = run("users", "reset-password", "--tenant", tenant.slug, bob.email, "--generate-password")

    assert server.call("GET", "/me/", bob.access).json()["code"] == "session-ended"
    assert server.call("POST", "/token/refresh/", refresh=bob.tokens["refresh"]).status_code == 401
    assert server.log_in(bob.email, OTHER_PASSWORD).status_code == 401
    assert server.log_in(bob.email, result.stdout.strip()).status_code == 200


def test_a_password_equal_to_the_email_is_refused(run: Run, server: Server, tenant: Tenant, bob: Bob) -> None:
    named = ("--tenant", tenant.slug, bob.email, "--password-stdin")

    result = run("users", "reset-password", *named, input=f"{bob.email}\n", code=1)

    assert sentence(result.stderr).startswith("The password is too easy to guess.")
    assert server.call("GET", "/me/", bob.access).status_code == 200


def test_a_password_that_is_not_utf8_is_refused(run: Run, tenant: Tenant, bob: Bob) -> None:
    named = ("--tenant", tenant.slug, bob.email, "--password-stdin")

    result = run("users", "reset-password", *named, input=b"a long caf\xe9 phrase\n", code=1)

    assert sentence(result.stderr).endswith("must be text in UTF-8, without NUL.")


@pytest.mark.parametrize("command", [["disable"], ["set-role"]])
def test_the_last_active_owner_cannot_be_removed(
    run: Run, server: Server, tenant: Tenant, bob: Bob, command: list[str]
) -> None:
    rest = ["--tenant", tenant.slug, tenant.owner, *(["admin"] if command == ["set-role"] else [])]

    result = run("users", *command, *rest, code=1)
    assert sentence(result.stderr).startswith("A tenant keeps at least one active owner")
    assert server.call("GET", "/api-keys/", tenant.access).status_code == 200

    run("users", "set-role", "--tenant", tenant.slug, bob.email, "owner")
    run("users", *command, *rest)
    assert server.call("GET", "/me/", tenant.access).status_code == (401 if command == ["disable"] else 200)


@pytest.mark.parametrize("command", ["disable", "enable", "reset-password --generate-password"])
def test_an_unknown_user_is_a_one_line_error(run: Run, tenant: Tenant, server: Server, command: str) -> None:
    name, *options = command.split()

    result = run("users", name, "--tenant", tenant.slug, "ada@shared.example", *options, code=1)

    assert sentence(result.stderr) == "The tenant has no user with this email."


# Webhooks ------------------------------------------------------------------------------------------

REGISTERED, REGENERATED, DISABLED = "tenant.registered", "api_key.regenerated", "webhook.disabled"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that accepts everything."""
    with receiving(answers(204, b"")) as receiver:
        yield receiver


def configure(server: Server, tenant: Tenant, receiver: Receiver, **more: Any) -> None:
    url = f"http://localhost:{receiver.port}/in"
    assert server.call("POST", "/webhooks/config/", tenant.access, webhook_url=url, **more).status_code == 200


def regenerate(server: Server, tenant: Tenant) -> None:
    answer = server.call("POST", "/api-keys/regenerate/", tenant.access, key_type="test", confirm=True)
    assert answer.status_code == 200


def listed(run: Run, tenant: Tenant, *options: str) -> Any:
    return json.loads(run("webhooks", "list", tenant.slug, "--json", *options).stdout)


def await_statuses(run: Run, tenant: Tenant, *expected: str) -> list[dict[str, Any]]:
    """The deliveries, newest first, once they have these statuses."""
    eventually(lambda: [each["status"] for each in listed(run, tenant)["deliveries"]] == list(expected))
    deliveries: list[dict[str, Any]] = listed(run, tenant)["deliveries"]
    return deliveries


def replay_of(run: Run, tenant: Tenant, *options: str) -> str:
    result = run("webhooks", "replay", tenant.slug, *options)
    assert result.stdout == ""
    return result.stderr


def refusal_of(run: Run, tenant: Tenant, *options: str) -> str:
    return sentence(run("webhooks", "replay", tenant.slug, *options, code=1).stderr)


def types_of(received: list[Received]) -> list[str]:
    return sorted(json.loads(one.body)["type"] for one in received)


def test_webhooks_list_shows_the_endpoint_and_its_deliveries(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver
) -> None:
    configure(server, tenant, receiver)
    regenerate(server, tenant)
    [delivery] = await_statuses(run, tenant, "delivered")

    lines = run("webhooks", "list", tenant.slug).stdout.splitlines()
    assert lines[0] == f"http://localhost:{receiver.port}/in is active."
    assert lines[1] == "Pending: 0. In 24 hours: 1 delivered, 0 failed."
    assert lines[2].startswith("EVENT ID ") and lines[3].startswith(delivery["event_id"])
    assert len(lines) == 4
    assert listed(run, tenant)["is_active"] is True
    assert listed(run, tenant, "--status", "failed")["deliveries"] == []


def test_webhooks_list_without_a_url(run: Run, tenant: Tenant) -> None:
    assert run("webhooks", "list", tenant.slug).stdout.startswith(
        "No webhook URL is configured.\nPending: 0."
    )


def test_a_delivered_event_is_replayed_with_the_same_id_and_body(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver, embedded: Database
) -> None:
    configure(server, tenant, receiver)
    regenerate(server, tenant)
    [delivery] = await_statuses(run, tenant, "delivered")
    event_id = delivery["event_id"]

    assert replay_of(run, tenant, "--event", event_id) == f"1 event will be sent to {tenant.slug}.\n"
    eventually(lambda: len(receiver.received) == 2)

    first, again = receiver.received
    assert (first.body, first.headers["webhook-id"]) == (again.body, again.headers["webhook-id"])
    assert again.headers["webhook-id"] == event_id
    [delivery] = await_statuses(run, tenant, "delivered")
    assert delivery["attempts"] == 1
    assert audited(embedded, tenant.slug) == [("webhook.replayed", None)]


def test_replay_since_sends_events_from_before_a_url_was_configured(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver
) -> None:
    regenerate(server, tenant)
    configure(server, tenant, receiver)
    assert listed(run, tenant)["deliveries"] == []

    assert replay_of(run, tenant, "--since", "2h") == f"2 events will be sent to {tenant.slug}.\n"
    await_statuses(run, tenant, "delivered", "delivered")

    assert types_of(receiver.received) == [REGENERATED, REGISTERED]
    assert replay_of(run, tenant, "--since", "2999-01-15T09:30:00Z").startswith("0 events ")


def test_failed_deliveries_are_replayed_to_a_working_endpoint(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver
) -> None:
    with receiving(answers(410)) as gone:
        configure(server, tenant, gone)
        regenerate(server, tenant)
        await_statuses(run, tenant, "failed", "failed")
    assert "It was disabled because it is gone.\n" in run("webhooks", "list", tenant.slug).stdout
    assert refusal_of(run, tenant, "--failed").startswith("The tenant's webhook is disabled")

    configure(server, tenant, receiver)
    assert replay_of(run, tenant, "--failed").startswith("2 events ")
    await_statuses(run, tenant, "delivered", "delivered")

    assert types_of(receiver.received) == [REGENERATED, DISABLED]
    assert replay_of(run, tenant, "--failed").startswith("0 events ")


def test_replay_sends_deliveries_that_wait_for_a_retry(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver
) -> None:
    with receiving(answers(429)) as tired:  # It is not retried for a minute.
        configure(server, tenant, tired)
        regenerate(server, tenant)
        eventually(lambda: [one["http_status"] for one in listed(run, tenant)["deliveries"]] == [429])
        configure(server, tenant, receiver)

    replay_of(run, tenant, "--since", "1h")
    await_statuses(run, tenant, "delivered", "delivered")

    assert sorted(one["attempts"] for one in listed(run, tenant)["deliveries"]) == [1, 2]
    assert len(receiver.received) == 2


@pytest.mark.parametrize("event_types", [[REGENERATED], ["webhook.test"]])
def test_unsubscribed_types_and_test_events_are_not_replayed(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver, event_types: list[str]
) -> None:
    configure(server, tenant, receiver, event_types=event_types)
    assert server.call("POST", "/webhooks/test/", tenant.access).json()["success"]
    [test] = listed(run, tenant)["deliveries"]

    assert replay_of(run, tenant, "--since", "1h").startswith("0 events ")
    assert refusal_of(run, tenant, "--event", test["event_id"]).startswith("The tenant has no such event")


def test_a_replay_in_chunks_sends_each_event_once(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "CHUNK", 2)
    for _ in range(4):
        regenerate(server, tenant)
    configure(server, tenant, receiver)

    assert replay_of(run, tenant, "--since", "1h").endswith(f"5 events will be sent to {tenant.slug}.\n")
    await_statuses(run, tenant, *5 * ["delivered"])

    assert len({one.headers["webhook-id"] for one in receiver.received}) == 5
    assert len(receiver.received) == 5


def test_a_dry_run_sends_nothing(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver, embedded: Database
) -> None:
    configure(server, tenant, receiver)

    output = replay_of(run, tenant, "--since", "1h", "--dry-run")

    assert output == f"1 event would be sent to {tenant.slug}.\n"
    assert listed(run, tenant)["deliveries"] == []
    assert audited(embedded, tenant.slug) == []


def test_a_replay_needs_a_url(run: Run, tenant: Tenant) -> None:
    assert refusal_of(run, tenant, "--failed").startswith("The tenant has no webhook URL")


def test_an_unknown_event_is_a_one_line_error(
    run: Run, server: Server, tenant: Tenant, receiver: Receiver
) -> None:
    configure(server, tenant, receiver)

    output = refusal_of(run, tenant, "--event", "01900000-0000-7000-8000-000000000000")

    assert output.startswith("The tenant has no such event")


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--failed --since 2h",
        "--event acme",
        "--since 2026-01-15",
        "--since 2026-01-15T09:30:00",
        "--since 999999d",
        "--since -2h",
        "--since yesterday",
    ],
)
def test_2_for_a_replay_without_a_valid_selection(run: Run, options: str) -> None:
    run("webhooks", "replay", "acme", *options.split(), code=2)


def test_a_moment_is_an_absolute_time_or_an_age() -> None:
    absolute = Moment().convert("2026-01-15T10:30:00+01:00", None, None)
    ago = datetime.now(UTC) - Moment().convert("3d", None, None)

    assert absolute == datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
    assert abs(ago - timedelta(days=3)) < timedelta(minutes=1)
