"""PostgreSQL's processes, stopped for a while as a machine out of memory or a debugger would."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text

WAITING = text(
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'billing' "
    "AND datname = current_database() AND state LIKE 'idle%'"
)


@contextmanager
def stopped(superuser: Engine) -> Iterator[list[int]]:
    """Stop every server process that waits for a statement of ours, for the block."""
    with superuser.connect() as connection:
        pids = list(connection.scalars(WAITING))
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
