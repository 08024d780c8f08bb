"""Keys are rotated while two servers run, one before a step and one after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from app import create_app
from billing.cli import main
from billing.encryption import Vault
from billing.housekeeping import Housekeeping
from billing.keyrings import Keyring, new_keyring
from billing.keys import TYPES
from billing.settings import Settings
from billing.storage.store import Store
from billing.tenants import HOUSEKEEPING, TIDIED_EVERY
from billing.tokens import REFRESH_IDLE_LIFETIME
from tests.clock import TurnedClock
from tests.conftest import API, PASSWORD, STATE, CheckedClient, TestDatabase, bearer, log_in, register

OLD, NEW = new_keyring("old"), new_keyring("new")
# The setting's value, step by step.
STEPS = (OLD, f"{OLD},{NEW}", f"{NEW},{OLD}")
RINGS = ("jwt_keys", "encryption_keys", "key_peppers", "password_peppers")


def given(settings: Settings, ring: str, text: str) -> Settings:
    return replace(settings, **{ring: Keyring.parse(text)})  # type: ignore[arg-type]


@contextmanager
def serving(clock: TurnedClock, *settings: Settings) -> Iterator[list[TestClient]]:
    with ExitStack() as stack:
        apps = [create_app(each, clock=clock) for each in settings]
        yield [stack.enter_context(CheckedClient(app, raise_server_exceptions=False)) for app in apps]


def assert_accepted(made: dict[str, Any], email: str, server: TestClient) -> None:
    """The other server accepts the credentials that one server issued."""
    assert server.get(f"{API}/me/", headers=bearer(made["tokens"]["access"])).status_code == 200
    assert server.get(f"{API}/verify/", headers=bearer(made["tenant"]["api_key_secret"])).status_code == 200
    refreshed = server.post(f"{API}/token/refresh/", json={"refresh": made["tokens"]["refresh"]})
    assert refreshed.status_code == 200
    assert log_in(server, email).status_code == 200


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("step", [0, 1])
def test_servers_before_and_after_a_step_accept_each_others_credentials(
    settings: Settings, clock: TurnedClock, store: Store, ring: str, step: int
) -> None:
    before, after = (given(settings, ring, text) for text in STEPS[step : step + 2])
    with serving(clock, before, after) as servers:
        for number, (here, there) in enumerate([servers, servers[::-1]]):
            name = f"Tenant{number}"
            made = register(here, name, webhook_url="https://hooks.acme.example/").json()
            assert_accepted(made, f"ada@tenant{number}.example", there)
            shown = there.get(f"{API}/webhooks/config/", headers=bearer(made["tokens"]["access"])).json()
            assert shown["webhook_secret"][-4:] == made["tenant"]["webhook_secret"][-4:]


# Only the worker opens sealed secrets.
@pytest.mark.parametrize("ring", [ring for ring in RINGS if ring != "encryption_keys"])
def test_without_the_first_step_an_old_server_rejects_a_new_ones_credentials(
    settings: Settings, clock: TurnedClock, store: Store, ring: str
) -> None:
    with serving(clock, given(settings, ring, STEPS[0]), given(settings, ring, STEPS[2])) as (old, new):
        made = register(new).json()
        with pytest.raises(AssertionError):
            assert_accepted(made, "ada@acme.example", old)


def test_the_old_signing_key_can_go_once_its_last_refresh_token_expired(
    settings: Settings, clock: TurnedClock, store: Store
) -> None:
    with serving(clock, given(settings, "jwt_keys", OLD), given(settings, "jwt_keys", STEPS[2])) as (
        old,
        new,
    ):
        tokens = register(old).json()["tokens"]
        clock.turn(seconds=(REFRESH_IDLE_LIFETIME - timedelta(seconds=1)).total_seconds())
        renewed = new.post(f"{API}/token/refresh/", json={"refresh": tokens["refresh"]}).json()
    clock.turn(seconds=1)
    with serving(clock, given(settings, "jwt_keys", NEW)) as (without,):
        assert without.get(f"{API}/me/", headers=bearer(renewed["access"])).status_code == 200
        again = without.post(f"{API}/token/refresh/", json={"refresh": renewed["refresh"]})
        assert again.status_code == 200


def status_of(ring: str, text: str, database: TestDatabase) -> dict[str, tuple[int, str]]:
    """What `billing secrets status` reports of a ring: for each key, how many need it, and what it is."""
    environ = {
        "BILLING_STATE_DIR": str(STATE),
        "DATABASE_URL": database.app_url,
        "MIGRATION_DATABASE_URL": database.owner_url,
        ring: text,
    }
    said = CliRunner().invoke(main, ["secrets", "status", "--json"], env=environ)
    assert said.exit_code == 0, said.output
    rows = [row for row in json.loads(said.stdout) if row["ring"] == ring]
    return {row["key"]: (row["needed_by"], row["is"]) for row in rows}


def test_a_login_rehashes_the_password_with_the_new_pepper(
    settings: Settings, clock: TurnedClock, store: Store, test_database: TestDatabase
) -> None:
    ring = "PASSWORD_PEPPERS"
    with serving(clock, given(settings, ring.lower(), OLD)) as (old,):
        register(old)
        register(old, "Globex")
    with serving(clock, given(settings, ring.lower(), STEPS[2])) as (new,):
        assert log_in(new, "ada@acme.example").status_code == 200
    assert status_of(ring, STEPS[2], test_database) == {"new": (1, "first"), "old": (1, "kept")}
    assert status_of(ring, NEW, test_database) == {"new": (1, "first"), "old": (1, "MISSING")}
    with serving(clock, given(settings, ring.lower(), NEW)) as (without,):
        assert log_in(without, "ada@acme.example", PASSWORD).status_code == 200
        # A user who has not logged in since needs `billing users reset-password`.
        assert log_in(without, "ada@globex.example", PASSWORD).status_code == 401


def test_an_api_key_needs_its_pepper_as_long_as_it_lives(
    settings: Settings, clock: TurnedClock, store: Store, test_database: TestDatabase
) -> None:
    ring = "KEY_PEPPERS"
    with serving(clock, given(settings, ring.lower(), OLD)) as (old,):
        made = register(old).json()
    assert status_of(ring, STEPS[2], test_database) == {"new": (0, "first"), "old": (4, "kept")}
    body = {"key_type": "all", "confirm": True}
    with serving(clock, given(settings, ring.lower(), STEPS[2])) as (new,):
        for act in ("revoke", "regenerate"):
            headers = bearer(made["tokens"]["access"])
            assert new.post(f"{API}/api-keys/{act}/", json=body, headers=headers).status_code == 200
    assert status_of(ring, STEPS[2], test_database) == {"new": (4, "first"), "old": (0, "kept")}


def test_keys_and_secrets_count_as_long_as_they_work(
    settings: Settings, clock: TurnedClock, store: Store
) -> None:
    with serving(clock, settings) as (server,):
        made = register(server).json()
    now, end = clock(), clock() + timedelta(minutes=1)
    with store.tenant(made["tenant"]["id"]) as tx:
        tx.api_keys.expire(replace(tx.api_keys.living(now, TYPES)[0], expires_at=end))
        tx.webhooks.retire_secrets(now, expires_at=end)
        tx.webhooks.add_secret("another", now)
        for at, keys, secrets in ((end - timedelta(microseconds=1), 4, 2), (end, 3, 1)):
            counted = {ring: rows for ring, _, rows in tx.keyring_uses.counts(at)}
            assert counted == {"PASSWORD_PEPPERS": 1, "KEY_PEPPERS": keys, "ENCRYPTION_KEYS": secrets}
            assert len(tx.api_keys.living(at, TYPES)) == keys
            assert len(tx.webhooks.secrets(at)) == secrets


def test_housekeeping_reseals_secrets_within_a_day(
    settings: Settings, clock: TurnedClock, store: Store, test_database: TestDatabase
) -> None:
    ring = "ENCRYPTION_KEYS"
    with serving(clock, given(settings, ring.lower(), OLD)) as (old,):
        made = register(old).json()
    assert status_of(ring, STEPS[2], test_database) == {"new": (0, "first"), "old": (1, "kept")}
    clock.turn(seconds=TIDIED_EVERY.total_seconds())
    worker = Store(Vault(Keyring.parse(STEPS[2])), connections=1)
    worker.open(test_database.app_url)
    for task in worker.take_due("general", clock(), most=100):
        if task.kind == HOUSEKEEPING:
            Housekeeping(worker, clock).tidy(task)
    worker.close()
    assert status_of(ring, STEPS[2], test_database) == {"new": (1, "first"), "old": (0, "kept")}
    without = Store(Vault(Keyring.parse(NEW)), connections=1)
    without.open(test_database.app_url)
    with without.tenant(made["tenant"]["id"]) as tx:
        assert tx.webhooks.signing_secrets(clock()) == [made["tenant"]["webhook_secret"]]
    without.close()
