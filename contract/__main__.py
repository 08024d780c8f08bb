"""`python -m contract`: runs every check of the contract, and prints a line for each and a count."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from contract import breaking, flows, fuzz, lint, mutations, proxy, sdks

Check = tuple[str, Callable[[], str]]


def checks() -> list[Check]:
    """All checks, the quick ones first."""
    return [
        *lint.checks(),
        ("breaking changes, planted", breaking.check),
        ("flows, redocly respect", flows.check),
        ("proxy, prism", proxy.check),
        *sdks.checks(),
        ("fuzz, schemathesis", fuzz.check),
        ("mutations", mutations.check),
    ]


def run(chosen: Sequence[Check]) -> int:
    """Run the checks, and print each result as it comes; returns how many failed."""
    failed = 0
    for name, check in chosen:
        began = time.monotonic()
        verdict, message = _outcome(check)
        failed += verdict == "FAIL"
        print(f"{verdict}  {name:<38} {time.monotonic() - began:6.1f} s  {message}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return failed


def _outcome(check: Callable[[], str]) -> tuple[str, str]:
    try:
        return "PASS", check()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return "FAIL", str(error)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m contract", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="those whose name has this in it")
    parser.add_argument("--list", action="store_true", help="say their names")
    options = parser.parse_args(arguments)
    chosen = [
        check for check in checks() if not options.only or any(part in check[0] for part in options.only)
    ]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    if not chosen:
        parser.error("no check has such a name: --list shows them")
    return 1 if run(chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
