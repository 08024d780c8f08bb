"""Deliveries: an endpoint's due events, sent a few at a time with no transaction open, and what came of them."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median
from uuid import UUID

import structlog

from billing import metrics, tracing
from billing.actors import Actor
from billing.clock import Clock
from billing.errors import RateLimited
from billing.ids import new_id
from billing.storage.store import Store, TenantTx
from billing.tasks import Queue, Task
from billing.webhooks import endpoints
from billing.webhooks.delivery import Attempt, Begun, Delivery, Settled, Verdict, judge
from billing.webhooks.egress import Egress, Post
from billing.webhooks.endpoints import DISABLED, Endpoint
from billing.webhooks.events import Event
from billing.webhooks.signing import signed_headers

# What a worker takes of an endpoint at once. The last is begun early enough to end within the lease.
BATCH = 64
BEGUN_WITHIN_SECONDS = 30
# How many of these are in flight at most: one at first, twice as many each time all went well, all at once
# where the last batch did. However many endpoints are dead, each then holds one thread and not many.
IN_FLIGHT = 16
# Attempts that end within this time of the first are stored in one transaction.
GATHERED_SECONDS = 0.005
MOST_PROVEN = 10_000
# A receiver slower than this moves to the slow queue, or it would hold the threads of fast ones.
SLOW_MS = 2000
PAUSE = timedelta(seconds=4)

RANDOM = random.SystemRandom()

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.deliveries")


@dataclass(frozen=True)
class Batch:
    """The deliveries to send to an endpoint now, and the secrets that sign them."""

    tenant_id: UUID
    endpoint: Endpoint
    url: str
    secrets: Sequence[str] = field(repr=False)
    begun: Sequence[Begun] = ()


@dataclass(frozen=True)
class Results:
    """Attempts that ended about together: the result of each, and whether the receiver wants no more."""

    settled: Sequence[Settled] = ()
    gone: bool = False

    @property
    def all_delivered(self) -> bool:
        return all(one.status == "delivered" for one in self.settled)


@dataclass(frozen=True)
class BatchOutcome:
    """The outcome of a batch: the last results, not stored yet, the deliveries not begun, and how it went."""

    last: Results = Results()
    rest: Sequence[Begun] = ()
    was_slow: bool = False
    went_well: bool = False


class Dispatcher:
    """Sends events to tenants' endpoints, each by one worker at a time, as the task's lease ensures."""

    def __init__(self, store: Store, egress: Egress, clock: Clock, *, threads: int) -> None:
        self._store = store
        self._egress = egress
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="delivery")
        self._stopping = threading.Event()
        # Endpoints whose last batch went well.
        self._proven: set[UUID] = set()

    def stop(self) -> None:
        """Begin no more attempts; the results of those in flight are stored, and the rest is released."""
        self._stopping.set()

    def deliver(self, task: Task) -> None:
        """Send what is due to one tenant's endpoint, and postpone its task until more is due."""
        batch = self._begin(task.tenant_id)
        outcome = self._send(batch) if batch.begun else BatchOutcome()
        with self._store.tenant(task.tenant_id) as tx:
            now = self._clock()
            endpoint = _store_results(tx, batch, outcome.last, now)
            _release(tx, task, endpoint, outcome, now)
        if batch.begun:
            self._remember(task.tenant_id, went_well=outcome.went_well and endpoint.url == batch.url)

    def _begin(self, tenant_id: UUID) -> Batch:
        with self._store.tenant(tenant_id) as tx:
            endpoint = tx.webhooks.find(lock=True)
            now = self._clock()
            if endpoint.url is None:
                return Batch(tenant_id, endpoint, "", ())
            if endpoint.wanted:
                tx.deliveries.drop_unwanted(endpoint.wanted, now)
            begun = tx.deliveries.begin(
                now, types=_only_types(endpoint) or endpoint.wanted or None, most=BATCH
            )
            secrets = tx.webhooks.signing_secrets(now) if begun else ()
            return Batch(tenant_id, endpoint, endpoint.url, secrets, begun)

    def _send(self, batch: Batch) -> BatchOutcome:
        """Send a batch, and store all but the last results; stops early if it fails, is slow, or must."""
        with self._egress.to(batch.url) as post:
            return self._send_by(post, batch)

    def _send_by(self, post: Post, batch: Batch) -> BatchOutcome:
        waiting, flying = deque(batch.begun), dict[Future[Attempt | None], Begun]()
        window, until = self._first_window(batch.tenant_id), time.monotonic() + BEGUN_WITHIN_SECONDS
        durations: list[int] = []
        last = Results()  # The results that are not stored yet.
        while flying or (waiting and window):
            # Stored before more is begun, which must not go to a URL that the endpoint no longer has.
            if last.settled and not self._settle(batch, last):
                window = 0
            while waiting and len(flying) < window:
                begun = waiting.popleft()
                flying[self._submit(post, batch, begun, until)] = begun
            ended = [(flying.pop(future), future.result()) for future in _gathered(flying)]
            waiting.extend(begun for begun, attempt in ended if attempt is None)
            made = [(begun, attempt) for begun, attempt in ended if attempt is not None]
            last = _judge_all(batch, made, self._clock())
            durations += [one.duration_ms for one in last.settled]
            went_well = len(made) == len(ended) and last.all_delivered and not _is_slow(durations)
            window = min(2 * window, IN_FLIGHT) if went_well else 0
        return BatchOutcome(last, list(waiting), _is_slow(durations), went_well=window > 0)

    def _submit(self, post: Post, batch: Batch, begun: Begun, until: float) -> Future[Attempt | None]:
        # In the context of the task, to which the attempt's log line and span belong.
        return self._pool.submit(copy_context().run, self._attempt, post, batch, begun, until)

    def _first_window(self, tenant_id: UUID) -> int:
        return IN_FLIGHT if tenant_id in self._proven else 1

    def _remember(self, tenant_id: UUID, *, went_well: bool) -> None:
        if not went_well:
            self._proven.discard(tenant_id)
        elif len(self._proven) < MOST_PROVEN:
            self._proven.add(tenant_id)

    def _attempt(self, post: Post, batch: Batch, begun: Begun, until: float) -> Attempt | None:
        # None if it is not sent any more. All threads may have been busy for a while, and what begins now
        # must end before the lease does.
        if self._stopping.is_set() or time.monotonic() > until:
            return None
        return send(post, batch.secrets, begun, self._clock())

    def _settle(self, batch: Batch, results: Results) -> bool:
        """Store results; returns whether the endpoint still has the batch's URL."""
        with self._store.tenant(batch.tenant_id) as tx:
            return _store_results(tx, batch, results, self._clock()).url == batch.url


