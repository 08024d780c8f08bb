"""Identifiers: UUID version 7 (RFC 9562), which sort by the time they were made."""

from __future__ import annotations

from uuid import UUID

import uuid_utils
from uuid_utils.compat import uuid7


def new_id() -> UUID:
    """A new UUIDv7."""
    return uuid7()


def new_name() -> str:
    """A new UUIDv7 as text, for names alone: without making an object it takes a fifth of the time."""
    return str(uuid_utils.uuid7())
