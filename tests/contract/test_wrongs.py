"""Every wrong in the list still applies: `make contract` applies each, and checks that tests fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from contract.wrongs import WRONGS, Stale, Wrong

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_a_wrong_changes_its_file(wrong: Wrong) -> None:
    text = (ROOT / wrong.file).read_text()
    assert wrong.applied(text) != text


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_the_tests_that_should_fail_exist(wrong: Wrong) -> None:
    for place in wrong.tests:
        path, _, name = place.partition("::")
        functions = [
            n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)
        ]
        assert not name or name in functions


def test_each_wrong_has_a_unique_name() -> None:
    assert len({wrong.name for wrong in WRONGS}) == len(WRONGS) >= 30


def test_a_wrong_that_no_longer_applies_is_reported() -> None:
    gone = Wrong("gone", "app.py", "no such text", "", (), after="import")
    with pytest.raises(Stale, match=r"gone: app\.py"):
        gone.applied("import os\n")
