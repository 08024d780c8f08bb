"""The running server against its document, by Schemathesis: `schemathesis.toml` says how, `hooks.py` as whom.

`BILLING_FUZZ_EXAMPLES` is the number of random cases for each operation and caller. The few that every run
has are always the same; more are new ones each time, and a failure prints its seed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from billing.http.document import Operation, operations
from billing.storage import database, embedded
from tests import live
from tests.answers import DOCUMENT
from tests.conftest import clone
from tests.contract.callers import CALLERS

ROOT = Path(__file__).parents[2]
SHORT = 10
EXAMPLES = int(os.environ.get("BILLING_FUZZ_EXAMPLES", SHORT))
PATIENCE_SECONDS = 100 + 4 * EXAMPLES


@pytest.fixture(scope="module")
def server_url(cluster: embedded.Cluster, worker_id: str) -> Iterator[str]:
    """A server on a database of its own, without rate limits: they would answer most cases with 429."""
    name = f"billing_fuzz_{worker_id}"
    clone(cluster, name)
    environ = {"DATABASE_URL": database.url(cluster, database.APP, name), "RATE_LIMITS": "off"}
    with live.serving(environ) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("who", CALLERS)
def test_the_server_does_what_its_document_says(
    server_url: str, who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = fuzz(server_url, who, tmp_path / "report.json")
    with capsys.disabled():
        print(f"\n{who}: {report['test_cases']['generated']} cases in {report['running_time']:.0f} s")
    assert set(of(report["phases"], "status")) == {"success"}
    assert report["operations"]["tested"] == len(BUILT)
    # Some of what is valid was accepted: refusing everything would look as clean.
    assert labels(o for o in BUILT if may_call(who, o)) <= accepted(report)
    warnings = {name: places for name, places in report["warnings"].items() if places}
    assert warnings == closed_to(who)


def fuzz(url: str, who: str, report: Path) -> dict[str, Any]:
    """Run `st` against the server as somebody; its report, once nothing was found."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--max-examples", str(EXAMPLES), "--report", "json", "--report-json-path", str(report)]
    command += ["--generation-deterministic"] if EXAMPLES == SHORT else []
    # The hooks are imported from the checkout.
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "BILLING_FUZZ_URL": url, "BILLING_FUZZ_AS": who}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(report.read_bytes())
    return said


def of(mapping: dict[str, dict[str, Any]], name: str) -> list[Any]:
    return [value[name] for value in mapping.values()]


def accepted(report: dict[str, Any]) -> set[str]:
    """The operations that answered 2xx to something valid, as `METHOD /path/`."""
    return {label for label, by_phase in report["valid_rates"].items() if any(of(by_phase, "accepted"))}


def may_call(who: str, operation: Operation) -> bool:
    return not operation.schemes or CALLERS[who].scheme in operation.schemes


def closed_to(who: str) -> dict[str, list[str]]:
    """The warnings there must be: that an operation says 401 to everything, where it is not open to the caller."""
    closed = sorted(labels(o for o in BUILT if not may_call(who, o)))
    return {"missing_auth": closed} if closed else {}


def labels(listed: Iterator[Operation]) -> set[str]:
    return {f"{operation.method} {operation.path}" for operation in listed}


# What is left out --------------------------------------------------------------------------------

CONFIG = tomllib.loads((ROOT / "schemathesis.toml").read_text(encoding="utf-8"))
LEFT_OUT = {
    name for rule in CONFIG["operations"] if not rule["enabled"] for name in rule["include-operation-id"]
}
BUILT = [operation for operation in operations(DOCUMENT) if operation.operation_id not in LEFT_OUT]


def test_only_what_is_not_built_is_left_out() -> None:
    said = [o for item in DOCUMENT["paths"].values() for o in item.values() if "501" in o["responses"]]
    assert {operation["operationId"] for operation in said} == LEFT_OUT


def test_no_check_and_no_phase_is_switched_off() -> None:
    assert all(check.get("enabled", True) for check in CONFIG["checks"].values())
    assert set(of(CONFIG["phases"], "enabled")) == {True}
    assert all(rule.keys() == {"include-operation-id", "enabled"} for rule in CONFIG["operations"])
