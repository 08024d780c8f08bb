"""Keyrings: parsed strictly, and never shown."""

from __future__ import annotations

import base64
import re

import pytest

from billing.keyrings import MINIMUM_BYTES, Keyring, KeyringError, new_keyring

FIRST, SECOND = bytes(range(32)), bytes(range(64, 112))


def written(kid: str, key: bytes) -> str:
    return f"{kid}:{base64.b64encode(key).decode()}"


TWO = f"{written('k2', SECOND)},{written('k1', FIRST)}"


def test_the_first_key_is_for_new_data_and_all_are_found() -> None:
    ring = Keyring.parse(TWO)
    assert ring.first == ("k2", SECOND)
    assert list(ring) == [("k2", SECOND), ("k1", FIRST)]
    assert (ring.get("k1"), ring.get("k2"), ring.get("k3")) == (FIRST, SECOND, None)


def test_spaces_around_a_key_do_not_matter() -> None:
    assert list(Keyring.parse(f" {TWO.replace(',', ' ,  ')}\n")) == list(Keyring.parse(TWO))


def test_a_key_may_be_longer_than_the_minimum_but_not_shorter() -> None:
    assert Keyring.parse(written("k1", bytes(MINIMUM_BYTES))).first == ("k1", bytes(MINIMUM_BYTES))
    with pytest.raises(KeyringError, match="k1 has fewer than 32 bytes"):
        Keyring.parse(written("k1", bytes(MINIMUM_BYTES - 1)))


SECRET = base64.b64encode(FIRST).decode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "kid:base64"),
        (SECRET, "kid:base64"),
        (f":{SECRET}", "kid:base64"),
        (f"k 1:{SECRET}", "kid:base64"),
        (f"k-1:{SECRET}", "kid:base64"),
        (f"k$1:{SECRET}", "kid:base64"),
        (f"{'k' * 17}:{SECRET}", "kid:base64"),
        (f"k1:{SECRET},", "kid:base64"),
        (f"k1:{SECRET},,k2:{SECRET}", "kid:base64"),
        (f"k1:{SECRET},k1:{SECRET}", "two keys have the same name"),
        ("k1:", "fewer than 32 bytes"),
        (f"k1:{SECRET[:-1]}", "not base64"),
        (f"k1:{SECRET}=", "not base64"),
        (f"k1:{SECRET[:8]} {SECRET[8:]}", "not base64"),
        (f"k1:{SECRET[:8]}-_{SECRET[10:]}", "not base64"),
        (f"k1:é{SECRET}", "not base64"),
        (f"k1:k2:{SECRET}", "not base64"),
        (f"k1:\udce9{SECRET}", "not base64"),
    ],
)
def test_an_invalid_keyring_is_refused_without_showing_the_key(text: str, reason: str) -> None:
    with pytest.raises(KeyringError, match=reason) as caught:
        Keyring.parse(text)
    assert SECRET[:8] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_representation_shows_only_names() -> None:
    assert repr(Keyring.parse(TWO)) == str(Keyring.parse(TWO)) == "Keyring(k2, k1)"


def test_a_new_ring_has_one_random_key() -> None:
    made = [Keyring.parse(new_keyring()) for _ in range(100)]
    assert {(len(ring.keys), len(ring.first[1])) for ring in made} == {(1, MINIMUM_BYTES)}
    assert len({key for ((_, key),) in made}) == 100


def test_new_keys_hardly_ever_share_a_name() -> None:
    assert len({Keyring.parse(new_keyring()).first[0] for _ in range(100)}) > 90


def test_a_new_key_of_a_given_name() -> None:
    assert re.fullmatch(r"k7:[A-Za-z0-9+/]{43}=", new_keyring("k7"))
