"""A clock that a test turns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class TurnedClock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.reset()

    def __call__(self) -> datetime:
        return self.now

    def reset(self) -> None:
        self.now = datetime.now(UTC)

    def turn(self, **forward: float) -> None:
        """Forward by `seconds=…`, `minutes=…`, `days=…`."""
        self.now += timedelta(**forward)
