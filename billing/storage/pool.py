"""The pool of connections, with a clock for those that have to wait for one."""

from __future__ import annotations

from time import perf_counter

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from billing import metrics


class Pool(QueuePool):
    """SQLAlchemy's pool. Who finds a connection free costs nothing more."""

    # Its lines show the whole address of the database: they are logged as SQLAlchemy's, which is silent.
    __module__ = QueuePool.__module__

    def _do_get(self) -> ConnectionPoolEntry:
        if self.checkedin() > 0 or self.checkedout() < self.size():
            return super()._do_get()
        started = perf_counter()
        try:
            return super()._do_get()
        finally:
            metrics.POOL_WAIT.observe(perf_counter() - started)
