"""What several chapters need of storage; each names the rest of its needs itself."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol
from uuid import UUID

from billing.tasks import Queue
from billing.webhooks.events import EventType


class Directory(Protocol):
    def claim(self, kind: str, name: str, id: UUID) -> bool:
        """Take a name for a thing of this tenant; False when any tenant has taken it."""

    def add(self, kind: str, name: str, id: UUID) -> None:
        """Add a random name, which cannot be taken yet: if it were, the transaction would fail."""


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
        """Add a row to the tenant's audit log; its actor is the one that opened the transaction."""


class Events(Protocol):
    """Recording locks the tenant's row of event numbers until commit, as `Audit` does its own.

    Audit first, or two transactions deadlock.
    """

    def record(
        self, type: EventType, data: Mapping[str, object], *, livemode: bool = True, now: datetime
    ) -> None:
        """Send an event to the tenant's webhook, once the transaction is committed."""


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
        """Schedule a task for the worker. One that was added already is due at the earlier of the two times.

        It stays in the queue it is in, unless it is `moved`.
        """

    def drop(self, kind: str, *, subject: str) -> None:
        """Remove the task. A worker that is doing it at this moment will not do it again."""
