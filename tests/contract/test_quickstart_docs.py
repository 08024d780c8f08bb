"""docs/quickstart.md lists the document's operations, and who may call each."""

from __future__ import annotations

import re
from pathlib import Path

from billing.http.access import API_KEY
from billing.http.document import Operation, load, operations
from tests.conftest import API

PAGE = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")
OPERATIONS = tuple(operations(load()))


def callers(operation: Operation) -> str:
    if not operation.schemes:
        return "anyone"
    return ", ".join([*operation.roles, *(["API key"] if API_KEY in operation.schemes else [])])


def test_the_table_lists_every_operation_as_declared() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| `(/.*)` \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (each.operation_id, each.method.upper(), each.path.removeprefix(API), callers(each))
        for each in OPERATIONS
    ]


def test_the_page_states_the_number_and_paths_of_operations() -> None:
    assert f"## The {len(OPERATIONS)} operations\n" in PAGE
    assert f"Their paths begin with `{API}`." in PAGE
    assert all(each.path.startswith(API) for each in OPERATIONS)
