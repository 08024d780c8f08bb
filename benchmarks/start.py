"""`python -m benchmarks.start`: how long `billing serve` takes to its first answer, and what importing it costs."""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.installation import STOP_SECONDS, Installation, cpu_seconds, installed, state_directory
from benchmarks.requests.servers import POLL_SECONDS, ROOT, answers, free_port
from billing.cli.console import table

LINE = re.compile(r"import time:\s+(?P<own>\d+) \|\s+(?P<whole>\d+) \| (?P<indent> *)(?P<module>\S+)")
SHOWN = 15
# Byte code is cached, as for users; else our own modules would be compiled at every start.
KEPT = {"PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True)
class Taken:
    """Elapsed seconds, which other load on the machine lengthens, and CPU seconds of the process alone."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Import:
    """What one module took, in ms: by itself, and with all that it was the first to import."""

    module: str
    own: float
    whole: float


@click.command()
@click.option("--times", type=click.IntRange(1), default=5, show_default=True, help="How often each is done.")
def main(times: int) -> None:
    """Measure the start of `billing serve`, and the import of `app`."""
    with installed() as installation:
        beside = [start(installation.environ) for _ in range(times)]
        imports = imported(installation)
        importing = [importing_app(installation.environ) for _ in range(times)]
    rows = [spread("to the first answer, PostgreSQL running", beside)]
    with state_directory() as state_dir:
        environ = {"BILLING_STATE_DIR": str(state_dir), "ENVIRONMENT": "development"}
        first = start(environ)
        rows.append(
            spread("to the first answer, PostgreSQL to be started", starts_after_pauses(environ, times))
        )
    rows.append(spread("to the first answer, nothing there yet", [first]))
    rows.append(spread("`import app` in a new process", importing))
    click.echo(table(("seconds", "least", "median", "most", "CPU, median"), rows))
    click.echo(f"\n{ranking(imports, 'own')}\n\n{ranking(imports, 'whole')}")


def starts_after_pauses(environ: Mapping[str, str], times: int) -> list[Taken]:
    """Starts after PostgreSQL has stopped, as it does when no process uses it."""
    found = []
    for _ in range(times):
        await_idle(environ)
        found.append(start(environ))
    await_idle(environ)
    return found


def await_idle(environ: Mapping[str, str]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    running = Path(environ["BILLING_STATE_DIR"], "postgres/data/postmaster.pid")
    while running.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def start(environ: Mapping[str, str]) -> Taken:
    """Measure from the start of the process to the first answer over HTTP."""
    port = free_port()
    command = [sys.executable, "-m", "billing.cli", "serve", "--no-worker", "--port", str(port)]
    quiet = subprocess.DEVNULL
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **KEPT, **environ}, stdin=quiet, stdout=quiet, stderr=quiet
    ) as process:
        try:
            while not answers(port):
                if process.poll() is not None:
                    raise RuntimeError("The server does not start.")
                time.sleep(POLL_SECONDS)
            return Taken(time.monotonic() - began, cpu_seconds(process.pid))
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def importing_app(environ: Mapping[str, str]) -> Taken:
    began, before = time.monotonic(), children_cpu()
    import_app(environ)
    return Taken(time.monotonic() - began, children_cpu() - before)


def children_cpu() -> float:
    """The CPU seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imported(installation: Installation) -> list[Import]:
    """Each module that `import app` imports, as reported by `-X importtime`."""
    output = import_app(installation.environ, "-X", "importtime")
    return [
        Import(found["module"], int(found["own"]) / 1000, int(found["whole"]) / 1000)
        for found in LINE.finditer(output)
    ]


def import_app(environ: Mapping[str, str], *options: str) -> str:
    command = [sys.executable, *options, "-c", "import app"]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **KEPT, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stderr


def spread(title: str, taken: Sequence[Taken]) -> list[str]:
    seconds, cpu = [each.seconds for each in taken], [each.cpu for each in taken]
    shown = (min(seconds), statistics.median(seconds), max(seconds), statistics.median(cpu))
    return [title, *(f"{each:.2f}" for each in shown)]


def ranking(imports: Sequence[Import], by: str) -> str:
    """The modules that took longest, by themselves or with what they import."""
    longest = sorted(imports, key=lambda each: getattr(each, by), reverse=True)[:SHOWN]
    title = "by itself" if by == "own" else "with what it imports"
    rows: Iterator[list[str]] = ([each.module, f"{each.own:.1f}", f"{each.whole:.1f}"] for each in longest)
    return table((f"import, {title}", "own ms", "whole ms"), list(rows))


if __name__ == "__main__":
    main()
