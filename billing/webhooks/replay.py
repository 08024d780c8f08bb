"""Replay: events sent once more, or for the first time where nobody could be told."""

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

# What is replayed in one transaction: it holds the endpoint, which deliveries that fail wait for.
CHUNK = 500


@dataclass(frozen=True)
class Choice:
    """Which events: those named, or else those since a time, or else those whose delivery failed; never a test."""

    event_ids: Sequence[UUID] = ()
    since: datetime | None = None


@dataclass(frozen=True)
class Extent:
    """How many events that is, and the place of the last: what happens later is not among them."""

    events: int
    last: int


@dataclass(frozen=True)
class Chosen:
    """An event to be replayed, and its place among the tenant's events."""

    id: UUID
    sequence: int


def measure(tx: Storage, choice: Choice) -> Extent:
    """How many they are; raises `WebhookNotConfigured`, `Conflict`, or `NotFound` if not all named are there."""
    endpoint = _require_active(tx.webhooks.find())
    found = tx.events.measure(choice, wanted=endpoint.wanted)
    if found.events < len(set(choice.event_ids)):
        raise NotFound(
            "The tenant has no such event, or it is a test, or its endpoint does not ask for that type."
        )
    return found


def note(tx: Storage, choice: Choice, found: int, *, now: datetime) -> None:
    """Keep in the audit log what is about to be replayed."""
    tx.audit.record("webhook.replayed", now=now, details={**_details(choice), "events": found})


def _details(choice: Choice) -> dict[str, object]:
    if choice.event_ids:
        return {"event_ids": sorted(map(str, {*choice.event_ids}))}
    return {"failed": True} if choice.since is None else {"since": choice.since.isoformat()}


def replay(tx: Storage, choice: Choice, *, after: int, last: int, now: datetime) -> list[Chosen]:
    """Have the first of the events between these places delivered now, and say which; none when all are."""
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
