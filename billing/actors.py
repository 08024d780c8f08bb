"""Who does something, as the audit log keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

Kind = Literal["user", "api_key", "anonymous", "operator", "system"]


@dataclass(frozen=True)
class Actor:
    """A user, an API key, a stranger (at register or login), an operator at the console, or the system."""

    kind: Kind
    id: UUID | None = None
    address: str | None = None
    request_id: str | None = None


SYSTEM = Actor("system")
OPERATOR = Actor("operator")
