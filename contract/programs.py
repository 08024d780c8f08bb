"""The programs of `contract/node`, and servers for them to call."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox.stripe import Sandbox
from tests import live
from tests.receivers import Receiver, answers, receiving

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "openapi/billing.yaml"
BIN = ROOT / "contract/node/node_modules/.bin"
# No telemetry, and no search for updates.
QUIET = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true", "NO_COLOR": "1", "CI": "true"}
OPEN = {
    "WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128",
    "WEBHOOK_ALLOW_HTTP": "on",
    "RATE_LIMITS": "off",
    "PASSWORD_COST": "4",
}


@dataclass(frozen=True)
class Place:
    """A server that uses the sandbox as Stripe, and a local receiver to which it may send webhooks."""

    url: str
    stripe: Sandbox
    receiver: Receiver

    @property
    def receiver_url(self) -> str:
        return f"http://localhost:{self.receiver.port}/in"


def program(name: str) -> str:
    """The path of a program of `contract/node`; raises `AssertionError` if it is not installed."""
    path = BIN / name
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: `make contract` installs it"
    return str(path)


def environ_for(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for such a program."""
    return {**os.environ, **QUIET, **(environ or {})}


def ran(name: str, *arguments: str, seconds: float, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [program(name), *arguments],
        cwd=cwd,
        env=environ_for(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@contextmanager
def opened_place() -> Iterator[Place]:
    """A server with a database of its own, gone at the end of the block."""
    with ExitStack() as stack:
        stripe = stack.enter_context(Sandbox())
        receiver = stack.enter_context(receiving(answers(204)))
        state = stack.enter_context(state_directory())
        log = stack.enter_context((state / "server.log").open("wb"))
        environ = {**OPEN, **stripe.environ, "BILLING_STATE_DIR": str(state), "DATABASE_URL": ""}
        url = stack.enter_context(live.serving(environ, "--no-worker", log=log))
        yield Place(url, stripe, receiver)


@contextmanager
def state_directory() -> Iterator[Path]:
    """A temporary directory; passable for all, as root runs PostgreSQL as another user."""
    with tempfile.TemporaryDirectory(prefix="billing-contract-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)
