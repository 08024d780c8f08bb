"""What startup does not import: slow modules that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Every module in a process that has imported the application."""
    code = "import app, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_rfc3987_syntax_is_not_imported_at_startup(imported: set[str]) -> None:
    # jsonschema builds a grammar with it wherever it is installed, which takes longer than all the rest.
    assert "jsonschema" in imported
    assert "rfc3987_syntax" not in imported, "an older environment still has it: make clean"


def test_alembic_is_not_imported_at_startup(imported: set[str]) -> None:
    assert "billing.storage.schema" in imported
    assert "alembic" not in imported
