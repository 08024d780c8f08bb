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
from sandbox.stripe import Sandbox
from tests import live
from tests.answers import DOCUMENT
from tests.conftest import clone
from tests.contract.callers import CALLERS
from tests.receivers import Receiver, answers, receiving

ROOT = Path(__file__).parents[2]
STRIPE = "Stripe Connect"
NEEDS_NO_STRIPE = {"get_stripe_status", "disconnect_stripe"}
SHORT = 10
EXAMPLES = int(os.environ.get("BILLING_FUZZ_EXAMPLES", SHORT))
PATIENCE_SECONDS = 100 + 4 * EXAMPLES


@pytest.fixture(scope="module")
def environ(cluster: embedded.Cluster, worker_id: str) -> dict[str, str]:
    """A database of its own, and no rate limits: they would answer most cases with 429."""
    name = f"billing_fuzz_{worker_id}"
    clone(cluster, name)
    return {"DATABASE_URL": database.url(cluster, database.APP, name), "RATE_LIMITS": "off"}


@pytest.fixture(scope="module")
def server_url(environ: dict[str, str]) -> Iterator[str]:
    """A server that takes the sandbox for Stripe, and sends webhooks to loopback too."""
    with Sandbox() as stripe, live.serving({**environ, **stripe.environ, **live.OPEN_LOOPBACK}) as url:
        yield url


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Somebody who takes every webhook."""
    with receiving(answers(204, b"")) as running:
        yield running


@pytest.fixture
def server_url_without_stripe(environ: dict[str, str]) -> Iterator[str]:
    with live.serving({**environ, "STRIPE_SECRET_KEY": "", "STRIPE_CONNECT_CLIENT_ID": ""}) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("who", CALLERS)
def test_the_server_does_what_its_document_says(
    server_url: str, receiver: Receiver, who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = fuzz(server_url, who, tmp_path / "report.json", receiver=url_of(receiver))
    came = [json.loads(one.body) for one in receiver.received]
    sent = {
        "tests": sum(is_test(event) for event in came),
        "others": sum(not is_test(event) for event in came),
    }
    with capsys.disabled():
        print(f"\n{who}: {told(report)}, {sent['tests']} tests and {sent['others']} other events delivered")
    assert set(of(report["phases"], "status")) == {"success"}
    assert report["operations"]["tested"] == len(BUILT)
    # Some of what is valid was accepted: refusing everything would look as clean.
    assert labels(o for o in BUILT if may_call(who, o)) <= accepted(report)
    # The worker delivers whoever calls: anybody may register with a URL.
    assert sent["others"] > 0
    assert (sent["tests"] > 0) == (who == "owner")
    warnings = {name: places for name, places in report["warnings"].items() if places}
    assert warnings == closed_to(who)


@pytest.mark.slow
def test_the_server_does_so_where_stripe_is_not_configured(
    server_url_without_stripe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = fuzz(server_url_without_stripe, "owner", tmp_path / "report.json", stripe="none", only=STRIPE)
    with capsys.disabled():
        print(f"\nowner, without Stripe: {told(report)}")
    assert set(of(report["phases"], "status")) == {"success"}
    # Nobody can start, so there is nothing to finish; the rest needs no Stripe.
    assert accepted(report) == labels(o for o in BUILT if o.operation_id in NEEDS_NO_STRIPE)


def fuzz(
    url: str,
    who: str,
    report: Path,
    *,
    stripe: str = "sandbox",
    receiver: str = "https://hooks.acme.example/",
    only: str | None = None,
) -> dict[str, Any]:
    """Run `st` against the server as somebody, for one tag only; its report, once nothing was found."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--max-examples", str(EXAMPLES), "--report", "json", "--report-json-path", str(report)]
    command += ["--generation-deterministic"] if EXAMPLES == SHORT else []
    command += ["--include-tag", only] if only else []
    choices = {"URL": url, "AS": who, "STRIPE": stripe, "RECEIVER": receiver}
    # The hooks are imported from the checkout.
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **{f"BILLING_FUZZ_{name}": value for name, value in choices.items()},
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(report.read_bytes())
    return said


def told(report: dict[str, Any]) -> str:
    return f"{report['test_cases']['generated']} cases in {report['running_time']:.0f} s"


def url_of(receiver: Receiver) -> str:
    """The receiver by the one name that development opens."""
    return f"http://localhost:{receiver.port}/in"


def is_test(event: dict[str, Any]) -> bool:
    return event["type"] == "webhook.test" and not event["livemode"]


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
RULES = CONFIG.get("operations", [])
LEFT_OUT = {name for rule in RULES if not rule["enabled"] for name in rule["include-operation-id"]}
BUILT = [operation for operation in operations(DOCUMENT) if operation.operation_id not in LEFT_OUT]


def test_only_what_is_not_built_is_left_out() -> None:
    said = [o for item in DOCUMENT["paths"].values() for o in item.values() if "501" in o["responses"]]
    assert {operation["operationId"] for operation in said} == LEFT_OUT


def test_no_check_and_no_phase_is_switched_off() -> None:
    assert all(check.get("enabled", True) for check in CONFIG["checks"].values())
    assert set(of(CONFIG["phases"], "enabled")) == {True}
    assert all(rule.keys() == {"include-operation-id", "enabled"} for rule in RULES)
