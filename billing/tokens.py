"""Access and refresh tokens: JSON Web Tokens (RFC 8725, RFC 9068) signed by our own keyring."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID

import jwt

from billing.errors import TokenExpired, TokenInvalid
from billing.ids import new_id
from billing.keyrings import Keyring

ALGORITHM = "HS256"
ACCESS, REFRESH = "at+jwt", "rt+jwt"
AUDIENCES = {ACCESS: "billing-api", REFRESH: "billing-refresh"}
ACCESS_LIFETIME = timedelta(minutes=15)
REFRESH_IDLE_LIFETIME = timedelta(days=7)
LONGEST = 4096
REMEMBERED = 1024
CLAIMS = ["iss", "aud", "sub", "tid", "sid", "ver", "jti", "iat", "exp"]
# The clock is an argument here, so PyJWT must not use its own.
OPTIONS: Any = {
    "require": CLAIMS,
    "strict_aud": True,
    "enforce_minimum_key_length": True,
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


@dataclass(frozen=True)
class TokenPair:
    """What a client holds: an access token for 15 minutes, a refresh token that is good once."""

    access: str = field(repr=False)
    refresh: str = field(repr=False)


@dataclass(frozen=True)
class Claims:
    """The claims of a valid token."""

    tenant_id: UUID
    user_id: UUID
    session_id: UUID
    token_version: int
    jti: str
    signed_by: str


@dataclass(frozen=True)
class Holder:
    """The user and session that tokens are issued to."""

    tenant_id: UUID
    user_id: UUID
    session_id: UUID
    token_version: int
    role: str


class Tokens:
    """Signs and reads tokens: HS256, the key found by `kid` in our own ring, `typ` and `aud` both checked."""

    def __init__(self, keys: Keyring, issuer: str) -> None:
        self._keys = keys
        self._issuer = issuer
        # A signature once verified stays valid. Expiry and session are checked each time.
        self._verified = lru_cache(maxsize=REMEMBERED)(self._verify)

    def access(self, holder: Holder, now: datetime) -> str:
        """An access token, good for 15 minutes."""
        claims = {"role": holder.role, "jti": str(new_id())}
        return self._sign(ACCESS, holder, claims, now, now + ACCESS_LIFETIME)

    def refresh(self, holder: Holder, jti: str, issued_at: datetime, family_ends_at: datetime) -> str:
        """The refresh token of that `jti`: the same arguments make the same token, byte for byte."""
        ends_at = min(issued_at + REFRESH_IDLE_LIFETIME, family_ends_at)
        return self._sign(REFRESH, holder, {"jti": jti}, issued_at, ends_at)

    def read_access(self, text: str, now: datetime) -> Claims:
        """The claims of an access token; raises `TokenInvalid` or `TokenExpired`."""
        return self._read(ACCESS, text, now)

    def read_refresh(self, text: str, now: datetime) -> Claims:
        """The claims of a refresh token; raises `TokenInvalid` or `TokenExpired`."""
        return self._read(REFRESH, text, now)

    def successor(self, claims: Claims) -> str:
        """The next `jti`: a keyed hash of this one, so that a retry finds it without its being stored.

        The key is the one that signed the token, so that the result survives a rotation of the ring.
        """
        key = self._keys.keys[claims.signed_by]
        return hmac.digest(key, b"refresh token successor\0" + claims.jti.encode(), hashlib.sha256).hex()

    def _sign(
        self, typ: str, holder: Holder, claims: dict[str, Any], issued_at: datetime, ends_at: datetime
    ) -> str:
        kid, key = self._keys.first
        payload = claims | {
            "iss": self._issuer,
            "aud": AUDIENCES[typ],
            "sub": str(holder.user_id),
            "tid": str(holder.tenant_id),
            "sid": str(holder.session_id),
            "ver": holder.token_version,
            "iat": int(issued_at.timestamp()),
            "exp": int(ends_at.timestamp()),
        }
        return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"typ": typ, "kid": kid})

    def _read(self, typ: str, text: str, now: datetime) -> Claims:
        if len(text) > LONGEST:
            raise TokenInvalid
        try:
            claims, ends_at = self._verified(typ, text)
        # For some malformed members PyJWT raises built-in errors; an OSError is a time out of range.
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
            raise TokenInvalid from None
        if now >= ends_at:
            raise TokenExpired
        return claims

    def _verify(self, typ: str, text: str) -> tuple[Claims, datetime]:
        header = jwt.get_unverified_header(text)
        key = self._keys.get(header["kid"])
        if header["typ"] != typ or key is None:
            raise TokenInvalid
        claims = jwt.decode(
            text, key, algorithms=[ALGORITHM], audience=AUDIENCES[typ], issuer=self._issuer, options=OPTIONS
        )
        parsed = Claims(
            tenant_id=UUID(claims["tid"]),
            user_id=UUID(claims["sub"]),
            session_id=UUID(claims["sid"]),
            token_version=int(claims["ver"]),
            jti=str(claims["jti"]),
            signed_by=header["kid"],
        )
        return parsed, datetime.fromtimestamp(claims["exp"], UTC)