def send(post: Post, secrets: Sequence[str], begun: Begun, now: datetime) -> Attempt:
    """Make one attempt, signed as of now."""
    headers = signed_headers(secrets, id=str(begun.event_id), at=now, body=begun.body)
    attributes: tracing.Attributes = {
        "http.request.method": "POST",
        "billing.event_type": begun.event_type,
        "billing.event_id": str(begun.event_id),
        "billing.attempt": begun.attempt,
        "billing.request_id": begun.request_id,
    }
    with tracing.span("POST webhook", "client", attributes) as span:
        sent = {"Content-Type": "application/json", **headers, **tracing.headers()}
        attempt = post(begun.body, sent)
        span.set_attributes({"http.response.status_code": attempt.http_status})
        if attempt.reason is not None:
            span.fail(attempt.reason)
    return attempt


def _is_slow(durations: Sequence[int]) -> bool:
    return bool(durations) and median(durations) > SLOW_MS


def _store_results(tx: TenantTx, batch: Batch, results: Results, now: datetime) -> Endpoint:
    """Store results for deliveries and endpoint, which stays locked; returns the endpoint as it is then."""
    # Lock the endpoint before its deliveries, as its removal does: or the two deadlock.
    endpoint = tx.webhooks.find(lock=True)
    if not results.settled:
        return endpoint
    # Results of sending to an earlier URL say nothing of the present one.
    if endpoint.url == batch.url and endpoint.is_active:
        endpoint = _note(tx, endpoint, results, now)
    tx.deliveries.record_results(results.settled)
    return endpoint


def _note(tx: TenantTx, endpoint: Endpoint, results: Results, now: datetime) -> Endpoint:
    """Store the endpoint's health, and disable it if that is due."""
    if results.all_delivered and endpoint.failing_since is None:
        return endpoint
    failed = [one for one in results.settled if one.status != "delivered"]
    first_failures = sum(one.attempt == 1 for one in failed)
    after = endpoint.after(
        delivered=len(results.settled) - len(failed),
        failed=len(failed),
        first_failures=first_failures,
        now=now,
    )
    tx.webhooks.keep(after, now)
    reason = endpoints.reason_to_disable(after, gone=results.gone, now=now)
    return endpoints.disable(tx, after, reason, now=now) if reason else after


def _only_types(endpoint: Endpoint) -> Sequence[str] | None:
    """The one type of event that a disabled endpoint still gets: that it was disabled. None if it is not."""
    return None if endpoint.disabled_reason is None else [DISABLED]


def _gathered(flying: Iterable[Future[Attempt | None]]) -> set[Future[Attempt | None]]:
    """Wait until an attempt ends; returns it, and those that end just after it."""
    flying = list(flying)
    wait(flying, return_when=FIRST_COMPLETED)
    return wait(flying, timeout=GATHERED_SECONDS).done


def _judge_all(batch: Batch, made: Sequence[tuple[Begun, Attempt]], now: datetime) -> Results:
    """What follows from attempts; each is logged at once."""
    verdicts = [_verdict(begun, attempt, batch.endpoint, now) for begun, attempt in made]
    settled = [_settled(*one, verdict, now) for one, verdict in zip(made, verdicts, strict=True)]
    for (begun, _), one in zip(made, settled, strict=True):
        log_attempt(begun, one)
    return Results(settled, any(verdict.gone for verdict in verdicts))


