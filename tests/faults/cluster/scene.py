"""The installation: the database, Redis, two API processes, two workers, a receiver, and proxies before one of each."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import requests

from billing.settings import new_secrets
from billing.storage import database
from tests.faults.cluster.clients import Book, Crowd, Reader, Writer
from tests.faults.cluster.postgres import Cluster
from tests.faults.cluster.programs import Program, eventually, free_port
from tests.faults.cluster.proxy import Proxy
from tests.live import OPEN_LOOPBACK
from tests.receivers import Receiver, answers, receiving

BILLING = (sys.executable, "-m", "billing.cli")
WRITERS, READERS = 8, 2


class Scene:
    """All running programs."""

    def __init__(self, directory: Path, receiver: Receiver, cluster: Cluster, proxies: list[Proxy]) -> None:
        self.directory = directory
        self.receiver = receiver
        self.cluster = cluster
        self.proxies = proxies
        self.redis_port = free_port()
        self.redis = Program("redis", self._redis_command(), directory / "redis.log")
        self.ports = [free_port(), free_port()]
        self.servers = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.balancer_port = free_port()
        self.balancer = Program(
            "balancer", ["haproxy", "-db", "-f", directory / "haproxy.cfg"], directory / "haproxy.log"
        )
        environ = self._environ()
        through = {"DATABASE_URL": cluster.url(database.APP, [proxy.port for proxy in proxies])}
        # The first of each reaches the database through the proxies.
        self.environs = [{**environ, **through}, environ]
        self.apis = [
            Program(
                f"api{number}",
                [*BILLING, "serve", "--no-worker", "--port", str(port)],
                directory / f"api{number}.log",
                environ=environ,
            )
            for number, (port, environ) in enumerate(zip(self.ports, self.environs, strict=True), start=1)
        ]
        self.workers = [
            Program(
                f"worker{number}", [*BILLING, "worker"], directory / f"worker{number}.log", environ=environ
            )
            for number, environ in enumerate(self.environs, start=1)
        ]
        self.book = Book()
        self.known: set[str] = set()
        self.keyed = False
        self.crowd: Crowd

    def start(self) -> None:
        (self.directory / "haproxy.cfg").write_text(haproxy_config(self.balancer_port, self.ports))
        for program in (self.redis, *self.apis, *self.workers, self.balancer):
            program.start()
        eventually(self.is_ready, "both servers are ready")
        document = requests.get(f"{self.servers[0]}/openapi.json", timeout=5).text
        self.keyed = "Idempotency-Key" in document
        url, receiver_url = f"http://127.0.0.1:{self.balancer_port}", f"http://localhost:{self.receiver.port}"
        clients = [
            kind(url, self.book, receiver_url, keyed=self.keyed)
            for kind, number in ((Writer, WRITERS), (Reader, READERS))
            for _ in range(number)
        ]
        self.crowd = Crowd(clients, self.book)
        self.crowd.start()

    def stop(self) -> None:
        if hasattr(self, "crowd"):
            self.crowd.stop()
        for program in (self.balancer, *self.apis, *self.workers, self.redis):
            program.stop()

    def is_ready(self) -> bool:
        return all(requests.get(f"{url}/readyz", timeout=5).ok for url in self.servers)

    def _environ(self) -> dict[str, str]:
        state = self.directory / "state"
        state.mkdir()
        return {
            **OPEN_LOOPBACK,
            # A restart must not compile everything again.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(self.directory / "bytecode"),
            **new_secrets(),
            "DATABASE_URL": self.cluster.url(database.APP),
            "BILLING_STATE_DIR": str(state),
            "PASSWORD_COST": "4",
            "PUBLIC_BASE_URL": self.servers[0],
            "TRUSTED_PROXIES": "127.0.0.0/8",
            "RATE_LIMIT_STORAGE_URL": f"redis://127.0.0.1:{self.redis_port}/0",
        }

    def _redis_command(self) -> list[str]:
        port = str(self.redis_port)
        return [
            "redis-server",
            "--port",
            port,
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.directory),
            "--save",
            "",
        ]


def haproxy_config(port: int, servers: Sequence[int]) -> str:
    """HAProxy's configuration: checks readiness every second, and names the server in each response."""
    lines = [f"server {name_of(n)} 127.0.0.1:{server}" for n, server in enumerate(servers)]
    return "\n".join(
        [
            "defaults",
            "  mode http",
            "  timeout connect 2s",
            "  timeout client 60s",
            "  timeout server 35s",
            "  timeout check 5s",
            "  option redispatch",
            "  option httpchk GET /readyz",
            "  default-server check inter 1s fall 2 rise 1",
            "listen api",
            f"  bind 127.0.0.1:{port}",
            "  balance roundrobin",
            "  http-response set-header X-Served-By %s",
            *(f"  {line}" for line in lines),
            "",
        ]
    )


def name_of(server: int) -> str:
    return f"api{server + 1}"


@contextmanager
def running_scene(*, keep: Path | None = None) -> Iterator[Scene]:
    """The scene, in a temporary directory that is removed after it."""
    directory = Path(tempfile.mkdtemp(prefix="billing-faults-"))
    directory.chmod(0o711)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if keep is not None:
            stack.callback(copy_logs, directory, keep)
        receiver = stack.enter_context(receiving(answers()))
        cluster = Cluster(directory)
        proxies = [Proxy(node.port) for node in cluster.nodes]
        for proxy in proxies:
            stack.callback(proxy.close)
        stack.enter_context(cluster.running())
        scene = Scene(directory, receiver, cluster, proxies)
        stack.callback(scene.stop)
        scene.start()
        yield scene


def copy_logs(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in source.glob("*.log"):
        shutil.copy(log, target / log.name)
