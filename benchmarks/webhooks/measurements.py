"""The measurements: deliveries per second, the cost of each, and the latency of an event."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from benchmarks.installation import Installation, cpu_seconds, eventually
from benchmarks.webhooks.processes import Receivers, receiving, working
from billing import tenants
from billing.clock import utc_now
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.webhooks.endpoints import Endpoint
from billing.webhooks.events import EventType

EVENTS_A_SECOND = 20
DEAD = 100
PENDING_EACH = 10
MOST_SECONDS = 120
EVENT: EventType = "webhook.test"


@dataclass(frozen=True)
class Throughput:
    """How one worker delivered what was pending; CPU in µs per delivery."""

    endpoints: int
    ending: bool
    events: int
    deliveries_a_second: float
    worker_micros: float
    postgres_micros: float


@dataclass(frozen=True)
class Latency:
    """From the commit of an event to its arrival, in ms."""

    beside: str
    p50: float
    p99: float
    events: int


# How many ----------------------------------------------------------------------------------------


def throughput(
    installation: Installation, *, endpoints: int, events: int, ending: bool = False
) -> Throughput:
    """Have one worker deliver events recorded before it started, spread over so many endpoints.

    The receiver keeps its connections open, or closes each after its answer (`ending`).
    """
    with receiving() as receivers:
        url = receivers.ending if ending else receivers.keeping
        for _ in range(endpoints):
            record(installation, registered(installation, url), [0] * (events // endpoints))
        with working(installation) as worker:
            eventually(lambda: receivers.seen().count > 0)
            began = cpu_seconds(worker), installation.postgres_seconds()
            eventually(lambda: receivers.seen().count >= events, within_seconds=MOST_SECONDS)
            ended = cpu_seconds(worker), installation.postgres_seconds()
        seen = receivers.seen()
    worker_micros, postgres_micros = (
        1e6 * (after - before) / events for before, after in zip(began, ended, strict=True)
    )
    rate = seen.count / (seen.last - seen.first)
    return Throughput(endpoints, ending, seen.count, rate, worker_micros, postgres_micros)


# How soon ----------------------------------------------------------------------------------------


def latency(installation: Installation, *, beside: str, seconds: float) -> Latency:
    """How soon events of one tenant arrive, while others' endpoints are `silent` or `refusing`, or there are none."""
    with receiving() as receivers:
        tenant_id = registered(installation, receivers.keeping)
        add_dead(installation, {"silent": receivers.silent, "refusing": receivers.refusing}.get(beside))
        with working(installation):
            await_worker(installation, tenant_id, receivers)
            committed = at_an_even_pace(installation, tenant_id, round(seconds * EVENTS_A_SECOND))
            eventually(lambda: len(receivers.seen().numbered) == len(committed) + 1)
        arrived = receivers.seen().numbered
    waits = sorted(1000 * (arrived[number] - at) for number, at in committed.items())
    return Latency(beside, statistics.median(waits), waits[int(0.99 * len(waits))], len(waits))


def add_dead(installation: Installation, url: str | None) -> None:
    for _ in range(DEAD if url else 0):
        record(installation, registered(installation, url), range(PENDING_EACH))


def await_worker(installation: Installation, tenant_id: UUID, receivers: Receivers) -> None:
    """Wait until the worker has started, and delivered a first event."""
    record(installation, tenant_id, [0])
    eventually(lambda: 0 in receivers.seen().numbered)


def at_an_even_pace(installation: Installation, tenant_id: UUID, events: int) -> dict[int, float]:
    """Record events one by one; returns when each was committed, by its number."""
    committed = {}
    began = time.monotonic()
    for number in range(1, events + 1):
        time.sleep(max(0.0, began + number / EVENTS_A_SECOND - time.monotonic()))
        record(installation, tenant_id, [number])
        committed[number] = time.monotonic()
    return committed


# What is there before ----------------------------------------------------------------------------


def registered(installation: Installation, url: str | None) -> UUID:
    """A new tenant whose events go to this URL, with none of them pending."""
    tenant_id, now = new_id(), utc_now()
    details = {"company_name": "Acme Inc.", "email": f"ada@{tenant_id}.example"}
    digests = KeyDigests(installation.settings.key_peppers)
    with installation.store.tenant(tenant_id) as tx:
        tenants.register(tx, details, password_hash="-", digests=digests, now=now)
        tx.webhooks.keep(Endpoint(url), now)
    return tenant_id


def record(installation: Installation, tenant_id: UUID, numbers: Sequence[int]) -> None:
    """Record numbered events in one transaction."""
    now = utc_now()
    with installation.store.tenant(tenant_id) as tx:
        for number in numbers:
            tx.events.record(EVENT, {"number": number}, now=now)
