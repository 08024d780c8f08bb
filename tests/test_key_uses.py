"""When keys were last used: noted by requests in memory, and written for many keys at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, func, select, text

from billing import key_uses, tenants
from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.key_uses import KeyUses
from billing.keys import ApiKey, KeyDigests
from billing.settings import Settings
from billing.storage.store import Store
from billing.storage.tables import api_keys

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
TENANTS, KEYS = 5, 4


@pytest.fixture
def keys(store: Store, settings: Settings) -> list[ApiKey]:
    """Four keys of each of five tenants."""
    digests = KeyDigests(settings.key_peppers)

    def registered(number: int) -> list[ApiKey]:
        details = {"company_name": f"Acme {number}", "email": f"ada-{number}@acme.example"}
        with store.tenant(new_id()) as tx:
            made = tenants.register(tx, details, password_hash="-", digests=digests, now=NOW)
        return [new.key for new in made.keys]

    return [key for number in range(TENANTS) for key in registered(number)]


def noted(*keys: ApiKey, at: datetime = NOW) -> KeyUses:
    uses = KeyUses()
    for key in keys:
        uses.note(key, at)
    return uses


def last_uses(superuser: Engine) -> list[datetime | None]:
    with superuser.connect() as connection:
        return list(connection.scalars(select(api_keys.c.last_used_at).order_by(api_keys.c.id)))


def test_each_use_is_written(store: Store, superuser: Engine, keys: list[ApiKey]) -> None:
    used = keys[::3]
    noted(*used).flush(store)
    assert last_uses(superuser) == [
        NOW if key in used else None for key in sorted(keys, key=lambda key: key.id)
    ]


def test_one_transaction_writes_at_most_one_key_per_tenant(
    store: Store, superuser: Engine, keys: list[ApiKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_uses, "WRITTEN_AT_ONCE", TENANTS - 1)
    noted(*keys).flush(store)
    one_each = select(func.count(), func.count(api_keys.c.tenant_id.distinct())).group_by(
        text("api_keys.xmin::text")
    )
    with superuser.connect() as connection:
        written = [tuple(row) for row in connection.execute(one_each)]
    assert all(rows == of_tenants <= TENANTS - 1 for rows, of_tenants in written)
    assert len(written) < len(keys)
    assert None not in last_uses(superuser)


def test_a_use_within_five_minutes_of_a_stored_one_is_not_noted(
    store: Store, superuser: Engine, keys: list[ApiKey]
) -> None:
    kept = replace(keys[0], last_used_at=NOW)
    noted(kept, at=NOW + timedelta(minutes=5, seconds=-1)).flush(store)
    assert set(last_uses(superuser)) == {None}
    noted(kept, at=NOW + timedelta(minutes=5)).flush(store)
    assert NOW + timedelta(minutes=5) in last_uses(superuser)


def test_an_earlier_use_does_not_overwrite_a_later_one(
    store: Store, superuser: Engine, keys: list[ApiKey]
) -> None:
    noted(keys[0], at=NOW).flush(store)
    noted(keys[0], at=NOW - timedelta(hours=1)).flush(store)
    assert set(last_uses(superuser)) == {None, NOW}


def test_uses_that_cannot_be_written_are_dropped(store: Store, superuser: Engine, keys: list[ApiKey]) -> None:
    uses = noted(*keys)
    held = select(api_keys.c.id).where(api_keys.c.id == keys[0].id).with_for_update()
    with superuser.begin() as locker, pytest.raises(DatabaseUnavailable):
        locker.execute(held)
        uses.flush(store)
    written = last_uses(superuser)
    assert None in written
    uses.flush(store)
    assert last_uses(superuser) == written
