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
    """One task, as a worker holds it.

    `attempts` counts this one, and is its fencing token. `revision` shows if it was added again meanwhile.
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
    """What waits, of all tenants: the tasks that are due, by queue, and the deliveries that have not ended.

    The outbox is grouped by the state of the endpoints: `working`, `failing` or `disabled`.
    """

    queues: Mapping[str, Depth]
    outbox: Mapping[str, Depth]
