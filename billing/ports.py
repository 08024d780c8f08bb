"""What every chapter may ask of storage; each names the rest of what it needs itself."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol
from uuid import UUID

from billing.tasks import Queue
from billing.webhooks.events import EventType


class Directory(Protocol):
    def claim(self, kind: str, name: str, id: UUID) -> bool:
        """Take a name for this tenant's thing; False when it is taken, by whomever."""

    def add(self, kind: str, name: str, id: UUID) -> None:
        """Put a random name, which nobody else can have: if somebody did, nothing of the transaction would be kept."""


class Audit(Protocol):
    def record(
        self,
        action: str,
        *,
        now: datetime,
        subject: str | None = None,
        reason: str | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Add a row to the tenant's audit log, by whoever opened the transaction."""


class Events(Protocol):
    """Each holds the tenant's row of numbers until the end, as `Audit` does its own: audit first, or two deadlock."""

    def record(
        self, type: EventType, data: Mapping[str, object], *, livemode: bool = True, now: datetime
    ) -> None:
        """Tell the tenant's webhook of something, once the transaction is kept."""


class Tasks(Protocol):
    def add(
        self,
        kind: str,
        id: UUID,
        *,
        subject: str,
        due_at: datetime,
        now: datetime,
        queue: Queue = "general",
        moved: bool = False,
    ) -> None:
        """Have the worker do something. One that was added already is done at the earlier of the two times.

        It stays in the queue it is in, unless it is `moved`.
        """

    def drop(self, kind: str, *, subject: str) -> None:
        """Have the worker leave it. One that is doing it at this moment will not do it again."""
