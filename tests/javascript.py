"""Node.js and the packages of the JavaScript tests, which `make node` installs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PLACE = Path(__file__).parent / "webhooks/js"
NODE_MODULES = PLACE / "node_modules"


def node() -> str:
    """The path of Node.js; skips the test where that was asked for, and fails it where it is missing."""
    if os.environ.get("BILLING_TESTS_WITHOUT_NODE") == "1":
        pytest.skip("BILLING_TESTS_WITHOUT_NODE=1")
    found = shutil.which("node")
    if found is None or not NODE_MODULES.exists():
        pytest.fail("No Node.js or its packages: `make node`, or BILLING_TESTS_WITHOUT_NODE=1 to go without.")
    return found
