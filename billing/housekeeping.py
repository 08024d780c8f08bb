"""Housekeeping: scheduled jobs for a tenant, independent of its requests."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from billing import keys, stripe_connect, tenants
from billing.clock import Clock
from billing.storage.store import Store
from billing.tasks import Task

# How long settled deliveries, their events, and ended sessions are kept.
KEPT = timedelta(days=30)


class Housekeeping:
    """The worker's small jobs."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def tidy(self, task: Task) -> None:
        """Delete what is old, and reseal webhook secrets that an old encryption key sealed."""
        now = self._clock()
        # Those of all tenants, and of anonymous clients, for whom no task runs.
        self._store.forget_answers(now)
        with self._store.tenant(task.tenant_id) as tx:
            is_more = [
                tx.deliveries.prune(now - KEPT),
                tx.sessions.prune(now - KEPT),
                stripe_connect.forget_states(tx, now=now),
            ]
        # Apart: a secret cannot be opened whose encryption key was taken away, and must not keep the rest.
        with self._store.tenant(task.tenant_id) as tx:
            tx.webhooks.tidy_secrets(now)
            tx.tasks.postpone(task, now if any(is_more) else now + tenants.TIDIED_EVERY)

    def announce_expiry(self, task: Task) -> None:
        """Record the event that an API key is about to expire."""
        with self._store.tenant(task.tenant_id, exclusive=True) as tx:
            # Only while we hold the task: another worker would record a second event.
            if tx.tasks.finish(task):
                keys.announce_expiry(tx, UUID(task.subject), now=self._clock())
