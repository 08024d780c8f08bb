"""Idempotency keys: a repeated request is not executed again, but answered as it was the first time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID, uuid5

from billing.errors import IdempotencyInProgress, IdempotencyKeyReused
from billing.ids import new_id

# Longer than a request may take by default. One that takes longer may lose its claim to a repeat, and its
# change is then rolled back.
LEASE = timedelta(seconds=40)
KEPT = timedelta(hours=24)
# The namespace for addresses. Their UUIDs have version 5, and so cannot be a tenant's id.
ADDRESSES = UUID("9f0c6a52-3d0b-4d8a-9a55-7f1c1f0d6c11")


@dataclass(frozen=True)
class Request:
    """A request with a key: whose it is, the name its key is stored under, and what it asks for.

    The fingerprint is a digest of operation, query and body, of which a password may be part.
    """

    scope: UUID
    name: bytes
    fingerprint: str = field(repr=False)


@dataclass(frozen=True)
class Claim:
    """The right to answer a request, until its lease ends and a repeat takes it over."""

    scope: UUID
    name: bytes
    id: UUID
    at: datetime

    @property
    def is_anonymous(self) -> bool:
        """Whether it belongs to an address, as the caller is not authenticated."""
        return self.scope.version == 5


@dataclass(frozen=True)
class StoredAnswer:
    """What was answered: sent again byte for byte."""

    status: int
    headers: Mapping[str, str]
    body: str = field(repr=False)


@dataclass(frozen=True)
class Found:
    """What is stored under a name: the request's fingerprint, and its answer once there is one."""

    fingerprint: str = field(repr=False)
    answer: StoredAnswer | None


def scope_of_address(address: str | None) -> UUID:
    """The scope of the keys of an unauthenticated caller, who is known by address alone."""
    return uuid5(ADDRESSES, address or "")


def name_of(key: str, principal: UUID | None) -> bytes:
    """What a key is stored under: two users of a tenant may choose the same key, and get their own answers."""
    return hashlib.sha256(f"{principal}/{key}".encode()).digest()


def take(tx: Storage, request: Request, *, now: datetime) -> Claim | StoredAnswer:
    """Claim the right to answer the request, or return what was answered before.

    Raises `IdempotencyKeyReused` and `IdempotencyInProgress`. An answer is kept in the transaction of its change: so
    where a claim has expired without one, nothing was changed, and it may be taken over.
    """
    claim = Claim(request.scope, request.name, new_id(), now)
    if tx.idempotency.take(claim, request.fingerprint, until=now + LEASE):
        return claim
    found = tx.idempotency.find(request.name)
    if found is None:  # The claim was released at this moment.
        raise IdempotencyInProgress
    if found.fingerprint != request.fingerprint:
        raise IdempotencyKeyReused
    if found.answer is None:
        raise IdempotencyInProgress
    return found.answer


def keep(tx: Storage, claim: Claim, answer: StoredAnswer) -> None:
    """Keep the answer in its change's transaction; raises `IdempotencyInProgress` if the claim is lost."""
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
