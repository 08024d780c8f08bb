"""The processes of a measurement: a worker, and receivers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.installation import STOP_SECONDS, Installation
from benchmarks.webhooks.receiver import Seen

# Allows loopback, as development may.
OPENED = {"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8,::1/128", "WEBHOOK_ALLOW_HTTP": "on"}


@contextmanager
def working(installation: Installation) -> Iterator[int]:
    """Run a `billing worker` for the length of the block; yields its process id."""
    command = [sys.executable, "-m", "billing.cli", "worker", "--while-stdin-is-open"]
    environ = {**os.environ, **installation.environ}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_SECONDS)


@dataclass(frozen=True)
class Receivers:
    """The URLs of two receivers that answer, one that never does, one that refuses; and what the first two have seen.

    `keeping` keeps its connections open, `ending` closes each after its answer.
    """

    keeping: str
    ending: str
    silent: str
    refusing: str
    seen: Callable[[], Seen]


@contextmanager
def receiving() -> Iterator[Receivers]:
    """Run receivers for the length of the block."""
    command = [sys.executable, "-m", "benchmarks.webhooks.receiver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def seen() -> Seen:
            print(file=questions, flush=True)
            found = Seen(**json.loads(answers.readline()))
            found.numbered = {int(number): at for number, at in found.numbered.items()}
            return found

        keeping, ending, silent, refusing = (
            f"http://localhost:{port}/" for port in json.loads(answers.readline())
        )
        yield Receivers(keeping, ending, silent, refusing, seen)
        questions.close()
