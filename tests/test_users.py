"""Users: how emails are normalised, and that a tenant keeps an active owner."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from billing import tenants, users
from billing.errors import Conflict, NotFound
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.store import Store, TenantTx
from billing.tenants import Tenant
from billing.users import User, get, new_user, normalise_email, require_another_owner
from tests.conftest import waits_for_a_lock

# A slow example on a busy machine is not a failure.
UNHURRIED = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

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
def test_an_email_is_trimmed_composed_and_lowercased(email: str, kept: str) -> None:
    assert normalise_email(email) == kept


@UNHURRIED
@given(email=st.text() | st.text(alphabet="aAjJ\u030c\u0301\u0307ǰİıſKÅΣς @."))
def test_normalising_an_email_twice_changes_nothing_more(email: str) -> None:
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
    """A stand-in for a transaction, with what these rules use of it."""
    return SimpleNamespace(users=Members(*users))


def test_a_user_is_found_case_insensitively() -> None:
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


# In the database ---------------------------------------------------------------------------------


@pytest.fixture
def acme(store: Store, settings: Settings) -> Tenant:
    """A tenant with two owners, Ada and Bob."""
    digests = KeyDigests(settings.key_peppers)
    with store.tenant(new_id()) as tx:
        details = {"company_name": "Acme", "email": ADA.email}
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)
    with store.tenant(made.tenant.id) as tx:
        bob = new_user(made.tenant.id, {"email": BOB.email}, role="owner", now=NOW)
        users.add(tx, bob, password_hash="-", now=NOW)
    return made.tenant


def rows_of(superuser: Engine, query: str) -> list[Any]:
    with superuser.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


LATER = NOW + timedelta(days=1)
REMOVALS: dict[str, Callable[[TenantTx, str], None]] = {
    "disable": lambda tx, email: users.disable(tx, email, now=LATER),
    "set_role": lambda tx, email: users.set_role(tx, email, "admin", now=LATER),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_two_owners_cannot_disable_or_demote_each_other_at_once(
    store: Store, superuser: Engine, acme: Tenant, removal: str
) -> None:
    def remove_bob() -> None:
        with store.tenant(acme.id, exclusive=True) as tx:
            REMOVALS[removal](tx, BOB.email)

    with ThreadPoolExecutor(1) as pool:
        with store.tenant(acme.id, exclusive=True) as tx:
            REMOVALS[removal](tx, ADA.email)
            other = pool.submit(remove_bob)
            while not waits_for_a_lock(superuser):
                assert not other.done()
                time.sleep(0.01)
        with pytest.raises(Conflict):
            other.result()
    owners = "SELECT email FROM users WHERE role = 'owner' AND is_active"
    assert rows_of(superuser, owners) == [(BOB.email,)]


def test_each_change_is_audited_once_and_a_repeat_not_at_all(
    store: Store, superuser: Engine, acme: Tenant
) -> None:
    changes: list[Callable[[TenantTx], None]] = [
        lambda tx: users.set_role(tx, BOB.email, "admin", now=NOW),
        lambda tx: users.disable(tx, BOB.email, now=NOW),
        lambda tx: users.enable(tx, BOB.email, now=NOW),
        lambda tx: users.set_role(tx, ADA.email, "owner", now=NOW),
        lambda tx: tenants.set_tier(tx, "pro", now=NOW),
        lambda tx: tenants.set_active(tx, is_active=False, now=NOW),
        lambda tx: tenants.set_active(tx, is_active=True, now=NOW),
    ]
    for change in changes:
        for _ in range(2):
            with store.tenant(acme.id) as tx:
                change(tx)
    rows = "SELECT action, subject, details FROM audit_log WHERE sequence > 2 ORDER BY sequence"
    assert rows_of(superuser, rows) == [
        ("user.added", BOB.email, {"role": "owner"}),
        ("user.role_changed", BOB.email, {"from": "owner", "to": "admin"}),
        ("user.disabled", BOB.email, {}),
        ("user.enabled", BOB.email, {}),
        ("tenant.tier_changed", "acme", {"from": "free", "to": "pro"}),
        ("tenant.disabled", "acme", {}),
        ("tenant.enabled", "acme", {}),
    ]


CHANGES: dict[str, tuple[str, Callable[[TenantTx, User], object]]] = {
    "role": ("users", lambda tx, user: users.set_role(tx, user.email, "admin", now=LATER)),
    "disabled": ("users", lambda tx, user: users.disable(tx, user.email, now=LATER)),
    "enabled": ("users", lambda tx, user: tx.users.enable(user.id, LATER)),
    "password": ("users", lambda tx, user: tx.users.change_password(user, "new", LATER)),
    "reset": ("users", lambda tx, user: users.reset_password(tx, user, "new", now=LATER)),
    "tier": ("tenants", lambda tx, _: tenants.set_tier(tx, "pro", now=LATER)),
    "active": ("tenants", lambda tx, _: tenants.set_active(tx, is_active=False, now=LATER)),
    "stripe": ("tenants", lambda tx, _: tx.tenants.set_stripe("acct_1Acme", "active", LATER)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_sets_updated_at(store: Store, superuser: Engine, acme: Tenant, change: str) -> None:
    table, act = CHANGES[change]
    with store.tenant(acme.id) as tx:
        act(tx, get(tx, BOB.email))
    changed = "SELECT count(*) FROM {} WHERE updated_at = timestamptz '2026-01-16 09:30Z'"
    assert rows_of(superuser, changed.format(table)) == [(1,)]


REVOCATIONS = {name: CHANGES[name][1] for name in ("disabled", "password", "reset")}


@pytest.mark.parametrize("revocation", REVOCATIONS)
def test_disabling_a_user_or_changing_a_password_raises_the_token_version(
    store: Store, superuser: Engine, acme: Tenant, revocation: str
) -> None:
    # Their sessions end too: either alone would suffice.
    with store.tenant(acme.id) as tx:
        REVOCATIONS[revocation](tx, get(tx, BOB.email))
        tx.users.enable(get(tx, BOB.email).id, LATER)
    versions = "SELECT email, token_version FROM users ORDER BY email"
    assert rows_of(superuser, versions) == [(ADA.email, 1), (BOB.email, 2)]
