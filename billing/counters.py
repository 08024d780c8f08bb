"""Where counts are kept: in this process, unless the settings name a place that many share."""

from __future__ import annotations

from collections import OrderedDict

from billing.limits import Counters
from billing.settings import Settings

# Some 15 MB. Who has more addresses than this has as many budgets, and gains nothing by what is dropped.
MOST_COUNTS = 65_536


class InProcess:
    """Counts of this process alone, as many as there is room for: beyond that the one idle for longest is dropped.

    The library's own storage in memory keeps any number, and looks at each of them on every request.
    """

    def __init__(self, *, most: int = MOST_COUNTS) -> None:
        self.counts: OrderedDict[str, int] = OrderedDict()
        self._most = most

    async def add(self, key: str, amount: int, *, seconds: int) -> int:  # noqa: ARG002 - it is dropped in time
        count = self.counts[key] = self.counts.get(key, 0) + amount
        self.counts.move_to_end(key)
        if len(self.counts) > self._most:
            self.counts.popitem(last=False)
        return count

    async def forget(self, key: str) -> None:
        self.counts.pop(key, None)

    async def close(self) -> None:
        self.counts.clear()


def counters_for(settings: Settings) -> Counters:
    """Where this installation counts."""
    url = settings.rate_limit_storage_url
    if url is None:
        return InProcess()
    # Importing Redis's client takes longer than all the rest of the server.
    from billing.shared_counters import InRedis

    return InRedis(url, instead=InProcess())
