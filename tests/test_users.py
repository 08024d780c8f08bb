"""Users: emails in the form in which they are compared, and the owner that a tenant keeps."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.errors import Conflict, NotFound
from billing.ids import new_id
from billing.users import User, get, new_user, normalise_email, require_another_owner

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
ACME = new_id()
ADA = new_user(ACME, {"email": "Ada@Acme.example", "first_name": "Ada"}, role="owner", now=NOW)

# Emails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("email", "kept"),
    [
        ("ada@acme.example", "ada@acme.example"),
        ("ADA@Acme.Example", "ada@acme.example"),
        ("  ada@acme.example\n", "ada@acme.example"),
        ("ÅDA@acme.example", "åda@acme.example"),
        ("A\N{COMBINING RING ABOVE}da@acme.example", "åda@acme.example"),
        ("\N{ANGSTROM SIGN}da@acme.example", "åda@acme.example"),
        ("J\N{COMBINING CARON}@acme.example", "\N{LATIN SMALL LETTER J WITH CARON}@acme.example"),
        ("a.d.a+tag@acme.example", "a.d.a+tag@acme.example"),
    ],
)
def test_an_email_is_kept_composed_and_without_capitals(email: str, kept: str) -> None:
    assert normalise_email(email) == kept


@UNHURRIED
@given(email=st.text() | st.text(alphabet="aAjJ\u030c\u0301\u0307ǰİıſKÅΣς @."))
def test_an_email_in_its_form_stays_as_it_is(email: str) -> None:
    assert normalise_email(normalise_email(email)) == normalise_email(email)


def test_a_new_user_is_active_and_has_never_logged_in() -> None:
    assert (ADA.tenant_id, ADA.email, ADA.first_name, ADA.last_name) == (
        ACME,
        "ada@acme.example",
        "Ada",
        "",
    )
    assert (ADA.is_active, ADA.token_version, ADA.last_login, ADA.created_at) == (True, 1, None, NOW)


class Members:
    def __init__(self, *users: User) -> None:
        self._users = users

    def all(self) -> list[User]:
        return list(self._users)

    def find_by_email(self, email: str) -> User | None:
        return next((user for user in self._users if user.email == email), None)


def with_members(*users: User) -> Any:
    """A transaction, as far as these rules look at it."""
    return SimpleNamespace(users=Members(*users))


def test_a_user_is_found_in_whatever_capitals() -> None:
    assert get(with_members(ADA), "ADA@acme.example") == ADA
    with pytest.raises(NotFound):
        get(with_members(ADA), "eve@acme.example")


BOB = replace(ADA, id=new_id(), email="bob@acme.example")


@pytest.mark.parametrize(
    ("user", "others", "allowed"),
    [
        (ADA, [], False),
        (ADA, [BOB], True),
        (ADA, [replace(BOB, is_active=False)], False),
        (ADA, [replace(BOB, role="admin")], False),
        (replace(ADA, role="admin"), [], True),
        (replace(ADA, is_active=False), [], True),
    ],
)
def test_a_tenant_keeps_an_active_owner(user: User, others: list[User], allowed: bool) -> None:
    if allowed:
        require_another_owner(with_members(user, *others), user)
    else:
        with pytest.raises(Conflict):
            require_another_owner(with_members(user, *others), user)
