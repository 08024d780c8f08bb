"""Programs that are restarted when they end, as by a service manager, and signals to them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

RESTART_SECONDS = 1.0
END_SECONDS = 30
FIRST_EPHEMERAL_PORT = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


class Program:
    """One supervised program: whenever it ends it is restarted, a second later."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        user: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.environ = dict(environ or {})
        self.starts = 0
        self._command = [str(word) for word in command]
        self._log = log
        self._user = user
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervises {name}", daemon=True)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        self._wanted.set()
        self._supervisor.start()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)

    def keep_away(self) -> None:
        """kill -9, without a restart until `bring_back`, as on a lost machine."""
        self._wanted.clear()
        self.kill()

    def bring_back(self) -> None:
        self._wanted.set()

    def restart(self, environ: Mapping[str, str]) -> None:
        """SIGTERM; it is restarted with this environment."""
        self.environ = dict(environ)
        assert self._process is not None
        starts = self.starts
        self._process.terminate()
        eventually(lambda: self.starts > starts, f"{self.name} comes back")

    def stop(self) -> None:
        """SIGTERM, without a restart."""
        self._closed.set()
        self._wanted.set()
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _supervise(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            if self._closed.is_set():
                return
            self._spawn().wait()
            self._closed.wait(RESTART_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
            )
        self.starts += 1
        return self._process


def eventually(holds: Callable[[], object], what: str, *, seconds: float = 60) -> float:
    """Wait until it holds; returns the seconds that took, raises `AssertionError` when it never does."""
    began = time.monotonic()
    while True:
        with suppress(OSError):
            if holds():
                return time.monotonic() - began
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


def free_port() -> int:
    """A port that no outgoing connection is given while the program that listens there is down."""
    while True:
        port = random.randrange(10_000, FIRST_EPHEMERAL_PORT)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def family(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    """Signal those that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
