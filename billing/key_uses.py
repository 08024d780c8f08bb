"""When keys were last used: noted in memory by requests, and written outside of them."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from itertools import islice
from uuid import UUID

from billing import metrics
from billing.keys import ApiKey
from billing.storage.store import Store

# Five minutes is precise enough; noting every use would be one write per request.
NOTED_EVERY = timedelta(minutes=5)
# How many keys, each of another tenant, are written in one transaction.
WRITTEN_AT_ONCE = 100


class KeyUses:
    """Uses noted until `flush` writes them."""

    def __init__(self) -> None:
        self._noted: dict[tuple[UUID, UUID], datetime] = {}
        self._lock = threading.Lock()

    def note(self, key: ApiKey, now: datetime) -> None:
        """Remember a use, unless one of the last five minutes is stored already."""
        if key.last_used_at is None or now - key.last_used_at >= NOTED_EVERY:
            with self._lock:
                self._noted.setdefault((key.tenant_id, key.id), now)

    def flush(self, store: Store) -> None:
        """Write what was noted. What cannot be written now is dropped: the key's next use is noted again."""
        with self._lock:
            noted, self._noted = self._noted, {}
        try:
            while noted:
                one_each = {tenant_id: (key_id, at) for (tenant_id, key_id), at in noted.items()}
                some = dict(islice(one_each.items(), WRITTEN_AT_ONCE))
                store.note_uses(some)
                for tenant_id, (key_id, _) in some.items():
                    del noted[tenant_id, key_id]
        finally:
            metrics.KEY_USES_DROPPED.count(amount=len(noted))
