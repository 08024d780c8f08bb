"""`billing audit` on a real log: listed, exported, and verified after tampering."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text

from billing import keys, tenants, users
from billing.actors import OPERATOR, Actor
from billing.cli import main
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.tenants import Registered
from tests.conftest import STATE, TestDatabase

# The package has a command of that name.
command = importlib.import_module("billing.cli.audit")
NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
Run = Callable[..., Result]


@pytest.fixture
def run(test_database: TestDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Run:
    environ = {
        "BILLING_STATE_DIR": str(STATE),
        "DATABASE_URL": test_database.app_url,
        "MIGRATION_DATABASE_URL": test_database.owner_url,
    }
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["audit", *arguments], env=environ)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


def register(store: Store, settings: Settings, name: str) -> Registered:
    details = {"company_name": name, "email": f"ada@{name}.example"}
    with store.tenant(new_id(), Actor("anonymous", None, "192.0.2.1", "request-1")) as tx:
        digests = KeyDigests(settings.key_peppers)
        return tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)


@pytest.fixture
def acme(store: Store, settings: Settings) -> Registered:
    """A tenant with five rows in its log."""
    made = register(store, settings, "Acme")
    ada = Actor("user", made.owner.id, "2001:db8::1", "request-2")
    with store.tenant(made.tenant.id, ada) as tx:
        keys.revoke(tx, "live", reason="leaked in\n\x1b[31m", now=NOW + timedelta(hours=1))
    with store.tenant(made.tenant.id, OPERATOR) as tx:
        tenants.set_tier(tx, "pro", now=NOW + timedelta(days=1))
        users.disable(tx, add_bob(tx, made), now=NOW + timedelta(days=1))
    return made


def add_bob(tx: Any, made: Registered) -> str:
    bob = users.new_user(made.tenant.id, {"email": "bob@acme.example"}, role="developer", now=NOW)
    tx.directory.claim("email", bob.email, bob.id)
    tx.users.add(bob, password_hash="-")
    return bob.email


ACTIONS = ["tenant.registered", "user.added", "api_key.revoked", "tenant.tier_changed", "user.disabled"]


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def change(superuser: Engine, statement: str) -> None:
    with superuser.begin() as connection:
        connection.execute(text(statement))


# list --------------------------------------------------------------------------------------------


def test_list_shows_the_newest_rows_first(run: Run, acme: Registered) -> None:
    head, *rows = run("list", "acme").stdout.splitlines()
    assert head.split() == ["ROW", "AT", "ACTION", "ACTOR", "SUBJECT", "REASON", "ADDRESS", "REQUEST", "ID"]
    assert [row.split()[3] for row in rows] == ACTIONS[::-1]
    assert f"user {acme.owner.id}" in rows[2] and "2001:db8::1" in rows[2] and "request-2" in rows[2]
    assert "leaked in\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31m" in rows[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--limit", "2"], [5, 4]),
        (["--action", "user.added"], [2]),
        (["--action", "user"], []),
        (["--actor", "operator"], [5, 4]),
        (["--actor", "ADA@acme.example"], [3]),
        (["--since", "2026-01-15T10:30:00Z"], [5, 4, 3]),
        (["--until", "2026-01-15T10:30:00Z"], [2, 1]),
        (["--since", "2026-01-15T10:30:00Z", "--until", "2026-01-16T00:00:00Z"], [3]),
        (["--since", "1d"], []),
        (["--actor", "anonymous", "--action", "tenant.registered"], [1]),
    ],
)
def test_list_shows_the_rows_that_match_its_options(
    run: Run, acme: Registered, options: list[str], expected: list[int]
) -> None:
    assert [row["sequence"] for row in lines(run("list", "acme", "--json", *options))] == expected


def test_list_finds_an_actor_by_id(run: Run, acme: Registered) -> None:
    rows = lines(run("list", "acme", "--json", "--actor", str(acme.owner.id)))
    assert [(row["action"], row["reason"]) for row in rows] == [("api_key.revoked", "leaked in\n\x1b[31m")]
    assert rows[0]["details"]["revoked"][0]["type"] == "live_public"


def test_an_unknown_actor_is_a_one_line_error(run: Run, acme: Registered) -> None:
    assert "no user with this email" in run("list", "acme", "--actor", "eve@acme.example", code=1).stderr


# export ------------------------------------------------------------------------------------------


def test_export_can_be_verified_independently(
    run: Run, acme: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHUNK", 2)
    exported = run("export", "acme").stdout.encode().splitlines()
    previous = bytes(32)
    for line in exported:
        row = json.loads(line)
        claimed = row.pop("hash")
        made = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        previous = hashlib.sha256(previous + made).digest()
        assert claimed == previous.hex()
        assert line == made[:-1] + f',"hash":"{claimed}"}}'.encode()
    assert [json.loads(line)["action"] for line in exported] == ACTIONS
    assert run("verify", "acme").stdout == f"acme: whole, 5:{previous.hex()}\n"


def test_export_continues_after_a_row(run: Run, acme: Registered) -> None:
    assert [row["sequence"] for row in lines(run("export", "acme", "--after", "3"))] == [4, 5]
    assert run("export", "acme", "--after", "5").stdout == ""


# verify ------------------------------------------------------------------------------------------

TAMPERINGS = {
    "UPDATE audit_log SET reason = 'x' WHERE sequence = 3": "Row 3 is not what was written",
    "UPDATE audit_log SET hash = sha256('x') WHERE sequence = 2": "Row 2 is not what was written",
    "DELETE FROM audit_log WHERE sequence = 3": "Row 3 is missing: row 4 stands there",
    "DELETE FROM audit_log WHERE sequence = 1": "Row 1 is missing",
    "DELETE FROM audit_log WHERE sequence > 3": "Row 4 is missing: the log was cut off, it went on to row 5",
    "DELETE FROM audit_log": "Row 1 is missing: the log was cut off",
    "UPDATE audit_heads SET sequence = 4": "Row 4 has another hash than was noted",
    "UPDATE audit_heads SET hash = sha256('x')": "Row 5 has another hash than was noted",
    "UPDATE audit_heads SET (sequence, hash) = (SELECT sequence, hash FROM audit_log WHERE sequence = 4)": (
        "Row 5 was inserted"
    ),
    "DELETE FROM audit_heads": "Its head is missing",
    "INSERT INTO audit_log SELECT tenant_id, 6, at, action, actor_kind, actor_id, subject, reason, details, "
    "address, request_id, hash FROM audit_log WHERE sequence = 5": "Row 6 was inserted",
    "INSERT INTO audit_log SELECT tenant_id, -1, at, action, actor_kind, actor_id, subject, reason, details, "
    "address, request_id, hash FROM audit_log WHERE sequence = 5": "Row -1 was inserted",
    "UPDATE audit_log SET sequence = 7 - sequence + 10 WHERE sequence IN (3, 4); "
    "UPDATE audit_log SET sequence = sequence - 10 WHERE sequence > 10": "Row 3 is not what was written",
}


@pytest.mark.parametrize("chunk", [2, 2000])
@pytest.mark.parametrize(("statement", "message"), TAMPERINGS.items(), ids=TAMPERINGS.values())
def test_verify_names_the_first_wrong_row(
    run: Run,
    acme: Registered,
    superuser: Engine,
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    message: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(command, "CHUNK", chunk)
    run("verify", "acme")
    change(superuser, statement)
    ended = run("verify", "acme", code=1)
    assert ended.stdout.startswith(f"acme: broken. {message}")
    assert ended.stderr == "Error: An audit log is broken.\n"


def test_a_rewritten_log_is_detected_by_a_noted_head(
    run: Run, acme: Registered, store: Store, superuser: Engine
) -> None:
    noted = run("verify", "acme").stdout.split()[-1]
    with store.tenant(acme.tenant.id, OPERATOR) as tx:
        tenants.set_tier(tx, "free", now=NOW)
    assert run("verify", "acme", "--expect", noted).stdout.startswith("acme: whole, 6:")
    change(superuser, "DELETE FROM audit_log WHERE sequence > 2")
    change(
        superuser,
        "UPDATE audit_heads SET (sequence, hash) = (SELECT sequence, hash FROM audit_log WHERE sequence = 2)",
    )
    run("verify", "acme")
    assert "cut off, it went on to row 5" in run("verify", "acme", "--expect", noted, code=1).stdout
    with store.tenant(acme.tenant.id, OPERATOR) as tx:
        for is_active in (False, True, False):
            tenants.set_active(tx, is_active=is_active, now=NOW)
    run("verify", "acme")
    assert "Row 5 has another hash" in run("verify", "acme", "--expect", noted, code=1).stdout


def test_verify_all_continues_after_a_broken_log(
    run: Run, acme: Registered, store: Store, settings: Settings, superuser: Engine
) -> None:
    register(store, settings, "Globex")
    assert [line.split(",")[0] for line in run("verify", "--all").stdout.splitlines()] == [
        "acme: whole",
        "globex: whole",
    ]
    change(superuser, f"UPDATE audit_log SET reason = 'x' WHERE tenant_id = '{acme.tenant.id}'")
    ended = run("verify", "--all", code=1)
    assert [line[:14] for line in ended.stdout.splitlines()] == ["acme: broken. ", "globex: whole,"]


@pytest.mark.parametrize(
    "arguments", ["", "acme --all", f"--all --expect 1:{'0' * 64}", "acme --expect 1", "acme --expect x:y"]
)
def test_2_for_wrong_usage(run: Run, arguments: str) -> None:
    run("verify", *arguments.split(), code=2)


def test_rows_written_during_verification_are_not_reported(
    run: Run, acme: Registered, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.chunks

    def with_a_writer(*arguments: Any, **options: Any) -> Any:
        for rows in real(*arguments, **options):
            yield rows
            with store.tenant(acme.tenant.id) as tx:
                tx.audit.record("test.done", now=NOW)

    monkeypatch.setattr(command, "chunks", with_a_writer)
    assert run("verify", "acme").stdout.startswith("acme: whole, 5:")
    assert run("verify", "acme").stdout.startswith("acme: whole, 6:")
