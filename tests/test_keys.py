"""API keys: their form, their checksum, and their status at a moment."""

from __future__ import annotations

import binascii
import hashlib
import hmac
import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing import keys
from billing.errors import KeyExpired, KeyMalformed, KeyRevoked
from billing.http.document import load
from billing.ids import new_id
from billing.keyrings import Keyring
from billing.keys import ALPHABET, TYPES, ApiKey, KeyDigests, KeyType, NewKey, mint, parse, to_show, types_of

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
PUBLISHED = re.compile(r"^(sk|pk)_(live|test)_[0-9A-Za-z]{38}\Z")
PREFIXES = {
    "live_public": "pk_live_",
    "live_secret": "sk_live_",
    "test_public": "pk_test_",
    "test_secret": "sk_test_",
}


def is_malformed(text: str) -> bool:
    try:
        parse(text)
    except KeyMalformed:
        return True
    return False


def base62(number: int) -> str:
    digits = "0123456789" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"
    return "".join(digits[number // 62**place % 62] for place in (5, 4, 3, 2, 1, 0))


# Form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", TYPES)
def test_a_new_key_has_the_published_form_and_says_its_type(key_type: KeyType) -> None:
    for _ in range(100):
        text = mint(key_type)
        assert PUBLISHED.match(text)
        assert len(text) == 46
        assert text.startswith(PREFIXES[key_type])
        assert parse(text) == key_type


def test_a_key_has_190_random_bits() -> None:
    assert keys.RANDOM_CHARACTERS * math.log2(len(set(ALPHABET))) >= 190
    assert len({mint("live_secret") for _ in range(1000)}) == 1000


def test_every_random_character_is_drawn_from_the_whole_alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(keys.secrets, "choice", lambda letters: drawn.append(letters) or letters[-1])
    assert mint("test_secret")[8:40] == "z" * 32
    assert drawn == [ALPHABET] * 32


def test_the_checksum_is_the_crc_32_of_all_before_it() -> None:
    # The check value of CRC-32/ISO-HDLC, in the notation of the document.
    assert base62(binascii.crc32(b"123456789")) == base62(0xCBF43926) == keys._checksum("123456789")
    for key_type in TYPES:
        text = mint(key_type)
        assert text[40:] == base62(binascii.crc32(text[:40].encode()))


@pytest.mark.parametrize(
    ("crc", "written"), [(0, "000000"), (61, "00000z"), (62, "000010"), (2**32 - 1, "4gfFC3")]
)
def test_the_checksum_is_padded_and_big_endian(
    monkeypatch: pytest.MonkeyPatch, crc: int, written: str
) -> None:
    monkeypatch.setattr(keys.zlib, "crc32", lambda _: crc)
    assert keys._checksum("") == written


def test_any_changed_character_is_malformed() -> None:
    text = mint("live_secret")
    for at in range(len(text)):
        for letter in ALPHABET + "_-é":
            if letter != text[at]:
                assert is_malformed(text[:at] + letter + text[at + 1 :]), (at, letter)


def test_any_two_swapped_neighbours_are_malformed() -> None:
    for key_type in TYPES:
        for text in (mint(key_type) for _ in range(25)):
            for at in range(len(text) - 1):
                swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
                assert swapped == text or is_malformed(swapped), at


def test_a_missing_or_a_doubled_character_is_malformed() -> None:
    text = mint("test_public")
    for at in range(len(text)):
        assert is_malformed(text[:at] + text[at + 1 :])
        assert is_malformed(text[:at] + text[at] + text[at:])


def valid(start: str) -> str:
    return start + base62(binascii.crc32(start.encode()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk_live_",
        valid("rk_live_" + "0" * 32),
        valid("SK_live_" + "0" * 32),
        valid("sk_prod_" + "0" * 32),
        valid("sk-live-" + "0" * 32),
        valid("sk_live_" + "0" * 31),
        valid("sk_live_" + "0" * 33),
        valid("sk_live_" + "0" * 31 + "_"),
        valid("sk_live_" + "0" * 31 + "٣"),
        valid("sk_live_" + "0" * 32) + "\n",
        " " + valid("sk_live_" + "0" * 32),
        valid("sk_live_" + "0" * 32) + ",",
        "\udc80" * 46,
    ],
)
def test_other_forms_are_malformed_even_with_a_good_checksum(text: str) -> None:
    assert parse(valid("sk_live_" + "0" * 32)) == "live_secret"
    assert is_malformed(text)


@UNHURRIED
@given(text=st.text() | st.from_regex(keys.FORM, fullmatch=True))
def test_any_other_text_is_malformed(text: str) -> None:
    assert is_malformed(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sk_", True),
        ("pk_live_x", True),
        ("eyJhbGciOiJIUzI1NiJ9.e30.x", False),
        ("", False),
        ("SK_LIVE", False),
    ],
)
def test_a_key_is_recognised_by_its_prefix(text: str, expected: bool) -> None:
    assert keys.looks_like_key(text) is expected


def test_the_document_gives_the_form_of_a_key() -> None:
    assert "^(sk|pk)_(live|test)_[0-9A-Za-z]{38}$" in str(load())


# At a moment -------------------------------------------------------------------------------------


def key(key_type: KeyType = "live_secret", **more: Any) -> ApiKey:
    return ApiKey(new_id(), new_id(), key_type, None, "abcd", NOW - HOUR, **more)


@pytest.mark.parametrize(
    ("expires", "revoked", "status"),
    [
        (None, None, "active"),
        (NOW + HOUR, None, "expiring"),
        (NOW + timedelta(microseconds=1), None, "expiring"),
        (NOW, None, "expired"),
        (NOW - HOUR, None, "expired"),
        (None, NOW, "revoked"),
        (NOW + HOUR, NOW, "revoked"),
        (NOW - HOUR, NOW - 2 * HOUR, "revoked"),
    ],
)
def test_the_status_of_a_key_decides_whether_it_works(
    expires: datetime | None, revoked: datetime | None, status: str
) -> None:
    one = key(expires_at=expires, revoked_at=revoked)
    assert one.status_at(NOW) == status
    refusal = {"revoked": KeyRevoked, "expired": KeyExpired}.get(status)
    if refusal is None:
        one.require_works_at(NOW)
    else:
        with pytest.raises(refusal):
            one.require_works_at(NOW)


@pytest.mark.parametrize(
    ("expires", "ending", "expected"),
    [(None, NOW, NOW), (NOW + HOUR, NOW, NOW), (NOW, NOW + HOUR, NOW), (NOW, NOW, NOW)],
)
def test_an_expiry_is_never_postponed(expires: datetime | None, ending: datetime, expected: datetime) -> None:
    one = key(expires_at=expires)
    assert one.ending(ending).expires_at == expected
    assert one.expires_at == expires


@pytest.mark.parametrize(
    ("key_type", "mode", "publishable"),
    [
        ("live_public", "live", True),
        ("live_secret", "live", False),
        ("test_public", "test", True),
        ("test_secret", "test", False),
    ],
)
def test_mode_and_publishability_follow_from_the_type(
    key_type: KeyType, mode: str, publishable: bool
) -> None:
    assert (key(key_type).mode, key(key_type).is_publishable) == (mode, publishable)


@pytest.mark.parametrize(
    ("selection", "types"),
    [("all", TYPES), ("live", ("live_public", "live_secret")), ("test", ("test_public", "test_secret"))],
)
def test_a_selection_names_its_key_types(selection: Any, types: tuple[str, ...]) -> None:
    assert types_of(selection) == types


# To show -----------------------------------------------------------------------------------------

EXPIRING, EXPIRED, REVOKED = (
    {"expires_at": NOW + HOUR},
    {"expires_at": NOW - HOUR},
    {"revoked_at": NOW - HOUR},
)


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ([], []),
        ([{}], [0]),
        ([EXPIRING, {}], [1, 0]),
        ([{}, EXPIRING], [0, 1]),
        ([EXPIRED, EXPIRING, {}], [2, 1]),
        ([EXPIRED, REVOKED, {}], [2]),
        ([EXPIRED], [0]),
        ([EXPIRED, REVOKED], [1]),
        ([REVOKED, EXPIRED], [1]),
        ([EXPIRING, REVOKED], [0]),
    ],
)
def test_active_keys_of_a_type_are_shown_or_else_the_last(
    kept: list[dict[str, Any]], shown: list[int]
) -> None:
    made = [key(**more) for more in kept]  # The oldest first.
    assert to_show(made, NOW) == to_show(made[::-1], NOW) == [made[at] for at in shown]


def test_each_type_is_shown_separately_in_order() -> None:
    made = [key(key_type, **more) for key_type in reversed(TYPES) for more in (EXPIRED, {})]
    assert [one.type for one in to_show(made, NOW)] == list(TYPES)


# Digests -----------------------------------------------------------------------------------------

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def test_a_digest_is_keyed_and_names_its_pepper() -> None:
    text = mint("live_secret")
    expected = hmac.new(OLD, text.encode(), hashlib.sha256).hexdigest()
    assert KeyDigests(Keyring({"old": OLD})).of(text) == f"old:{expected}"


def test_a_key_is_looked_up_under_every_pepper_and_stored_under_the_first() -> None:
    text = mint("live_secret")
    before, after = KeyDigests(Keyring({"old": OLD})), KeyDigests(Keyring({"new": NEW, "old": OLD}))
    assert after.candidates(text) == [after.of(text), before.of(text)]
    assert after.of(text).startswith("new:")
    assert before.candidates(text) == [before.of(text)]


def test_a_new_keys_text_is_not_in_its_representation() -> None:
    text = mint("live_secret")
    assert text not in repr(NewKey(key(), text))
