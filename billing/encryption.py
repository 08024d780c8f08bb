"""Encryption at rest: AES-256-GCM with a keyring, for secrets that must be read again."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from billing.keyrings import Keyring

NONCE_BYTES = 12


class Unreadable(Exception):
    """What is stored was encrypted with a key we lack, for another place, or was changed."""


class Vault:
    """Seals and opens small secrets. `place` binds one to where it is stored: moved elsewhere, it won't open."""

    def __init__(self, keys: Keyring) -> None:
        self._keys = keys

    def seal(self, secret: str, *, place: str) -> str:
        """`kid:` and the hex of nonce and ciphertext."""
        kid, key = self._keys.first
        nonce = secrets.token_bytes(NONCE_BYTES)
        return f"{kid}:{(nonce + AESGCM(key[:32]).encrypt(nonce, secret.encode(), place.encode())).hex()}"

    def is_current(self, sealed: str) -> bool:
        """Whether it was sealed with the key that `seal` uses now."""
        return sealed.partition(":")[0] == self._keys.first[0]

    def open(self, sealed: str, *, place: str) -> str:
        """The secret again; raises `Unreadable`."""
        kid, _, text = sealed.partition(":")
        key = self._keys.get(kid)
        if key is None:
            raise Unreadable(f"no encryption key {kid}")
        try:
            data = bytes.fromhex(text)
            return AESGCM(key[:32]).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], place.encode()).decode()
        except (InvalidTag, ValueError):
            raise Unreadable("sealed with another key or for another place, or changed") from None
