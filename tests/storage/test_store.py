"""The store's connections."""

from __future__ import annotations

from contextlib import ExitStack

from billing.storage.platform import Platform
from billing.storage.store import Store


def backend(platform: Platform) -> int:
    """The process at the other end."""
    [pid] = platform._connection.exec_driver_sql("SELECT pg_backend_pid()").one()
    return int(pid)


def test_the_connection_that_worked_last_is_taken_first(store: Store) -> None:
    """After a failover the others may each cost seconds: taken in turn, one good connection would help nobody."""
    with ExitStack() as stack:
        opened = {backend(stack.enter_context(store.platform())) for _ in range(3)}
    assert len(opened) == 3
    taken = set()
    for _ in range(3):
        with store.platform() as platform:
            taken.add(backend(platform))
    assert len(taken) == 1
