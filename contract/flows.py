"""The flows of `flows.arazzo.yaml`, run by `redocly respect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from billing.http.document import load, operations
from contract.programs import ROOT, Place, opened_place, ran, state_directory

FLOWS = ROOT / "contract/flows.arazzo.yaml"
WORKFLOWS = ("keys", "passwords", "webhooks", "stripe")
PATIENCE_SECONDS = 180
PASSWORD = "correct horse battery staple"

Json = dict[str, Any]


def check() -> str:
    """Run the flows, and count their steps and checks; raises `AssertionError` with what failed."""
    with opened_place() as place, state_directory() as directory:
        done, report = respected(place, directory / "report.json")
    steps = [
        step
        for file in report["files"].values()
        for flow in file["executedWorkflows"]
        for step in flow["executedSteps"]
    ]
    checks = [check for step in steps for check in step["checks"]]
    failed = [
        f"{check['name']}: {check.get('message', '')}" for check in checks if check["status"] != "success"
    ]
    assert done == 0 and not failed, "\n".join(failed) or f"redocly respect ended with {done}"
    called = {(step["request"]["method"].upper(), urlsplit(step["request"]["url"]).path) for step in steps}
    missing = [one.operation_id for one in operations(load()) if (one.method, one.path) not in called]
    assert not missing, f"in no flow: {', '.join(missing)}"
    return f"{len(WORKFLOWS)} flows, {len(steps)} steps, {len(checks)} checks"


def respected(place: Place, report: Path) -> tuple[int, Json]:
    """The exit code of `redocly respect`, and its report."""
    inputs = {f"{name}_email": f"{uuid4().hex}@acme.example" for name in WORKFLOWS}
    inputs |= {"password": PASSWORD, "webhook_url": place.receiver_url}
    arguments = [str(FLOWS), "--input", json.dumps(inputs), "--server", f"billing={place.url}"]
    done = ran("redocly", "respect", *arguments, "--json-output", str(report), seconds=PATIENCE_SECONDS)
    assert report.exists(), f"redocly respect failed:\n{done.stdout}{done.stderr}"
    result: Json = json.loads(report.read_bytes())
    return done.returncode, result
