"""The time as an argument."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Now, in UTC: what a `Clock` returns outside of tests."""
    return datetime.now(UTC)
