"""Idempotency keys: a request that is sent again is not done again, but answered as it was the first time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID, uuid5

from billing.errors import IdempotencyInProgress, IdempotencyKeyReused
from billing.ids import new_id

# Longer than a request may take. One that is given more loses its claim to a repeat, and its change is rolled back.
LEASE = timedelta(seconds=40)
KEPT = timedelta(hours=24)
# Names what belongs to an address. A UUID of version 5, it can be no tenant's id.
ADDRESSES = UUID("9f0c6a52-3d0b-4d8a-9a55-7f1c1f0d6c11")


@dataclass(frozen=True)
class Request:
    """A request with a key: whose it is, what they call it, and what it asks for.

    The fingerprint is a digest of the operation and all that was sent; a password may be in it.
    """

    scope: UUID
    name: bytes
    fingerprint: str = field(repr=False)


@dataclass(frozen=True)
class Claim:
    """The right to answer a request, until its lease ends and somebody else takes it over."""

    scope: UUID
    name: bytes
    id: UUID
    at: datetime

    @property
    def is_strangers(self) -> bool:
        """Whether it belongs to an address, as nobody is known yet."""
        return self.scope.version == 5


@dataclass(frozen=True)
class StoredAnswer:
    """What was answered: sent again byte for byte."""

    status: int
    headers: Mapping[str, str]
    body: str = field(repr=False)


@dataclass(frozen=True)
class Found:
    """What stands under a name already: what was asked, and what was answered, if that is known yet."""

    fingerprint: str = field(repr=False)
    answer: StoredAnswer | None


def scope_of_address(address: str | None) -> UUID:
    """Whose the keys are of a caller of whom nothing is known but the address."""
    return uuid5(ADDRESSES, address or "")


def name_of(key: str, principal: UUID | None) -> bytes:
    """What a key is stored under: two users of a tenant may choose the same key, and get their own answers."""
    return hashlib.sha256(f"{principal}/{key}".encode()).digest()


def take(tx: Storage, request: Request, *, now: datetime) -> Claim | StoredAnswer:
    """The right to answer the request, or what was answered before.

    Raises `IdempotencyKeyReused` and `IdempotencyInProgress`. An answer is kept in the transaction of its change: so
    where a claim has run out without one, nothing was changed, and it may be taken over.
    """
    claim = Claim(request.scope, request.name, new_id(), now)
    if tx.idempotency.take(claim, request.fingerprint, until=now + LEASE):
        return claim
    found = tx.idempotency.find(request.name)
    if found is None:  # Whoever had it let go of it at this moment.
        raise IdempotencyInProgress
    if found.fingerprint != request.fingerprint:
        raise IdempotencyKeyReused
    if found.answer is None:
        raise IdempotencyInProgress
    return found.answer


def keep(tx: Storage, claim: Claim, answer: StoredAnswer) -> None:
    """Keep the answer, if the change is kept; raises `IdempotencyInProgress` if the claim is somebody else's now."""
    if not tx.idempotency.keep(claim, answer, until=claim.at + KEPT):
        raise IdempotencyInProgress


class IdempotencyShelf(Protocol):
    def take(self, claim: Claim, fingerprint: str, *, until: datetime) -> bool: ...

    def find(self, name: bytes) -> Found | None: ...

    def keep(self, claim: Claim, answer: StoredAnswer, *, until: datetime) -> bool: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction."""

    @property
    def idempotency(self) -> IdempotencyShelf: ...
