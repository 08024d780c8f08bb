"""A Redis on loopback, started and stopped by the test that uses it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.live import free_port

START_SECONDS = 20


def required_program() -> str:
    """The path of redis-server; skips the test where that was asked for, and fails it where it is missing."""
    if os.environ.get("BILLING_TESTS_WITHOUT_REDIS") == "1":
        pytest.skip("BILLING_TESTS_WITHOUT_REDIS=1")
    program = shutil.which("redis-server")
    assert program, "Install redis-server, or set BILLING_TESTS_WITHOUT_REDIS=1 to leave its tests out."
    return program


class RedisServer:
    """A server without persistence, which can be paused, killed and restarted on its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([required_program(), *options], stdout=subprocess.DEVNULL)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(64).startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise AssertionError("Redis did not start")

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def running() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        yield server
    finally:
        server.kill()
