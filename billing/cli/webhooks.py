"""`billing webhooks`: how deliveries to a tenant's endpoint went, and events sent once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import get_args
from uuid import UUID

import click

from billing.actors import OPERATOR
from billing.cli.console import (
    Moment,
    as_json,
    cell,
    done,
    opened_store,
    progress,
    say_json,
    show,
    slug_argument,
    tenant_called,
    transaction_of,
)
from billing.clock import utc_now
from billing.storage.store import Store
from billing.webhooks import replay
from billing.webhooks.delivery import Stats, Status
from billing.webhooks.endpoints import Endpoint
from billing.webhooks.replay import Choice, Extent

COLUMNS = (
    "event_id",
    "event_type",
    "status",
    "attempts",
    "http_status",
    "error",
    "next_attempt_at",
    "created_at",
)


@click.group()
def webhooks() -> None:
    """Show how deliveries to a tenant's endpoint went, and send events once more.

    \b
    Example:
      billing webhooks list acme
    """


# What there is -------------------------------------------------------------------------------------


@webhooks.command("list")
@slug_argument
@click.option("--status", type=click.Choice(get_args(Status)), help="Those in this status alone.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@as_json
def list_deliveries(slug: str, status: Status | None, limit: int, as_json: bool) -> None:
    """Show a tenant's endpoint and its last deliveries, the newest first.

    \b
    Example:
      billing webhooks list acme --status failed
    """
    with transaction_of(slug) as tx:
        endpoint, stats = tx.webhooks.find(), tx.deliveries.stats(utc_now())
        rows = [asdict(delivery) for delivery in tx.deliveries.recent(limit, status=status)]
    if as_json:
        say_json({**asdict(endpoint), "is_active": endpoint.is_active, **asdict(stats), "deliveries": rows})
    else:
        click.echo(health(endpoint, stats))
        show(rows, COLUMNS, as_json=False)


def health(endpoint: Endpoint, stats: Stats) -> str:
    """The endpoint's URL, state and numbers of deliveries, in a few lines."""
    lines = [f"{cell(endpoint.url)} is {'active' if endpoint.is_active else 'disabled'}."]
    if endpoint.url is None:
        lines = ["No webhook URL is configured."]
    if endpoint.disabled_reason is not None:
        lines.append(f"It was disabled because it is {endpoint.disabled_reason}.")
    if endpoint.failing_since is not None:
        lines.append(f"It has failed since {cell(endpoint.failing_since)}.")
    lines.append(
        f"Pending: {stats.pending}. In 24 hours: {stats.delivered_24h} delivered, {stats.failed_24h} failed."
    )
    return "\n".join(lines)


# Once more -----------------------------------------------------------------------------------------


@webhooks.command("replay")
@slug_argument
@click.option("--event", "event_ids", type=click.UUID, multiple=True, help="This event; may be given again.")
@click.option("--failed", is_flag=True, help="Every event whose delivery failed.")
@click.option(
    "--since", type=Moment(), help="Every event since then, such as 2026-01-15T09:30:00Z, 2h or 3d."
)
@click.option("--dry-run", is_flag=True, help="Only say how many.")
def replay_events(
    slug: str, event_ids: Sequence[UUID], failed: bool, since: datetime | None, dry_run: bool
) -> None:
    """Send events once more: those named, those that failed, or all since a time.

    What happened while there was no URL, or while the endpoint was disabled, is sent for the first time; what is
    pending is sent now. Events bear the same webhook-id and the same body as before.

    \b
    Example:
      billing webhooks replay acme --failed
      billing webhooks replay acme --since 2h --dry-run
    """
    if [bool(event_ids), failed, since is not None].count(True) != 1:
        raise click.UsageError("Say which events: --event, --failed or --since, and one of them alone.")
    choice = Choice(event_ids, since)
    with opened_store() as (_, store):
        tenant_id = tenant_called(slug, store).id
        found = announced(store, tenant_id, choice, dry_run=dry_run)
        if dry_run:
            done(f"{events(found.events)} would be sent to {slug}.")
        else:
            done(f"{events(replayed(store, tenant_id, choice, found))} will be sent to {slug}.")


def announced(store: Store, tenant_id: UUID, choice: Choice, *, dry_run: bool) -> Extent:
    """Count the events, and record the replay in the audit log before the first of them is sent."""
    with store.tenant(tenant_id, OPERATOR) as tx:
        found = replay.measure(tx, choice)
        if found.events and not dry_run:
            replay.note(tx, choice, found.events, now=utc_now())
    return found


def replayed(store: Store, tenant_id: UUID, choice: Choice, found: Extent) -> int:
    """Replay chunk by chunk; returns the number of events."""
    total = 0
    with progress("Replaying", found.events, at_once=replay.CHUNK) as bar:
        for size in chunks(store, tenant_id, choice, found.last):
            total += size
            bar.update(size)
    return total


def chunks(store: Store, tenant_id: UUID, choice: Choice, last: int) -> Iterator[int]:
    """Replay each chunk in a transaction of its own, and yield its size."""
    after = 0
    while True:
        with store.tenant(tenant_id, OPERATOR) as tx:
            chosen = replay.replay(tx, choice, after=after, last=last, now=utc_now())
        if not chosen:
            return
        yield len(chosen)
        after = chosen[-1].sequence


def events(number: int) -> str:
    return "1 event" if number == 1 else f"{number} events"
