"""The audit log: what a row records, how its hash chains it to the row before, and how a log is verified."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import orjson

GENESIS = bytes(32)
HEAD = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True)
class Row:
    """What was done, to what, why, by whom, from where, and in which request."""

    tenant_id: UUID
    sequence: int
    at: datetime
    action: str
    actor_kind: str
    actor_id: UUID | None
    subject: str | None
    reason: str | None
    details: Mapping[str, object]
    address: str | None
    request_id: str | None
    hash: bytes

    def content(self) -> dict[str, object]:
        """All members but the hash."""
        return {
            "action": self.action,
            "actor_id": self.actor_id,
            "actor_kind": self.actor_kind,
            "address": self.address,
            "at": self.at.astimezone(UTC),
            "details": self.details,
            "reason": self.reason,
            "request_id": self.request_id,
            "sequence": self.sequence,
            "subject": self.subject,
            "tenant_id": self.tenant_id,
        }

    def line(self) -> bytes:
        """The row as a line of JSON; what was hashed is all but its last member, `hash`, and the newline."""
        return canonical(self.content())[:-1] + b',"hash":"%s"}\n' % self.hash.hex().encode()


def canonical(content: Mapping[str, object]) -> bytes:
    """The bytes that are hashed: JSON with sorted keys, times in UTC."""
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z)


def chained(previous: bytes, content: Mapping[str, object]) -> bytes:
    """The hash of a row: `SHA-256(previous hash ‖ canonical row)`."""
    return hashlib.sha256(previous + canonical(content)).digest()


@dataclass(frozen=True)
class Head:
    """Where a log ends: the number and the hash of its last row."""

    sequence: int
    hash: bytes

    @classmethod
    def parse(cls, text: str) -> Head | None:
        """The head that `str` made this text of, None where it is no such text."""
        match = HEAD.fullmatch(text)
        return cls(int(match[1]), bytes.fromhex(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash.hex()}"


@dataclass(frozen=True)
class Choice:
    """A filter of rows, which must match every member given. An actor is given by kind or by id."""

    action: str | None = None
    actor: str | UUID | None = None
    since: datetime | None = None
    until: datetime | None = None


# Verification ------------------------------------------------------------------------------------


class Broken(Exception):
    """A log is not what was written; the message names the first row that shows it."""


class Chain:
    """Verifies a log row by row from its first, against heads that are known from elsewhere."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self.end = Head(0, GENESIS)
        self._heads = heads

    def add(self, row: Row) -> None:
        """Verify the next row; raises `Broken` unless it is what was written there."""
        if row.sequence <= self.end.sequence:
            raise Broken(f"Row {row.sequence} was inserted: a log begins with row 1.")
        if row.sequence > self.end.sequence + 1:
            raise Broken(f"Row {self.end.sequence + 1} is missing: row {row.sequence} stands there.")
        if chained(self.end.hash, row.content()) != row.hash:
            raise Broken(f"Row {row.sequence} is not what was written: it was changed, or is another row.")
        self.end = Head(row.sequence, row.hash)
        if any(head.sequence == row.sequence and head.hash != row.hash for head in self._heads):
            raise Broken(
                f"Row {row.sequence} has another hash than was noted: it, or rows before it, are new."
            )

    def finish(self) -> None:
        """Verify that no rows are missing at the end; raises `Broken` otherwise."""
        last = max(head.sequence for head in self._heads)
        if last > self.end.sequence:
            raise Broken(
                f"Row {self.end.sequence + 1} is missing: the log was cut off, it went on to row {last}."
            )
