"""A profile of our server under one case, sampled from outside by py-spy."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.requests.servers import BENCH_BIN, Server
from billing.cli.console import table

RATE = 200
# The frames that lead to it only start the server.
TRUNK = "asyncio/runners.py:Runner.run"
SHOWN = 45


def record(server: Server, seconds: int, folded: Path, *, native: bool) -> subprocess.Popen[bytes]:
    """Start sampling the thread that holds the GIL; the stacks are in the file when py-spy has ended.

    Otherwise most samples would be of waiting threads.
    """
    command = [str(BENCH_BIN / "py-spy"), "record", "--pid", str(server.process.pid), "--gil"]
    command += ["--format", "raw", "--rate", str(RATE), "--duration", str(seconds), "--output", str(folded)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, *(["--native"] if native else [])], stdout=quiet, stderr=quiet)


def tables(folded: Path) -> str:
    """The samples by function, by itself and with what it calls, and by line."""
    stacks = [stack_of(line) for line in folded.read_text().splitlines()]
    total = sum(count for _, count in stacks)
    own, within, lines = Counter[str](), Counter[str](), Counter[str]()
    for frames, count in stacks:
        functions = [frame.rpartition(":")[0] for frame in frames]
        own[functions[-1]] += count
        lines[frames[-1]] += count
        within.update(dict.fromkeys(functions, count))
    return "\n\n".join(
        [
            f"{total} samples",
            ranking("function", own, within, total, by=within),
            ranking("function, by itself", own, within, total, by=own),
            ranking("line, by itself", lines, lines, total, by=lines),
        ]
    )


def stack_of(line: str) -> tuple[Sequence[str], int]:
    stack, _, count = line.rpartition(" ")
    frames = [shortened(frame) for frame in stack.split(";")]
    start = next((number for number, frame in enumerate(frames) if frame.startswith(TRUNK)), 0)
    return frames[start:], int(count)


def shortened(frame: str) -> str:
    """`function (file:line)` as `package/file:function:line`, which sorts and reads better."""
    function, _, place = frame.partition(" (")
    path, _, line = place.rstrip(")").rpartition(":")
    return f"{'/'.join(Path(path).parts[-3:])}:{function}:{line}" if path else f"{frame}:"


def ranking(title: str, own: Counter[str], within: Counter[str], total: int, *, by: Counter[str]) -> str:
    rows: Iterable[list[str]] = (
        [name, f"{100 * own[name] / total:.1f}", f"{100 * within[name] / total:.1f}"]
        for name, _ in by.most_common(SHOWN)
    )
    return str(table((title, "itself %", "with what it calls %"), list(rows)))