def _verdict(begun: Begun, attempt: Attempt, endpoint: Endpoint, now: datetime) -> Verdict:
    verdict = judge(begun.attempt, attempt, now, jitter=RANDOM.uniform(-1, 1))
    if verdict.status == "pending" and endpoint.disabled_reason is not None:
        return Verdict("failed")  # The event that it was disabled is tried once only.
    return verdict


def _settled(begun: Begun, attempt: Attempt, verdict: Verdict, now: datetime) -> Settled:
    return Settled(
        begun.id,
        begun.attempt,
        verdict.status,
        verdict.next_attempt_at,
        attempt.http_status,
        attempt.reason,
        attempt.duration_ms,
        None if verdict.status == "pending" else now,
    )


def log_attempt(begun: Begun, settled: Settled) -> None:
    """Count an attempt, and log it with the id of the request that caused the event."""
    metrics.ATTEMPTS.count(settled.error or "delivered")
    metrics.ATTEMPT_SECONDS.observe(settled.duration_ms / 1000)
    if settled.status != "pending":
        metrics.DELIVERIES.count(settled.status)
    log.info(
        "delivery",
        delivery_id=str(begun.id),
        event_id=str(begun.event_id),
        event_type=begun.event_type,
        request_id=begun.request_id,
        attempt=begun.attempt,
        status=settled.status,
        http_status=settled.http_status,
        error=settled.error,
        duration_ms=settled.duration_ms,
    )


def _release(tx: TenantTx, task: Task, endpoint: Endpoint, outcome: BatchOutcome, now: datetime) -> None:
    """Release an endpoint's task until more is due: into the slow queue, if it is failing or slow."""
    if outcome.rest:
        tx.deliveries.uncount(outcome.rest)
    if endpoint.url is None:
        # Some are left if one was being recorded while the URL was removed, or of more than one statement's.
        due_at = now if tx.deliveries.cancel(endpoints.CANCELLED, now) else None
    else:
        due_at = tx.deliveries.next_due(types=_only_types(endpoint))
    if due_at is None:
        tx.tasks.finish(task)
    else:
        is_failing = endpoint.failing_since is not None
        # Not in the past: an endpoint just served goes behind those that were not. And a failing one pauses:
        # if it refuses every connection, it would come round at once and be most of what the worker does.
        soonest = now + PAUSE if is_failing else now
        queue: Queue = "slow_webhooks" if is_failing or outcome.was_slow else "webhooks"
        tx.tasks.postpone(task, max(due_at, soonest), queue=queue)


# Tests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The result of a test."""

    url: str
    event_type: str
    attempt: Attempt


class Tester:
    """Sends one test event at once, for the developer of a receiver."""

    def __init__(self, store: Store, egress: Egress, clock: Clock, *, one_at_a_time: bool = True) -> None:
        self._store = store
        self._egress = egress
        self._clock = clock
        # Or one tenant's slow receiver could hold all threads. `limits.STANDARD` limits how many a minute.
        self._one_at_a_time = one_at_a_time
        # The tenants with a test in flight.
        self._busy: set[UUID] = set()
        self._lock = threading.Lock()

    @contextmanager
    def sent(
        self, tenant_id: UUID, actor: Actor, event_type: str, data: dict[str, object]
    ) -> Iterator[tuple[TenantTx, Report]]:
        """Send one event now, without retries; yields the transaction that stores the result.

        Raises `WebhookNotConfigured` and `RateLimited`.
        """
        with self._alone(tenant_id):
            url, secrets, event = self._begin(tenant_id, actor, event_type, data)
            begun = Begun(new_id(), event.id, event.type, 1, event.body, actor.request_id)
            with self._egress.to(url) as post:
                attempt = send(post, secrets, begun, self._clock())
            with self._store.tenant(tenant_id, actor) as tx:
                tx.deliveries.add(_tested(begun, event, attempt, self._clock()))
                yield tx, Report(url, event_type, attempt)

    @contextmanager
    def _alone(self, tenant_id: UUID) -> Iterator[None]:
        with self._lock:
            if self._one_at_a_time and tenant_id in self._busy:
                raise RateLimited("A test is on its way already.")
            self._busy.add(tenant_id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(tenant_id)

    def _begin(
        self, tenant_id: UUID, actor: Actor, event_type: str, data: dict[str, object]
    ) -> tuple[str, list[str], Event]:
        with self._store.tenant(tenant_id, actor, exclusive=True) as tx:
            now = self._clock()
            url = endpoints.require_url(tx.webhooks.find())
            secrets = tx.webhooks.signing_secrets(now)
            return url, secrets, tx.events.keep_test(event_type, data, now=now)


def _tested(begun: Begun, event: Event, attempt: Attempt, now: datetime) -> Delivery:
    return Delivery(
        id=begun.id,
        event_id=event.id,
        event_type=event.type,
        status="delivered" if attempt.is_success else "failed",
        attempts=1,
        next_attempt_at=None,
        http_status=attempt.http_status,
        error=attempt.reason,
        duration_ms=attempt.duration_ms,
        created_at=event.created_at,
        settled_at=now,
    )
