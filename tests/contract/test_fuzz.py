"""How the time for fuzzing is divided among runs, and which complaints a run can have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from contract.callers import CALLERS
from contract.exercised import Ledger
from contract.fuzz import FEW, RUNS, Effort, Outcome, Run, main, missed, share, summary

OWNER, SECRET_KEY = RUNS[0], RUNS[1]


def test_every_caller_has_a_run() -> None:
    assert {run.caller for run in RUNS} == CALLERS.keys()
    assert [run.name for run in RUNS if run.has_neighbours and run.caller == "owner"]
    assert len({run.name for run in RUNS}) == len(RUNS)


@pytest.mark.parametrize("seconds", [120.0, 900.0])
def test_the_shares_add_up_to_the_time(seconds: float) -> None:
    left = seconds
    for number in range(len(RUNS)):
        mine = share(RUNS[number:], left)
        assert seconds / 20 < mine <= seconds / 3
        left -= mine
    assert abs(left) < 1


def test_the_share_of_overspent_time_is_zero() -> None:
    assert share(RUNS[-1:], -5) == 0


def test_few_cases_are_deterministic_and_many_can_be_repeated_by_seed() -> None:
    assert "--generation-deterministic" in FEW.options
    assert Effort(61.5, 7).options == ["--phases", "fuzzing,stateful", "--max-time", "61", "--seed", "7"]


def report(run: Run, **more: Any) -> dict[str, Any]:
    """What Schemathesis reports when all is well."""
    open_to = [f"{o.method} {o.path}" for o in run.operations if run.may_call(o)]
    closed = [f"{o.method} {o.path}" for o in run.operations if not run.may_call(o)]
    return {
        "phases": {"coverage": {"status": "success"}},
        "operations": {"tested": len(run.operations)},
        "valid_rates": {label: {"fuzzing": {"accepted": 1}} for label in open_to},
        "warnings": {"missing_auth": closed, "validation_mismatch": ["whatever"]},
        "test_cases": {"generated": 5},
        "running_time": 1.0,
        **more,
    }


@pytest.mark.parametrize("run", [OWNER, SECRET_KEY])
def test_a_good_run_has_no_complaints(run: Run) -> None:
    assert list(missed(run, report(run))) == []


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"phases": {"stateful": {"status": "skip"}}}, "without success: stateful"),
        ({"operations": {"tested": 3}}, "3 operations tested"),
        ({"valid_rates": {}}, "nothing valid was accepted"),
        ({"warnings": {"missing_auth": ["GET /"]}}, "warnings"),
    ],
)
def test_a_bad_run_has_a_complaint(more: dict[str, Any], complaint: str) -> None:
    [found] = missed(OWNER, report(OWNER, **more))
    assert complaint in found


def test_the_summary_adds_up_all_outcomes() -> None:
    first = Ledger({"a status 200"}, Counter({"200": 2}))
    outcomes = [Outcome(OWNER, "", report(OWNER), first, []) for _ in range(2)]
    whole, line = summary(outcomes)
    assert line == "10 cases by 1 runs, 1 operations, statuses 200: 4"
    assert whole.names == {"a status 200"}


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "no such run"])
    assert ended.value.code == 2
    assert "owner beside other tenants" in capsys.readouterr().err
