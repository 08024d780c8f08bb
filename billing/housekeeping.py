"""Housekeeping: what is done for a tenant by and by, whether anybody calls or not."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from billing import keys, stripe_connect, tenants
from billing.clock import Clock
from billing.storage.store import Store
from billing.tasks import Task

# How long deliveries and their events, and sessions that ended, can be looked at.
KEPT = timedelta(days=30)


class Housekeeping:
    """The worker's small jobs."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def tidy(self, task: Task) -> None:
        """Forget what is old, and seal again what an old encryption key sealed."""
        now = self._clock()
        # Those of strangers too, who have no day of their own.
        self._store.forget_answers(now)
        with self._store.tenant(task.tenant_id) as tx:
            is_more = [
                tx.deliveries.prune(now - KEPT),
                tx.sessions.prune(now - KEPT),
                stripe_connect.forget_states(tx, now=now),
            ]
            tx.webhooks.tidy_secrets(now)
            tx.tasks.postpone(task, now if any(is_more) else now + tenants.TIDIED_EVERY)

    def announce_expiry(self, task: Task) -> None:
        """Tell of an API key that is about to end."""
        with self._store.tenant(task.tenant_id, exclusive=True) as tx:
            # Only as long as it is ours: another worker would tell it as another event.
            if tx.tasks.finish(task):
                keys.announce_expiry(tx, UUID(task.subject), now=self._clock())
