"""The backlog of all tenants together: counts and ages only, no rows."""

from __future__ import annotations

from datetime import datetime
from typing import get_args

from sqlalchemy import Connection

from billing.tasks import Backlog, Depth, Queue

READ = "SELECT kind, name, number, oldest FROM app.backlog(%(now)s, %(queues)s)"


def read_backlog(connection: Connection, now: datetime) -> Backlog:
    """The depth of each queue, and of the outbox by the state of the endpoints."""
    depths: dict[str, dict[str, Depth]] = {"queue": {}, "outbox": {}}
    rows = connection.exec_driver_sql(READ, {"now": now, "queues": list(get_args(Queue))})
    for kind, name, number, oldest in rows:
        depths[kind][name] = Depth(number, max(0.0, (now - oldest).total_seconds()) if oldest else 0.0)
    return Backlog(depths["queue"], depths["outbox"])
