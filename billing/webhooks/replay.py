"""Replay: events sent once more, or for the first time if there was no active endpoint when they happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from billing.errors import Conflict, NotFound, WebhookNotConfigured
from billing.ports import Audit, Tasks
from billing.webhooks.delivery import wake
from billing.webhooks.endpoints import Endpoint

# How many events one transaction replays: meanwhile it locks the endpoint, for which settling a delivery waits.
CHUNK = 500


@dataclass(frozen=True)
class Choice:
    """Which events: those named, else those since a time, else those whose delivery failed; never tests."""

    event_ids: Sequence[UUID] = ()
    since: datetime | None = None


@dataclass(frozen=True)
class Extent:
    """How many events a choice has, and the last one's number: later events are not part of the replay."""

    events: int
    last: int


@dataclass(frozen=True)
class Chosen:
    """An event to be replayed, and its number among the tenant's events."""

    id: UUID
    sequence: int


def measure(tx: Storage, choice: Choice) -> Extent:
    """Count the events; raises `WebhookNotConfigured`, `Conflict`, or `NotFound` if not all those named exist."""
    endpoint = _require_active(tx.webhooks.find())
    found = tx.events.measure(choice, wanted=endpoint.wanted)
    if found.events < len(set(choice.event_ids)):
        raise NotFound(
            "The tenant has no such event, or it is a test, or its endpoint does not ask for that type."
        )
    return found


def note(tx: Storage, choice: Choice, found: int, *, now: datetime) -> None:
    """Record in the audit log what is about to be replayed."""
    tx.audit.record("webhook.replayed", now=now, details={**_details(choice), "events": found})


def _details(choice: Choice) -> dict[str, object]:
    if choice.event_ids:
        return {"event_ids": sorted(map(str, {*choice.event_ids}))}
    return {"failed": True} if choice.since is None else {"since": choice.since.isoformat()}


def replay(tx: Storage, choice: Choice, *, after: int, last: int, now: datetime) -> list[Chosen]:
    """Make the first chunk of the events after `after`, up to `last`, due now, and return them; none at the end."""
    endpoint = _require_active(tx.webhooks.find(lock=True))
    chosen = tx.events.chosen(choice, wanted=endpoint.wanted, after=after, last=last, most=CHUNK)
    if chosen:
        tx.deliveries.replay([event.id for event in chosen], now)
        wake(tx.tasks, tx.tenant_id, now)
    return chosen


def _require_active(endpoint: Endpoint) -> Endpoint:
    if endpoint.url is None:
        raise WebhookNotConfigured("The tenant has no webhook URL: it has to configure one first.")
    if endpoint.disabled_reason is not None:
        raise Conflict("The tenant's webhook is disabled: it has to configure its URL again first.")
    return endpoint


class WebhookShelf(Protocol):
    def find(self, *, lock: bool = False) -> Endpoint: ...


class EventShelf(Protocol):
    def measure(self, choice: Choice, *, wanted: Sequence[str]) -> Extent: ...
    def chosen(
        self, choice: Choice, *, wanted: Sequence[str], after: int, last: int, most: int
    ) -> list[Chosen]: ...


class DeliveryShelf(Protocol):
    def replay(self, event_ids: Sequence[UUID], now: datetime) -> None: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenant_id(self) -> UUID: ...
    @property
    def webhooks(self) -> WebhookShelf: ...
    @property
    def events(self) -> EventShelf: ...
    @property
    def deliveries(self) -> DeliveryShelf: ...
    @property
    def tasks(self) -> Tasks: ...
    @property
    def audit(self) -> Audit: ...
