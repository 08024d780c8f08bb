"""Sessions: how long they work, and which repeat of a refresh token is forgiven."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from billing.errors import InvalidCredentials, WrongPassword
from billing.ids import new_id
from billing.keyrings import Keyring
from billing.passwords import Passwords
from billing.sessions import FAMILY_LIFETIME, RETRY_WINDOW, Session, authenticate, hashed, require_password
from billing.tenants import Account
from billing.users import User
from tests.test_tenants import ACME, ADA

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)
SESSION = Session(
    tenant_id=new_id(),
    id=new_id(),
    user_id=new_id(),
    current_jti=hashed("current"),
    previous_jti=hashed("previous"),
    created_at=NOW - timedelta(days=1),
    rotated_at=NOW,
    expires_at=NOW - timedelta(days=1) + FAMILY_LIFETIME,
)


@pytest.mark.parametrize(
    ("ended_at", "now", "works"),
    [
        (None, NOW, True),
        (None, SESSION.expires_at - MOMENT, True),
        (None, SESSION.expires_at, False),
        (NOW, NOW, False),
        (NOW + timedelta(days=1), NOW, False),
        (NOW, SESSION.expires_at, False),
    ],
)
def test_a_session_works_until_it_ends(ended_at: datetime | None, now: datetime, works: bool) -> None:
    assert replace(SESSION, ended_at=ended_at).works_at(now) is works


@pytest.mark.parametrize(
    ("previous", "jti", "after", "forgiven"),
    [
        ("previous", "previous", timedelta(0), True),
        ("previous", "previous", RETRY_WINDOW, True),
        ("previous", "previous", RETRY_WINDOW + MOMENT, False),
        ("previous", "current", timedelta(0), False),
        ("previous", "older", timedelta(0), False),
        ("previous", "", timedelta(0), False),
        (None, "previous", timedelta(0), False),
        (None, "", timedelta(0), False),
    ],
)
def test_only_a_prompt_repeat_of_the_previous_token_is_forgiven(
    previous: str | None, jti: str, after: timedelta, forgiven: bool
) -> None:
    session = replace(SESSION, previous_jti=hashed(previous) if previous else None)
    assert session.forgives(jti, NOW + after) is forgiven


def test_the_session_lifetime_and_the_retry_window() -> None:
    assert timedelta(days=30) == FAMILY_LIFETIME
    assert timedelta(seconds=10) == RETRY_WINDOW


def test_a_jti_is_stored_as_its_sha_256() -> None:
    assert hashed("a-jti") == hashlib.sha256(b"a-jti").digest()


PASSWORDS = Passwords(Keyring({"k1": bytes(32)}), 4)
STORED = PASSWORDS.hash("correct horse")
GOOD = Account(ACME, ADA, STORED)


@pytest.mark.parametrize(
    ("account", "password", "cause"),
    [
        (GOOD, "wrong", "wrong password"),
        (None, "correct horse", None),
        (Account(ACME, replace(ADA, is_active=False), STORED), "correct horse", "user disabled"),
        (Account(ACME, replace(ADA, is_active=False), STORED), "wrong", "wrong password"),
        (Account(replace(ACME, is_active=False), ADA, STORED), "correct horse", "tenant disabled"),
    ],
)
def test_authenticate_refuses_every_case_alike_and_always_checks_a_password(
    monkeypatch: pytest.MonkeyPatch, account: Account | None, password: str, cause: str | None
) -> None:
    checks: list[str | None] = []
    told: list[str] = []
    real = PASSWORDS.check
    monkeypatch.setattr(PASSWORDS, "check", lambda p, s: checks.append(s) or real(p, s))
    with pytest.raises(InvalidCredentials) as caught:
        authenticate(account, password, PASSWORDS, lambda _, cause: told.append(cause))
    assert caught.value.detail == InvalidCredentials().detail
    assert told == [cause for cause in [cause] if cause]
    assert checks == [account.password_hash if account else None]


def test_authenticate_accepts_the_right_password_and_reports_nothing() -> None:
    assert authenticate(GOOD, "correct horse", PASSWORDS, must_not_report) == GOOD


def test_a_wrong_password_is_reported_and_refused() -> None:
    told: list[str] = []
    require_password(ADA, "correct horse", STORED, PASSWORDS, must_not_report)
    with pytest.raises(WrongPassword):
        require_password(ADA, "wrong", STORED, PASSWORDS, lambda user, _: told.append(user.email))
    assert told == [ADA.email]


def must_not_report(user: User, cause: str) -> None:
    raise AssertionError(f"{user.email}: {cause}")
