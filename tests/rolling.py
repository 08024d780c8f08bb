"""Starts the server of an earlier revision on this revision's schema, and runs its own `billing check` on it.

`make rolling BASE=main`. Revisions before migration 0006 cannot be tried: they require their exact schema.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

from benchmarks.installation import state_directory
from billing.storage import database
from tests import live

ROOT = Path(__file__).parents[1]


def checked_out(base: str, directory: Path) -> Path:
    """Extract the files of a revision."""
    packed = subprocess.run(["git", "archive", base], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(directory, filter="data")
    return directory


def walked(base: str) -> int:
    """The exit code of the earlier revision's `billing check`."""
    with state_directory() as place:
        earlier = checked_out(base, place / "earlier")
        with closing(database.open_embedded(place / "state")) as opened:
            environ = {
                "BILLING_STATE_DIR": str(place / "secrets"),
                "DATABASE_URL": opened.app_url,
                "PYTHONPATH": str(earlier),
                "PASSWORD_COST": "4",
            }
            with live.serving(environ, cwd=earlier) as url:
                check = [sys.executable, "-m", "billing.cli", "check", url]
                return subprocess.run(
                    check, cwd=earlier, env={**os.environ, **environ}, check=False
                ).returncode


if __name__ == "__main__":
    code = walked(sys.argv[1])
    verdict = "works" if code == 0 else "does not work"
    print(f"{sys.argv[1]} {verdict} on the schema of this revision.")
    sys.exit(code)
