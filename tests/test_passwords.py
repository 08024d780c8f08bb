"""Passwords: bcrypt's limits worked around, peppers rotated, weak ones refused."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Literal

import bcrypt
import pytest
from zxcvbn.matching import L33T_TABLE, enumerate_l33t_subs, relevant_l33t_subtable

from billing import passwords
from billing.errors import PasswordTooWeak
from billing.keyrings import Keyring
from billing.passwords import Passwords, require_strength

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
COST = 4


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads switch within every call, and not only every five milliseconds."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def made(*kids: str, cost: int = COST) -> Passwords:
    return Passwords(Keyring({kid: {"old": OLD, "new": NEW}[kid] for kid in kids}), cost)


# Storing and checking ----------------------------------------------------------------------------


def test_only_the_right_password_matches_its_hash() -> None:
    stored = made("old").hash("correct horse")
    assert made("old").check("correct horse", stored)
    assert not made("old").check("correct horsf", stored)
    assert not made("old").check("", stored)


def test_a_stored_hash_names_its_scheme_pepper_and_cost() -> None:
    scheme, kid, hashed = made("old").hash("correct horse").split("$", 2)
    assert (scheme, kid, hashed[:7], len(hashed)) == ("bcrypt-hmac-sha384", "old", "$2b$04$", 60)


def test_the_same_password_is_hashed_differently_each_time() -> None:
    one = made("old")
    assert one.hash("correct horse") != one.hash("correct horse")


@pytest.mark.parametrize("length", [71, 72, 73, 128, 10_000])
@pytest.mark.parametrize("letter", ["a", "é", "😀"])
def test_every_character_counts_beyond_bcrypts_72_bytes(letter: str, length: int) -> None:
    stored = made("old").hash(letter * length)
    assert made("old").check(letter * length, stored)
    assert not made("old").check(letter * (length - 1), stored)
    assert not made("old").check(letter * (length - 1) + "b", stored)


def test_characters_after_a_nul_count() -> None:
    assert not made("old").check("before\0other", made("old").hash("before\0after"))


def test_composed_and_decomposed_forms_are_one_password() -> None:
    decomposed = unicodedata.normalize("NFD", "Pässwörter für Ådå")
    assert decomposed != "Pässwörter für Ådå"
    assert made("old").check(decomposed, made("old").hash("Pässwörter für Ådå"))


def test_compatibility_characters_make_a_different_password() -> None:
    stored = made("old").hash("fish and chips 12")
    assert not made("old").check("\N{LATIN SMALL LIGATURE FI}sh and chips 12", stored)
    assert not made("old").check("fish and chips \N{FULLWIDTH DIGIT ONE}2", stored)


# Peppers and cost --------------------------------------------------------------------------------


def test_a_hash_under_an_older_pepper_still_verifies() -> None:
    assert made("new", "old").check("correct horse", made("old").hash("correct horse"))


def test_a_hash_under_another_pepper_or_scheme_never_matches() -> None:
    stored = made("old").hash("correct horse")
    assert not made("new").check("correct horse", stored)
    assert not made("new").check("correct horse", stored.replace("$old$", "$new$"))
    assert not made("old").check("correct horse", stored.replace("bcrypt-hmac-sha384", "md5"))


@pytest.mark.parametrize(
    ("before", "present", "is_renewed"),
    [
        (made("old"), made("old"), False),
        (made("old"), made("old", "new"), False),
        (made("old"), made("new", "old"), True),
        (made("old"), made("old", cost=5), True),
        (made("old", cost=5), made("old"), True),
    ],
)
def test_a_hash_is_renewed_when_the_pepper_or_cost_differs(
    before: Passwords, present: Passwords, is_renewed: bool
) -> None:
    renewed = present.renewed("correct horse", before.hash("correct horse"))
    assert (renewed is not None) == is_renewed
    if renewed:
        assert present.check("correct horse", renewed)
        assert present.renewed("correct horse", renewed) is None


# Unknown users -----------------------------------------------------------------------------------


def test_an_unknown_user_costs_a_real_bcrypt_at_the_current_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bytes] = []
    real = bcrypt.checkpw

    def checkpw(password: bytes, hashed: bytes) -> bool:
        checked.append(hashed)
        return real(password, hashed)

    one = made("old", cost=5)
    monkeypatch.setattr(passwords.bcrypt, "checkpw", checkpw)
    assert not one.check("correct horse", None)
    assert [hashed[:7] for hashed in checked] == [b"$2b$05$"]


def test_an_unknown_user_takes_as_long_as_a_wrong_password() -> None:
    one = made("old", cost=8)
    stored = one.hash("correct horse")
    one.check("warm", stored)
    assert 0.4 < fastest(one, None) / fastest(one, stored) < 2.5


def fastest(one: Passwords, stored: str | None) -> float:
    def once() -> float:
        started = perf_counter()
        one.check("wrong", stored)
        return perf_counter() - started

    return min(once() for _ in range(7))


def test_no_password_matches_an_unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords.bcrypt, "checkpw", lambda *_: True)
    assert not made("old").check("correct horse", None)


def test_the_dummy_hash_is_made_without_running_bcrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(passwords.bcrypt, "hashpw")
    assert not made("old").check("correct horse", None)


# Strength ----------------------------------------------------------------------------------------

OWN_WORDS = ["ada@acme.example", "ada", "acme.example", "Acme Industries", "Lovelace", ""]
PASS = [
    "SecurePass123!",
    "SecurePassword123!",
    "NewSecurePassword456!",
    "correct horse battery",
    "xK9#mQ2$vL5n",
    "тихий океан велик",
    "é" * 4 + "q7Zw§xP4",
    "q7Zw" * 3 + "kP4x" * 29,
]
REFUSED = [
    "",
    "xK9#mQ2$vL5",
    "e\N{COMBINING ACUTE ACCENT}" * 11,
    "xK9#mQ2$vL5n" * 10 + "xK9#mQ2$v",
    "password1234",
    "passwordpassword",
    "aaaaaaaaaaaa",
    "123456789012",
    "qwertyuiop[]",
    "abcabcabcabc",
    "a" * 128,
    "P@ssw0rd1234",
    "password12345!",
    "monkeybanana12",
]


@pytest.mark.parametrize("password", PASS)
def test_a_good_password_passes(password: str) -> None:
    require_strength(password, OWN_WORDS)


@pytest.mark.parametrize("password", REFUSED)
def test_a_bad_password_is_refused(password: str) -> None:
    with pytest.raises(PasswordTooWeak) as caught:
        require_strength(password, [])
    assert not password or password not in caught.value.detail


@pytest.mark.parametrize(
    "password", ["ada@acme.example", "LovelaceAda1", "acme.example1", "Acme Industries", "lovelacelovelace"]
)
def test_a_password_of_the_accounts_own_words_is_refused(password: str) -> None:
    with pytest.raises(PasswordTooWeak):
        require_strength(password, OWN_WORDS)


def test_only_the_accounts_own_words_weaken_a_password() -> None:
    require_strength("Wolkenkratzerbau", [])
    with pytest.raises(PasswordTooWeak):
        require_strength("Wolkenkratzerbau", ["wolkenkratzerbau"])


@pytest.mark.parametrize("sent", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_own_words_are_recognised_in_any_normal_form(
    sent: Literal["NFC", "NFD"], stored: Literal["NFC", "NFD"]
) -> None:
    assert outcome(unicodedata.normalize(sent, "Wäschebär-Bäckerei"))
    with pytest.raises(PasswordTooWeak):
        require_strength(
            unicodedata.normalize(sent, "Wäschebär-Bäckerei"),
            [unicodedata.normalize(stored, "Wäschebär Bäckerei")],
        )


@pytest.mark.usefixtures("switching_often")
def test_concurrent_strength_checks_do_not_mix_own_words() -> None:
    def is_refused(words: list[str]) -> bool:
        try:
            require_strength("vexatrumbo123456", words)
        except PasswordTooWeak:
            return True
        return False

    with ThreadPoolExecutor(2) as threads:
        judged = list(threads.map(is_refused, [["Vexatrumbo"], ["Globex"]] * 200))
    assert judged == [True, False] * 200


@pytest.mark.parametrize(("length", "passes"), [(11, False), (12, True), (128, True), (129, False)])
def test_length_is_counted_in_composed_characters(length: int, passes: bool) -> None:
    varied = "xK9#mQ2$vL5nW8&bT1@cR6!dY3^fH7*gJ4(hZ0)pS"
    password = unicodedata.normalize("NFD", "é" + (varied * 4)[: length - 1])
    assert len(password) == length + 1
    assert outcome(password) == passes


def outcome(password: str, own_words: Sequence[str] = ()) -> bool:
    try:
        require_strength(password, own_words)
    except PasswordTooWeak:
        return False
    return True


@pytest.mark.parametrize(
    "password", ["Ada.Lovelace1", "ada-lovelace-2026", "acme.example1", "AcmeInc!AcmeInc!"]
)
def test_own_words_with_little_added_are_refused(password: str) -> None:
    words = ["ada@acme.example", "Acme Inc", "Ada", "Lovelace", "acme.example", "2026"]
    with pytest.raises(PasswordTooWeak):
        require_strength(password, words)


@pytest.mark.parametrize(
    ("password", "word", "passes"),
    [
        ("q7AdaZw§AdaxAda", "Ada", True),
        ("q7AdaZw§AdaAda", "Ada", False),
        # A word of two letters is part of many others.
        ("q7JoZwJo§JoJo", "Jo", True),
        # Of a word within another, the longer is removed first, and not its middle alone.
        ("q7LovelacezLovelacew", "Lovelace Love", False),
    ],
)
def test_six_characters_must_remain_without_own_words_of_three_or_more_letters(
    password: str, word: str, passes: bool
) -> None:
    assert outcome(password)
    assert outcome(password, [word, *word.split()]) == passes


def test_the_l33t_readings_of_a_password_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    # zxcvbn tries each reading: a password with all of its substitutes took 3.8 s.
    def readings(password: str) -> int:
        return len(enumerate_l33t_subs(relevant_l33t_subtable(password, L33T_TABLE)))

    every_substitute = "".join(sub for subs in L33T_TABLE.values() for sub in subs)
    assert readings(every_substitute) > 500
    scored: list[str] = []
    monkeypatch.setattr(passwords, "zxcvbn", lambda text, **_: scored.append(text) or {"score": 4})
    require_strength(every_substitute, [])
    assert [readings(text) < 50 for text in scored] == [True]


def test_checking_a_lower_cost_hash_takes_as_long_as_a_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = made("old", cost=5).hash("correct horse")
    present = made("old", cost=8)
    costs: list[int] = []
    hashpw = bcrypt.hashpw

    def counted(password: bytes, salt: bytes) -> bytes:
        costs.append(int(salt.split(b"$")[2]))
        return hashpw(password, salt)

    monkeypatch.setattr(bcrypt, "hashpw", counted)
    assert present.check("correct horse", stored)
    # bcrypt's work is 2 to the power of the cost; the check itself has cost 5.
    assert 2**5 + sum(2**cost for cost in costs) == 2**8
