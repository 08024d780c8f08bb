"""What a start leaves out: modules that take long to import, and that it has no need of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Every module that there is in a process once it has imported the application."""
    code = "import app, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_what_only_the_tests_install_makes_no_start_longer(imported: set[str]) -> None:
    # jsonschema makes a grammar of it wherever it finds it, which takes longer than all the rest.
    assert "jsonschema" in imported
    assert "rfc3987_syntax" not in imported, "an older environment still has it: make clean"


def test_alembic_is_left_to_who_migrates(imported: set[str]) -> None:
    assert "billing.storage.schema" in imported
    assert "alembic" not in imported
