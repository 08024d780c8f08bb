"""The running server against its document, by Schemathesis: configured by `schemathesis.toml` and `hooks.py`.

A few cases, always the same: `make fuzz` takes more time, and new cases.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.storage import embedded
from contract.fuzz import FEW, RUNS, Run, Server, fuzz, serving
from tests.answers import DOCUMENT
from tests.conftest import clone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database(cluster: embedded.Cluster, worker_id: str) -> str:
    name = f"billing_fuzz_{worker_id}"
    clone(cluster, name)
    return name


@pytest.fixture(scope="module")
def server(cluster: embedded.Cluster, database: str) -> Iterator[Server]:
    with serving(cluster, database, {}, has_stripe=True) as running:
        yield running


@pytest.fixture
def server_without_stripe(cluster: embedded.Cluster, database: str) -> Iterator[Server]:
    with serving(cluster, database, {}, has_stripe=False) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_server_conforms_to_its_document(
    run: Run, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    server = request.getfixturevalue("server" if run.has_stripe else "server_without_stripe")
    outcome = fuzz(run, server, FEW)
    with capsys.disabled():
        print(f"\n{run.name}: {outcome.summary}")
    assert not outcome.complaints, "\n".join([outcome.output, *outcome.complaints])


# Nothing is disabled -----------------------------------------------------------------------------

CONFIG = tomllib.loads((ROOT / "schemathesis.toml").read_text(encoding="utf-8"))


def test_no_operation_check_or_phase_is_disabled() -> None:
    assert "operations" not in CONFIG
    assert all(check.get("enabled", True) for check in CONFIG["checks"].values())
    assert {phase["enabled"] for phase in CONFIG["phases"].values()} == {True}
    assert not [o for item in DOCUMENT["paths"].values() for o in item.values() if "501" in o["responses"]]
