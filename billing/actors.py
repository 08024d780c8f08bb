"""The actor of a change, as the audit log records it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

Kind = Literal["user", "api_key", "anonymous", "operator", "system"]


@dataclass(frozen=True)
class Actor:
    """A user, an API key, an anonymous client of a public operation, a console operator, or the system."""

    kind: Kind
    id: UUID | None = None
    address: str | None = None
    request_id: str | None = None


SYSTEM = Actor("system")
OPERATOR = Actor("operator")
