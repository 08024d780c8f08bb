"""A backup is proved by restoring it: dumped, restored into a new server with its roles, verified, and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner

from billing.cli import main
from billing.storage import binaries, database
from billing.storage.database import Database
from tests import live
from tests.conftest import API, PASSWORD, VOLATILE


@pytest.fixture
def directory() -> Iterator[Callable[[str], Path]]:
    """Directories by name, in memory where possible."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="billing-backup-", dir=memory))
    made.chmod(0o711)
    yield lambda name: made / name
    shutil.rmtree(made, ignore_errors=True)


def run(opened: Database, program: str, *arguments: str) -> None:
    """One of PostgreSQL's programs, as the superuser of an embedded server."""
    assert opened.server
    cluster = opened.server.cluster
    environ = {
        **binaries.environment(),
        "PGHOST": str(cluster.socket_dir),
        "PGPORT": str(cluster.port),
        "PGUSER": cluster.superuser,
        "PGPASSWORD": cluster.password,
    }
    found = binaries.find(cluster.socket_dir.parent / "data", None).directory / program
    subprocess.run([found, *arguments], env={**os.environ, **environ}, check=True, timeout=60)


def call(url: str, method: str, path: str, **more: Any) -> Any:
    answer = requests.request(method, f"{url}{API}{path}", timeout=20, **more)
    assert answer.ok, answer.text
    return answer.json()


def run_billing(state_dir: Path, *arguments: str) -> str:
    ended = CliRunner().invoke(main, arguments, env={"BILLING_STATE_DIR": str(state_dir), "DATABASE_URL": ""})
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_a_restored_dump_works_on_a_new_server(directory: Callable[[str], Path]) -> None:
    old, new, dump = directory("old"), directory("new"), str(directory("billing.dump"))
    ada = {"email": "ada@acme.example", "password": PASSWORD}
    with closing(database.open_embedded(old, options=VOLATILE)) as opened:
        with live.serving({"BILLING_STATE_DIR": str(old), "DATABASE_URL": ""}, "--no-worker") as url:
            made = call(url, "POST", "/register/", json={"company_name": "Acme", **ada})
            call(url, "POST", "/login/", json=ada)
        heads = run_billing(old, "audit", "verify", "--all")
        run(opened, "pg_dump", "--format=custom", f"--file={dump}", "billing")

    # Opening a new state directory creates its server, the roles and an empty database.
    new.mkdir(mode=0o700)
    shutil.copy2(old / "secrets.env", new)
    with closing(database.open_embedded(new, options=VOLATILE)) as opened:
        run(opened, "dropdb", "billing")
        run(opened, "pg_restore", "--exit-on-error", "--create", "--dbname=postgres", dump)
        assert run_billing(new, "audit", "verify", "--all") == heads
        with live.serving({"BILLING_STATE_DIR": str(new), "DATABASE_URL": ""}, "--no-worker") as url:
            back = call(url, "POST", "/login/", json=ada)
            assert back["tenant"]["id"] == made["tenant"]["id"]
            key = {"X-API-Key": made["tenant"]["api_key_secret"]}
            assert call(url, "GET", "/verify/", headers=key)["valid"] is True
            bearer = {"Authorization": f"Bearer {back['tokens']['access']}"}
            assert call(
                url, "POST", "/api-keys/revoke/", headers=bearer, json={"key_type": "all", "confirm": True}
            )
        assert run_billing(new, "audit", "verify", "--all").startswith("acme: whole, 5:")
