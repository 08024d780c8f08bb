"""`python -m sandbox serve …`: `billing serve …` with a sandbox in place of Stripe."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from dotenv import dotenv_values

from sandbox.stripe import Sandbox

USAGE = "usage: python -m sandbox serve [the arguments of billing serve]"
BANNER = """\
Stripe is a SANDBOX at {url}: nothing in it is real, and it forgets everything when it stops.
"""


def main(arguments: Sequence[str]) -> int:
    """Return the exit code of `billing serve`; 1 outside development, 2 for other arguments."""
    if list(arguments[:1]) != ["serve"]:
        print(USAGE, file=sys.stderr)
        return 2
    # As the settings are read: the environment first, then `.env`.
    environment = {**dotenv_values(".env", interpolate=False), **os.environ}.get("ENVIRONMENT")
    if environment not in (None, "", "development"):
        print(f"ENVIRONMENT is {environment}: the Stripe sandbox is for development only.", file=sys.stderr)
        return 1
    with Sandbox() as stripe:
        print(BANNER.format(url=stripe.url), flush=True)
        return serve(arguments[1:], stripe.environ)


def serve(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `billing serve` to its end, forwarding SIGINT and SIGTERM."""
    server = subprocess.Popen(
        [*bound_to_parent(), sys.executable, "-m", "billing.cli", "serve", *arguments],
        env={**os.environ, **environ},
        # In a process group of its own, or Ctrl-C would reach it twice, and the second would stop it at once.
        process_group=0,
    )

    def hand_on(number: int, _frame: FrameType | None) -> None:
        server.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    code = server.wait()
    # A shell's form of "ended by a signal".
    return code if code >= 0 else 128 - code


def bound_to_parent() -> list[str]:
    """The prefix that makes a command end with us even if we are killed; empty if the system has none."""
    binding = ["setpriv", "--pdeathsig", "TERM"]
    # BusyBox's setpriv lacks the option.
    can = (
        shutil.which("setpriv")
        and not subprocess.run([*binding, "true"], stderr=subprocess.DEVNULL).returncode
    )
    return binding if can else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
