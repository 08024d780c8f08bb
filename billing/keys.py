"""API keys: their form, their life, and how they are replaced and revoked."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol, cast, get_args
from uuid import UUID

from billing.errors import KeyExpired, KeyMalformed, KeyRevoked
from billing.ids import new_id
from billing.keyrings import Keyring
from billing.ports import Audit, Directory, Events, Tasks

KeyType = Literal["live_public", "live_secret", "test_public", "test_secret"]
Mode = Literal["live", "test"]
Selection = Literal["live", "test", "all"]
Status = Literal["active", "expiring", "revoked", "expired"]

TYPES: tuple[KeyType, ...] = get_args(KeyType)
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_CHARACTERS, CHECKSUM_CHARACTERS = 32, 6
FORM = re.compile(r"(?P<kind>sk|pk)_(?P<mode>live|test)_[0-9A-Za-z]{38}")
# The task that announces a key's expiry, and how long before it: at most half of the grace period.
EXPIRING = "api_key.expiring"
TOLD_BEFORE = timedelta(hours=24)
PREFIXES = {"public": "pk", "secret": "sk"}
KINDS = {prefix: kind for kind, prefix in PREFIXES.items()}


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key: for a secret one neither the text nor anything it could be recovered from."""

    tenant_id: UUID
    id: UUID
    type: KeyType
    text: str | None
    last4: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    @property
    def mode(self) -> Mode:
        return cast("Mode", self.type.partition("_")[0])

    @property
    def is_publishable(self) -> bool:
        return self.type.endswith("_public")

    def status_at(self, now: datetime) -> Status:
        """`expiring` is a key in its grace period: it works, and its end is known."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is None:
            return "active"
        return "expiring" if now < self.expires_at else "expired"

    def require_works_at(self, now: datetime) -> None:
        """Raises `KeyRevoked` or `KeyExpired`."""
        match self.status_at(now):
            case "revoked":
                raise KeyRevoked
            case "expired":
                raise KeyExpired

    def ending(self, at: datetime) -> ApiKey:
        """The same key, with an end no later than `at`."""
        return replace(self, expires_at=min(at, self.expires_at or at))


@dataclass(frozen=True)
class NewKey:
    """A key just made, with the text that is shown now and never again."""

    key: ApiKey
    text: str = field(repr=False)


@dataclass(frozen=True)
class Renewal:
    """New keys, and the ones they replace."""

    new: Sequence[NewKey]
    previous: Sequence[ApiKey]


class KeyDigests:
    """Keyed digests by which keys are found: `pepper id:hex`.

    190 random bits need no slow hash, and a keyed digest can be looked up.
    """

    def __init__(self, peppers: Keyring) -> None:
        self._peppers = peppers

    def of(self, text: str) -> str:
        """The digest to store for a new key."""
        return _digest(*self._peppers.first, text)

    def candidates(self, text: str) -> list[str]:
        """The digests under which the key may be stored, one per pepper."""
        return [_digest(kid, pepper, text) for kid, pepper in self._peppers]


def _digest(kid: str, pepper: bytes, text: str) -> str:
    return f"{kid}:{hmac.digest(pepper, text.encode(), hashlib.sha256).hex()}"


def mint(key_type: KeyType) -> str:
    """A new key's text: prefix, 190 random bits, and a checksum that tells a mistyped key from an unknown."""
    mode, kind = key_type.split("_")
    start = f"{PREFIXES[kind]}_{mode}_" + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))
    return start + _checksum(start)


def parse(text: str) -> KeyType:
    """The type that a well-formed key names; raises `KeyMalformed`, without any query."""
    match = FORM.fullmatch(text)
    if match is None or _checksum(text[:-CHECKSUM_CHARACTERS]) != text[-CHECKSUM_CHARACTERS:]:
        raise KeyMalformed
    return cast("KeyType", f"{match['mode']}_{KINDS[match['kind']]}")


def looks_like_key(text: str) -> bool:
    """Whether a bearer token is meant as an API key: a JWT never begins so."""
    return text.startswith(("sk_", "pk_"))


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM_CHARACTERS):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def types_of(selection: Selection) -> tuple[KeyType, ...]:
    """The types that `live`, `test` or `all` means."""
    return tuple(t for t in TYPES if selection == "all" or t.startswith(selection))


def mint_each(
    tx: Storage, types: Iterable[KeyType] = TYPES, *, digests: KeyDigests, now: datetime
) -> list[NewKey]:
    """Make one key of each type, and store what may be kept of it."""
    minted = [_new_key(tx.tenant_id, key_type, now) for key_type in types]
    for new in minted:
        digest = digests.of(new.text)
        tx.api_keys.add(new.key, digest=digest)
        tx.directory.add("api_key", digest, new.key.id)
    return minted


