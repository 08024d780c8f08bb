"""Events: their types, and the envelope in which each is stored, signed and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import orjson

# The version of the envelope and of every `data`. A change that an older receiver could not read needs a new one.
API_VERSION = "2026-01-15"

# The types that an endpoint can ask for. The document's `EventType` describes each.
EventType = Literal[
    "tenant.registered",
    "user.password_changed",
    "api_key.regenerated",
    "api_key.revoked",
    "api_key.expiring",
    "stripe.account.connected",
    "stripe.account.updated",
    "stripe.account.disconnected",
    "webhook.disabled",
    "webhook.test",
]
# The type of a test event, unless another is asked for.
TEST: EventType = "webhook.test"


@dataclass(frozen=True)
class Event:
    """Something that happened, or a test; `body` is its envelope, the bytes that are signed and sent."""

    id: UUID
    sequence: int
    type: str
    is_test: bool
    created_at: datetime
    body: bytes


def envelope(
    *,
    id: UUID,
    type: str,
    created_at: datetime,
    tenant_id: UUID,
    livemode: bool,
    sequence: int,
    data: Mapping[str, Any],
) -> bytes:
    """The event as JSON, made once: every attempt signs and sends these very bytes.

    `id` is also the header `webhook-id`; `created_at` has a time zone; `sequence` counts the tenant's events from 1;
    `data` follows the document's schema of that type, its times with a time zone.
    """
    members = {
        "id": id,
        "type": type,
        "api_version": API_VERSION,
        "created_at": created_at,
        "tenant_id": tenant_id,
        "livemode": livemode,
        "sequence": sequence,
        "data": dict(data),
    }
    return orjson.dumps(members, option=orjson.OPT_UTC_Z)
