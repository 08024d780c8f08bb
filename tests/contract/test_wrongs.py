"""The list of wrongs is one that can still be done: `make contract` does them, and sees that tests notice."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from contract.wrongs import WRONGS, Stale, Wrong

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_a_wrong_changes_what_is_there(wrong: Wrong) -> None:
    text = (ROOT / wrong.file).read_text()
    assert wrong.applied(text) != text


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_who_should_notice_exists(wrong: Wrong) -> None:
    for place in wrong.tests:
        path, _, name = place.partition("::")
        functions = [
            n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)
        ]
        assert not name or name in functions


def test_each_has_a_name_of_its_own() -> None:
    assert len({wrong.name for wrong in WRONGS}) == len(WRONGS) >= 30


def test_one_that_cannot_be_done_is_noticed() -> None:
    gone = Wrong("gone", "app.py", "no such text", "", (), after="import")
    with pytest.raises(Stale, match=r"gone: app\.py"):
        gone.applied("import os\n")
