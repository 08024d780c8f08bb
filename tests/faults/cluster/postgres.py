"""Three PostgreSQL under Patroni with synchronous replication, and etcd for their consensus."""

from __future__ import annotations

import getpass
import os
import pwd
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import requests
import yaml

from billing.storage import database, schema
from tests.faults.cluster.programs import Program, eventually, family, free_port

NODES = 3
SCOPE = "billing"
# docs/reliability.md gives the reasons.
DYNAMIC = {
    "ttl": 20,
    "loop_wait": 2,
    "retry_timeout": 5,
    "primary_start_timeout": 10,
    "maximum_lag_on_failover": 0,
    "synchronous_mode": True,
    "failsafe_mode": True,
    "postgresql": {
        "use_pg_rewind": True,
        "parameters": {
            "max_connections": 150,
            "shared_buffers": "32MB",
            "wal_log_hints": "on",
            # Small, so that a full disk has its effect at once.
            "min_wal_size": "4MB",
            "max_wal_size": "64MB",
            "wal_keep_size": "32MB",
        },
    },
}
DISK_MEGABYTES = 400
PROGRAMS = ("etcd", "patroni", "patronictl")


def postgres_bin() -> Path:
    """The binaries of the latest version that Debian has installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    assert found, "There is no PostgreSQL in /usr/lib/postgresql."
    return found[-1].parent


@dataclass
class Node:
    """One PostgreSQL and its Patroni."""

    name: str
    directory: Path
    port: int = field(default_factory=free_port)
    rest_port: int = field(default_factory=free_port)
    patroni: Program | None = None

    @property
    def data(self) -> Path:
        return self.directory / "disk" / "data"

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    @property
    def config(self) -> Path:
        return self.directory / "patroni.yml"

    def postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def processes(self) -> list[int]:
        """Patroni, the postmaster and its children."""
        assert self.patroni is not None
        postgres: list[int] = []
        with suppress(OSError, IndexError):
            postgres = family(self.postmaster())
        return [*family(self.patroni.pid), *postgres]

    def state(self) -> dict[str, Any]:
        """What Patroni reports of itself; raises `OSError` when it does not answer."""
        found: dict[str, Any] = requests.get(f"http://127.0.0.1:{self.rest_port}/patroni", timeout=2).json()
        return found


class Cluster:
    """The nodes, and the addresses by which they are reached."""

    def __init__(self, directory: Path) -> None:
        self.user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        self.nodes = [Node(f"node{number}", directory / f"node{number}") for number in range(1, NODES + 1)]
        self._directory = directory
        self._etcd_port = free_port()
        self._passwords = {
            name: secrets.token_hex(16) for name in ("postgres", "replicator", database.APP, database.OWNER)
        }
        self.etcd = Program(
            "etcd",
            self._etcd_command(),
            directory / "etcd.log",
            user=self.user if os.geteuid() == 0 else None,
        )

    def url(self, role: str, ports: list[int] | None = None, *, name: str = database.NAME) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports or [node.port for node in self.nodes])
        return f"postgresql://{role}:{self._passwords[role]}@{hosts}/{name}"

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._start()
            yield
        finally:
            self._stop()

    def _start(self) -> None:
        for path in [self._directory / "etcd", *(node.directory for node in self.nodes)]:
            path.mkdir(mode=0o700)
            self._chown(path)
        self.etcd.start()
        eventually(lambda: requests.get(f"http://127.0.0.1:{self._etcd_port}/health", timeout=2).ok, "etcd")
        for node in self.nodes:
            self._prepare(node)
            node.patroni = Program(
                node.name,
                ["patroni", node.config],
                self._directory / f"{node.name}.log",
                user=self.user if os.geteuid() == 0 else None,
                environ={"PGPASSFILE": "/dev/null", "HOME": str(node.directory)},
            )
            node.patroni.start()
        eventually(self.is_whole, "three nodes that replicate synchronously", seconds=120)
        self._make_database()

    def _prepare(self, node: Node) -> None:
        node.disk.mkdir(mode=0o700)
        if os.geteuid() == 0:
            size = f"size={DISK_MEGABYTES}m,mode=0700,uid={pwd.getpwnam(self.user).pw_uid}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", node.disk], check=True)
        self._chown(node.disk)
        node.config.write_text(yaml.safe_dump(self._configuration(node)))
        node.config.chmod(0o600)
        self._chown(node.config)

    def _stop(self) -> None:
        for program in [*(node.patroni for node in self.nodes), self.etcd]:
            if program is not None:
                program.stop()
        for node in self.nodes:
            with suppress(OSError, IndexError):
                os.kill(node.postmaster(), 3)
            eventually(partial(_is_down, node), f"{node.name} ends")
            subprocess.run(["umount", "-l", node.disk], check=False, capture_output=True)

    def _chown(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, self.user, self.user)

    def _make_database(self) -> None:
        # At the primary only: a connection to a standby that does not have the database yet would fail.
        ports = [self.primary().port]
        with _connected(self.url("postgres", ports, name="postgres")) as cursor:
            cursor.execute(schema.bootstrap_sql())
            for role in (database.APP, database.OWNER):
                cursor.execute(f"ALTER ROLE {role} PASSWORD %s", (self._passwords[role],))
            cursor.execute(
                f"CREATE DATABASE {database.NAME} OWNER {database.OWNER} TEMPLATE template0 ENCODING 'UTF8'"
            )
        with _connected(self.url("postgres", ports)) as cursor:
            cursor.execute(f"GRANT CREATE ON SCHEMA public TO {database.OWNER}")
        database.migrate(self.url(database.OWNER, ports))

    # State ------------------------------------------------------------------------------------------

    def primary(self) -> Node:
        """The node that accepts writes now; raises `AssertionError` when there is none."""
        for node in self.nodes:
            with suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{node.rest_port}/primary", timeout=2).ok:
                    return node
        raise AssertionError("there is no primary")

    def standbys(self, kind: str) -> list[Node]:
        """The `synchronous` or `asynchronous` ones."""
        found = []
        for node in self.nodes:
            with suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{node.rest_port}/{kind}", timeout=2).ok:
                    found.append(node)
        return found

    def is_whole(self) -> bool:
        """One primary, one synchronous standby, one more, all of them streaming."""
        states = [node.state() for node in self.nodes]
        primaries = [state for state in states if state.get("role") in ("master", "primary")]
        if len(primaries) != 1:
            return False
        standbys = primaries[0].get("replication", [])
        streaming = [one for one in standbys if one["state"] == "streaming"]
        is_synchronous = any(one["sync_state"] == "sync" for one in streaming)
        return len(streaming) == NODES - 1 and is_synchronous and len(self.standbys("synchronous")) == 1

    def switch_over(self) -> None:
        [candidate] = self.standbys("synchronous")
        self._patronictl(
            "switchover", "--master", self.primary().name, "--candidate", candidate.name, "--force"
        )

    def _patronictl(self, *words: str) -> None:
        ended = subprocess.run(
            ["patronictl", "-c", self.nodes[0].config, words[0], SCOPE, *words[1:]],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    # Files -----------------------------------------------------------------------------------------

    def _etcd_command(self) -> list[str]:
        clients, peers = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, free_port()))
        return [
            "etcd", "--enable-v2", "--name", "one", "--data-dir", str(self._directory / "etcd" / "data"),
            "--listen-client-urls", clients, "--advertise-client-urls", clients,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"one={peers}",
        ]  # fmt: skip

    def _configuration(self, node: Node) -> dict[str, Any]:
        def login(name: str) -> dict[str, str]:
            return {"username": name, "password": self._passwords[name]}

        return {
            "scope": SCOPE,
            "name": node.name,
            "restapi": {"listen": f"127.0.0.1:{node.rest_port}", "connect_address": f"127.0.0.1:{node.rest_port}"},
            # Not etcd3: there a Patroni 3.0 that was itself paused overwrites the leader's key without checking it.
            "etcd": {"host": f"127.0.0.1:{self._etcd_port}"},
            "bootstrap": {
                "dcs": DYNAMIC,
                "initdb": [
                    {"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"wal-segsize": "1"},
                    {"auth-local": "scram-sha-256"}, {"auth-host": "scram-sha-256"}, "data-checksums",
                ],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{node.port}",
                "connect_address": f"127.0.0.1:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(postgres_bin()),
                "pgpass": str(node.directory / "pgpass"),
                "authentication": {"superuser": login("postgres"), "replication": login("replicator")},
                "parameters": {"unix_socket_directories": ""},
                "pg_hba": [
                    "host all all 127.0.0.1/32 scram-sha-256",
                    "host replication replicator 127.0.0.1/32 scram-sha-256",
                ],
            },
        }  # fmt: skip


def _is_down(node: Node) -> bool:
    return not (node.data / "postmaster.pid").exists()


@contextmanager
def _connected(url: str) -> Iterator[Any]:
    connection = psycopg2.connect(url, target_session_attrs="read-write", connect_timeout=3)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
