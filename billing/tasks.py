"""Tasks: what the worker has to do for a tenant, and when it tries again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

Queue = Literal["general", "checks", "webhooks", "slow_webhooks"]

# Longer than any task may take: one that is still running must not be begun by another worker.
LEASE = timedelta(seconds=60)
FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=6)


@dataclass(frozen=True)
class Task:
    """One thing to do, as a worker holds it.

    `attempts` counts this one, and fences it. `revision` tells whether it was asked for again meanwhile.
    """

    tenant_id: UUID
    kind: str
    id: UUID
    subject: str
    queue: Queue
    created_at: datetime
    attempts: int
    revision: int

    def retry_at(self, now: datetime) -> datetime:
        """When to try again after a failure: a minute later, then twice as long each time, up to six hours."""
        doublings = min(self.attempts - 1, 16)
        return now + min(FIRST_RETRY * (1 << doublings), LONGEST_RETRY)


@dataclass(frozen=True)
class Depth:
    """How much waits, and for how long what has waited longest; 0 where nothing is due."""

    number: int
    oldest_seconds: float


@dataclass(frozen=True)
class Backlog:
    """What waits at all tenants together: the tasks that are due, by queue, and the deliveries that have not ended.

    The outbox is told by how the endpoints do: `working`, `failing` or `disabled`.
    """

    queues: Mapping[str, Depth]
    outbox: Mapping[str, Depth]
