"""How the time for fuzzing is shared out, and what is held against a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from contract.callers import CALLERS
from contract.exercised import Ledger
from contract.fuzz import FEW, RUNS, Effort, Outcome, Run, main, missed, share, summary

OWNER, SECRET_KEY = RUNS[0], RUNS[1]


def test_every_caller_has_a_share() -> None:
    assert {run.caller for run in RUNS} == CALLERS.keys()
    assert [run.name for run in RUNS if run.has_neighbours and run.caller == "owner"]
    assert len({run.name for run in RUNS}) == len(RUNS)


@pytest.mark.parametrize("seconds", [120.0, 900.0])
def test_the_shares_make_up_the_time(seconds: float) -> None:
    left = seconds
    for number in range(len(RUNS)):
        mine = share(RUNS[number:], left)
        assert seconds / 20 < mine <= seconds / 3
        left -= mine
    assert abs(left) < 1


def test_what_others_took_too_long_for_is_no_time_at_all() -> None:
    assert share(RUNS[-1:], -5) == 0


def test_few_cases_are_always_the_same_and_many_can_be_repeated() -> None:
    assert "--generation-deterministic" in FEW.options
    assert Effort(61.5, 7).options == ["--phases", "fuzzing,stateful", "--max-time", "61", "--seed", "7"]


def report(run: Run, **more: Any) -> dict[str, Any]:
    """What Schemathesis says when all is well."""
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
def test_nothing_is_held_against_a_good_run(run: Run) -> None:
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
def test_what_is_held_against_a_run(more: dict[str, Any], complaint: str) -> None:
    [said] = missed(OWNER, report(OWNER, **more))
    assert complaint in said


def test_the_summary_adds_up() -> None:
    first = Ledger({"a status 200"}, Counter({"200": 2}))
    outcomes = [Outcome(OWNER, "", report(OWNER), first, []) for _ in range(2)]
    whole, told = summary(outcomes)
    assert told == "10 cases by 1 runs, 1 operations, statuses 200: 4"
    assert whole.names == {"a status 200"}


def test_a_run_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "no such run"])
    assert ended.value.code == 2
    assert "owner beside other tenants" in capsys.readouterr().err