def _new_key(tenant_id: UUID, key_type: KeyType, now: datetime) -> NewKey:
    text = mint(key_type)
    kept = text if key_type.endswith("_public") else None
    return NewKey(ApiKey(tenant_id, new_id(), key_type, kept, text[-4:], now), text)


def regenerate(
    tx: Storage, selection: Selection, *, grace: timedelta, digests: KeyDigests, now: datetime
) -> Renewal:
    """Replace the keys of the selection; the current ones work until `grace` is over, older ones end now.

    The caller holds the tenant's lock, and read the clock under it.
    """
    types = types_of(selection)
    replaced = [
        key.ending(now + grace if key.expires_at is None else now) for key in tx.api_keys.living(now, types)
    ]
    for key in replaced:
        tx.api_keys.expire(key)
    minted = mint_each(tx, types, digests=digests, now=now)
    tx.audit.record(
        "api_key.regenerated",
        subject=selection,
        now=now,
        details={
            "grace_seconds": int(grace.total_seconds()),
            "new": [{"type": new.key.type, "last4": new.key.last4} for new in minted],
            "previous": [{"type": key.type, "last4": key.last4} for key in replaced],
        },
    )
    data = {"key_type": selection, "previous": [ending_members(key) for key in replaced]}
    tx.events.record("api_key.regenerated", data, livemode=selection != "test", now=now)
    for key in replaced:
        _announce_end(tx, key, now)
    return Renewal(minted, replaced)


def ending_members(key: ApiKey) -> dict[str, object]:
    """What may be shown of a replaced key: nothing that grants access."""
    return {"type": key.type, "mode": key.mode, "last4": key.last4, "expires_at": key.expires_at}


def _announce_end(tx: Storage, key: ApiKey, now: datetime) -> None:
    if key.expires_at is not None and key.expires_at > now:
        due_at = key.expires_at - min(TOLD_BEFORE, (key.expires_at - now) / 2)
        tx.tasks.add(EXPIRING, key.id, subject=str(key.id), due_at=due_at, now=now)


def announce_expiry(tx: Storage, id: UUID, *, now: datetime) -> None:
    """Record the event that a key in its grace period expires soon, unless it has ended meanwhile."""
    for key in tx.api_keys.living(now, TYPES):
        if key.id == id:
            tx.events.record("api_key.expiring", ending_members(key), livemode=key.mode == "live", now=now)


def revoke(tx: Storage, selection: Selection, *, reason: str | None, now: datetime) -> list[KeyType]:
    """Revoke every working key of the selection, also in its grace period; returns the types revoked.

    Keys that expired a moment ago are revoked too, for another machine's clock may be behind; only the audit log says
    so. The caller holds the tenant's lock, and read the clock under it.
    """
    revoked = tx.api_keys.revoke(types_of(selection), now)
    worked = {key.type for key in revoked if key.expires_at is None or key.expires_at > now}
    tx.audit.record(
        "api_key.revoked",
        subject=selection,
        reason=reason,
        now=now,
        details={"revoked": [{"type": key.type, "last4": key.last4} for key in revoked]},
    )
    ended = [key_type for key_type in TYPES if key_type in worked]
    if ended:
        data = {"key_type": selection, "revoked_keys": ended, "reason": reason}
        tx.events.record("api_key.revoked", data, livemode=selection != "test", now=now)
    return ended


def to_show(keys: Sequence[ApiKey], now: datetime) -> list[ApiKey]:
    """Of each type the current key, then one in its grace period; of a type with none living, its last."""
    return [key for key_type in TYPES for key in _to_show(key_type, keys, now)]


def _to_show(key_type: KeyType, keys: Sequence[ApiKey], now: datetime) -> list[ApiKey]:
    of_type = [key for key in keys if key.type == key_type]
    # Not by age alone: ids made on two machines sort by two clocks.
    in_order = sorted(of_type, key=lambda key: (key.status_at(now) == "active", key.id), reverse=True)
    working = [key for key in in_order if key.status_at(now) in ("active", "expiring")]
    return working or in_order[:1]


class KeyShelf(Protocol):
    def add(self, key: ApiKey, *, digest: str) -> None: ...
    def living(self, now: datetime, types: Sequence[KeyType]) -> list[ApiKey]: ...
    def expire(self, key: ApiKey) -> None: ...
    def revoke(self, types: Sequence[KeyType], now: datetime) -> list[ApiKey]: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenant_id(self) -> UUID: ...
    @property
    def api_keys(self) -> KeyShelf: ...
    @property
    def directory(self) -> Directory: ...
    @property
    def events(self) -> Events: ...
    @property
    def tasks(self) -> Tasks: ...
    @property
    def audit(self) -> Audit: ...
