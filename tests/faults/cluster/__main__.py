"""`python -m tests.faults.cluster`: every fault in turn, or those that are named; says what came of each."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.faults.cluster import report
from tests.faults.cluster.faults import FAULTS
from tests.faults.cluster.scene import running_scene
from tests.faults.cluster.trial import Outcome, run_fault


def main() -> int:
    """0 when every fault was survived."""
    arguments = _arguments()
    # However this ends, it stops what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with running_scene(keep=arguments.keep) as scene:
        for fault in chosen:
            outcomes.append(run_fault(fault, scene))
            print(report.line(outcomes[-1]), flush=True)
    if arguments.into:
        report.write(outcomes, arguments.into, seconds=time.monotonic() - began)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return int(failed > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cluster", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], metavar="FAULT")
    parser.add_argument("--into", type=Path, help="write the table of figures into this document")
    parser.add_argument("--keep", type=Path, help="copy all logs to this directory")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
