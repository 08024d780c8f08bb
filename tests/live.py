"""A server as `billing serve` runs it, in a separate process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import requests

# What `make serve WEBHOOKS=local` sets.
OPEN_LOOPBACK = {"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128", "WEBHOOK_ALLOW_HTTP": "on"}

START_SECONDS = 90  # A busy machine takes half a minute to import us.
STOP_SECONDS = 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    environ: Mapping[str, str], *arguments: str, log: IO[bytes] | None = None, cwd: Path | None = None
) -> Iterator[str]:
    """The base URL of a server that runs as long as the block; its output goes to `log`, or to ours.

    Limits are off unless `environ` turns them on: many tests share one server, and all have one address.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "billing.cli", "serve", "--port", str(port), *arguments],
        env={**os.environ, "PUBLIC_BASE_URL": url, "RATE_LIMITS": "off", **environ},
        stdout=log,
        stderr=log,
        cwd=cwd,
    )
    try:
        await_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


def await_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode} before it was ready")
        try:
            if requests.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.05)
    raise AssertionError(f"the server was not ready within {START_SECONDS} seconds")


def eventually(is_so: Callable[[], bool], *, seconds: float = 15) -> None:
    """Wait until the condition is true; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.1)
