"""The connection pool, with a metric of how long callers wait for a connection."""

from __future__ import annotations

from time import perf_counter

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from billing import metrics


class Pool(QueuePool):
    """SQLAlchemy's pool. Only a caller that has to wait is timed."""

    # Its log lines show the whole URL of the database: they go to SQLAlchemy's logger, which is silent.
    __module__ = QueuePool.__module__

    def _do_get(self) -> ConnectionPoolEntry:
        if self.checkedin() > 0 or self.checkedout() < self.size():
            return super()._do_get()
        started = perf_counter()
        try:
            return super()._do_get()
        finally:
            metrics.POOL_WAIT.observe(perf_counter() - started)
