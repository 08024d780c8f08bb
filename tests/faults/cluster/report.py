"""The outcomes of the faults: a line for each as it ends, and a table for docs/reliability.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.cluster.trial import Outcome

BEGIN, END = '<!-- figures: make faults ARGS="--into docs/reliability.md" -->', "<!-- end of figures -->"
HEAD = (
    "Fault",
    "Writes away",
    "Reads away",
    "Each server away",
    "Slowest request",
    "Errors",
    "Replayed",
    "Sessions lost",
    "Delivered twice",
)
SHOWN_PROBLEMS = 12


def line(outcome: Outcome) -> str:
    """One fault's outcome, to be printed."""
    verdict = "FAILED" if outcome.problems else "ok"
    servers = " and ".join(f"{away:.1f}" for away in outcome.servers_away)
    said = (
        f"{verdict:<7}{outcome.fault.name}: {outcome.writes} writes; away: writes {outcome.writes_away:.1f} s, "
        f"reads {outcome.reads_away:.1f} s, servers {servers} s; slowest {outcome.slowest:.1f} s; "
        f"errors: {summary_of(outcome.errors)}; {outcome.replays} replayed, {outcome.sessions_lost} sessions lost, "
        f"{outcome.duplicates} delivered twice, all delivered after {outcome.delivered_after:.0f} s"
    )
    if outcome.worked_on:
        said += f"; replaced keys worked on {outcome.worked_on} times"
    hidden = len(outcome.problems) - SHOWN_PROBLEMS
    more = [f"… and {hidden} more"] if hidden > 0 else []
    return "\n       ".join([said, *outcome.problems[:SHOWN_PROBLEMS], *more])


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [HEAD, ("---", *["--:"] * 4, "---", *["--:"] * 3), *map(_row, outcomes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.fault.name + (" (**failed**)" if outcome.problems else ""),
        f"{outcome.writes_away:.1f} s",
        f"{outcome.reads_away:.1f} s",
        ", ".join(f"{away:.1f} s" for away in outcome.servers_away),
        f"{outcome.slowest:.1f} s",
        summary_of(outcome.errors),
        str(outcome.replays),
        str(outcome.sessions_lost),
        str(outcome.duplicates),
    )


def summary_of(errors: Mapping[str, int]) -> str:
    """`3 × 503, 2 × timeout`."""
    return ", ".join(f"{number} × {outcome}" for outcome, number in sorted(errors.items())) or "none"


def write(outcomes: Sequence[Outcome], document: Path, *, seconds: float) -> None:
    """Put the table between the marks of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    writes = sum(outcome.writes for outcome in outcomes)
    when = (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}: "
        f"{len(outcomes)} faults in {seconds / 60:.0f} minutes, {writes:,} acknowledged writes."
    )
    document.write_text(f"{before}{BEGIN}\n{when}\n\n{table(outcomes)}\n{END}{after}")
