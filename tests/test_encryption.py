"""Encryption at rest: a sealed text opens only in its own place, with its own key, and unchanged."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.encryption import NONCE_BYTES, Unreadable, Vault
from billing.keyrings import Keyring

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
VAULT = Vault(Keyring({"old": OLD}))
PLACE = "webhook_secrets:acme:1"
SEALED = VAULT.seal("a secret", place=PLACE)


@UNHURRIED
@given(secret=st.text(), place=st.text())
def test_a_sealed_secret_opens_in_its_place(secret: str, place: str) -> None:
    assert VAULT.open(VAULT.seal(secret, place=place), place=place) == secret


def test_every_sealing_has_its_own_nonce() -> None:
    nonces = {VAULT.seal("a secret", place=PLACE).partition(":")[2][: 2 * NONCE_BYTES] for _ in range(1000)}
    assert len(nonces) == 1000


def test_the_sealed_text_does_not_contain_the_secret() -> None:
    assert "a secret" not in SEALED
    assert b"a secret".hex() not in SEALED
    assert SEALED.startswith("old:")


@pytest.mark.parametrize("place", ["", "webhook_secrets:acme:2", "webhook_secrets:globex:1", PLACE + " "])
def test_a_sealed_text_moved_elsewhere_is_unreadable(place: str) -> None:
    with pytest.raises(Unreadable):
        VAULT.open(SEALED, place=place)


def test_any_changed_character_makes_it_unreadable() -> None:
    for at in range(SEALED.index(":") + 1, len(SEALED)):
        changed = SEALED[:at] + ("0" if SEALED[at] != "0" else "1") + SEALED[at + 1 :]
        with pytest.raises(Unreadable):
            VAULT.open(changed, place=PLACE)


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "nonsense",
        "old",
        "old:",
        "old:zz",
        "old:0",
        "old:é",
        "old:" + "00" * 12,
        "old:" + "00" * 40,
        "new:00",
    ],
)
def test_a_text_that_was_never_sealed_is_unreadable(stored: str) -> None:
    with pytest.raises(Unreadable):
        VAULT.open(stored, place=PLACE)


@pytest.mark.parametrize("kept", [-1, -2, 30])
def test_a_truncated_sealed_text_is_unreadable(kept: int) -> None:
    with pytest.raises(Unreadable):
        VAULT.open(SEALED[:kept], place=PLACE)


def test_a_new_key_seals_and_the_old_one_still_opens() -> None:
    rotated = Vault(Keyring({"new": NEW, "old": OLD}))
    assert rotated.seal("x", place=PLACE).startswith("new:")
    assert rotated.open(SEALED, place=PLACE) == "a secret"


def test_a_sealed_text_is_unreadable_without_its_key() -> None:
    with pytest.raises(Unreadable, match="no encryption key old"):
        Vault(Keyring({"new": NEW})).open(SEALED, place=PLACE)
    with pytest.raises(Unreadable):
        Vault(Keyring({"old": NEW})).open(SEALED, place=PLACE)
