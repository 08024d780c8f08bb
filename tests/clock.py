"""A clock that a test moves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class TurnedClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.reset()

    def __call__(self) -> datetime:
        return self.now

    def reset(self) -> None:
        self.now = datetime.now(UTC)

    def turn(self, **forward: float) -> None:
        """Move forward by `seconds=…`, `minutes=…`, `days=…`."""
        self.now += timedelta(**forward)
