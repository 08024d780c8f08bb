"""Keyrings: named keys of one purpose, the first for new values, all of them for existing ones."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MINIMUM_BYTES = 32


class KeyringError(ValueError):
    """The text is not a keyring."""


@dataclass(frozen=True, repr=False)
class Keyring:
    """An ordered ring of `kid` → key bytes. Its representation shows the names alone."""

    keys: Mapping[str, bytes]

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read `kid:base64,kid:base64`; raises `KeyringError` with a sentence that repeats no key."""
        keys = dict(_entry(part.strip()) for part in text.split(","))
        if len(keys) != len(text.split(",")):
            raise KeyringError("two keys have the same name")
        return cls(keys)

    @property
    def first(self) -> tuple[str, bytes]:
        """The name and the bytes of the key for new values."""
        return next(iter(self.keys.items()))

    def get(self, kid: str) -> bytes | None:
        """The key of that name, or None."""
        return self.keys.get(kid)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return iter(self.keys.items())

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.keys)})"


def _entry(part: str) -> tuple[str, bytes]:
    kid, colon, encoded = part.partition(":")
    if not colon or not kid.isalnum() or len(kid) > 16:
        raise KeyringError("each key is written as kid:base64, the kid with up to 16 letters and digits")
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise KeyringError(f"the key {kid} is not base64") from None
    if len(key) < MINIMUM_BYTES:
        raise KeyringError(f"the key {kid} has fewer than {MINIMUM_BYTES} bytes")
    return kid, key


def new_keyring(kid: str | None = None) -> str:
    """The text of a ring with one new random key, whose name is random too: no two keys should ever share one."""
    return (
        f"{kid or f'k{secrets.token_hex(3)}'}:{base64.b64encode(secrets.token_bytes(MINIMUM_BYTES)).decode()}"
    )
