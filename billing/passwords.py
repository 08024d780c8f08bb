"""Passwords: hashed with a pepper and bcrypt, refused when easy to guess."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import threading
import unicodedata
from collections.abc import Iterable

import bcrypt
from zxcvbn import zxcvbn

from billing import tracing
from billing.errors import PasswordTooWeak
from billing.keyrings import Keyring

SCHEME = "bcrypt-hmac-sha384"
# In place of the 31 characters of digest that bcrypt puts after the salt.
NO_DIGEST = "." * 31
SHORTEST, LONGEST = 12, 128
LEAST_SCORE = 3
# zxcvbn refuses more than 72 characters; those after them make no password easier to guess.
SCORED_CHARACTERS = 72
# zxcvbn tries every combination of characters that may substitute a letter: a password with all of them takes
# it seconds. The digits and @ $ ! are left to it; each of the others becomes a symbol that it ignores.
RARE_SUBSTITUTES = str.maketrans("({[<|+%", ")}]>;=&")
OWN_WORD = re.compile(r"\w{3,}")
# How many characters of a password must be left without the words of its account.
LEAST_OF_ITS_OWN = 6
# zxcvbn keeps the words of the account in a global of its own while it scores a password.
ONE_AT_A_TIME = threading.Lock()


class Passwords:
    """Makes and checks what is stored of a password: `scheme$pepper id$bcrypt`.

    bcrypt reads 72 bytes, so it is given base64(HMAC-SHA384(pepper, NFC(password))): 64 bytes, no NUL.
    A check costs a quarter of a second at cost 12; callers run it off the event loop.
    """

    def __init__(self, peppers: Keyring, cost: int) -> None:
        self._peppers = peppers
        self._cost = cost
        # Checking against it takes as long as against a real hash; making a real one would slow every start.
        self._dummy = (peppers.first[1], bcrypt.gensalt(cost).decode() + NO_DIGEST)

    def hash(self, password: str) -> str:
        """What to store for a new password."""
        kid, pepper = self._peppers.first
        with tracing.span("password hash"):
            hashed = bcrypt.hashpw(_prehash(pepper, password), bcrypt.gensalt(self._cost))
        return f"{SCHEME}${kid}${hashed.decode()}"

    def check(self, password: str, stored: str | None) -> bool:
        """Whether the password is the stored one.

        None (no such user), and a hash made with a pepper that we lack, take the same time and return False.
        """
        known = self._parts(stored) if stored else None
        pepper, hashed = known or self._dummy
        prehashed = _prehash(pepper, password)
        self._make_up_for(hashed, prehashed)
        with tracing.span("password check"):
            return bcrypt.checkpw(prehashed, hashed.encode()) and known is not None

    def _parts(self, stored: str) -> tuple[bytes, str] | None:
        scheme, kid, hashed = stored.split("$", 2)
        pepper = self._peppers.get(kid)
        return (pepper, hashed) if pepper is not None and scheme == SCHEME else None

    def _make_up_for(self, hashed: str, prehashed: bytes) -> None:
        # Otherwise an account hashed at a lower cost would be answered sooner than an unknown one. The costs
        # from the stored one to just below the present one add up to the difference.
        for cost in range(cost_of(hashed), self._cost):
            bcrypt.hashpw(prehashed, bcrypt.gensalt(cost))

    def renewed(self, password: str, stored: str) -> str | None:
        """A new hash to store, if scheme, pepper or cost of the stored one is not the present one."""
        scheme, kid, hashed = stored.split("$", 2)
        present = (SCHEME, self._peppers.first[0], self._cost)
        return None if (scheme, kid, cost_of(hashed)) == present else self.hash(password)


def cost_of(hashed: str) -> int:
    """The cost in bcrypt's text, `$2b$12$…`."""
    return int(hashed.split("$")[2])


def require_strength(password: str, own_words: Iterable[str]) -> None:
    """Refuse what is too short or long once composed, common, or made of the account's own words."""
    composed = unicodedata.normalize("NFC", password)
    if not SHORTEST <= len(composed) <= LONGEST:
        raise PasswordTooWeak(f"The password must have {SHORTEST} to {LONGEST} characters.")
    own = [unicodedata.normalize("NFC", text).lower() for text in own_words]
    words = {word for text in own for word in (text, *OWN_WORD.findall(text))}
    if len(_without(composed.lower(), words)) < LEAST_OF_ITS_OWN or _score(composed, words) < LEAST_SCORE:
        raise PasswordTooWeak


def _without(password: str, words: Iterable[str]) -> str:
    for word in sorted(words, key=len, reverse=True):
        password = password.replace(word, "") if OWN_WORD.search(word) else password
    return password


def _score(password: str, words: Iterable[str]) -> int:
    scored = password[:SCORED_CHARACTERS].translate(RARE_SUBSTITUTES)
    with ONE_AT_A_TIME:
        return int(zxcvbn(scored, user_inputs=list(words))["score"])


def _prehash(pepper: bytes, password: str) -> bytes:
    digest = hmac.digest(pepper, unicodedata.normalize("NFC", password).encode(), hashlib.sha384)
    return base64.b64encode(digest)
