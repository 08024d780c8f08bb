"""Counts in the memory of one process."""

from __future__ import annotations

from collections import OrderedDict

# Some 15 MB. A client with more addresses than this has as many budgets, and gains nothing by dropped counts.
MOST_COUNTS = 65_536


class InProcess:
    """Counts of this process alone, `most` of them: beyond that the one unused for longest is dropped."""

    def __init__(self, *, most: int = MOST_COUNTS) -> None:
        self.counts: OrderedDict[str, int] = OrderedDict()
        self._most = most

    async def add(self, key: str, amount: int, *, seconds: int) -> int:  # noqa: ARG002 - it is dropped in time
        count = self.counts.get(key, 0) + amount
        self.put(key, count)
        return count

    def put(self, key: str, count: int) -> None:
        """Set a count."""
        self.counts[key] = count
        self.counts.move_to_end(key)
        if len(self.counts) > self._most:
            self.counts.popitem(last=False)

    def take(self, key: str) -> int:
        """Remove a count, and return it."""
        return self.counts.pop(key, 0)

    async def forget(self, key: str) -> None:
        self.counts.pop(key, None)

    async def close(self) -> None:
        self.counts.clear()
