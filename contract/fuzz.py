"""Schemathesis for longer than in `make test`, by every caller, in a time that is bounded."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from contract.programs import ROOT

EXAMPLES = 60
PATIENCE_SECONDS = 720
CASES = re.compile(r"^[\w, ]+: (\d+) cases in \d+ s", re.MULTILINE)


def check() -> str:
    """How many cases were tried; raises `AssertionError` with what was found."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--show-capture=no",
            "tests/contract/test_schemathesis.py",
        ],
        cwd=ROOT,
        env={**os.environ, "BILLING_FUZZ_EXAMPLES": str(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    numbers = [int(number) for number in CASES.findall(done.stdout)]
    assert numbers, f"Schemathesis tried nothing:\n{done.stdout[-2000:]}"
    return f"{sum(numbers)} cases in {len(numbers)} runs"
