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
from billing.clock import Clock
from billing.errors import RateLimited
from billing.ids import new_id
from billing.settings import Settings
from billing.storage.store import Store, TenantTx
from billing.tasks import Queue, Task
from billing.webhooks import endpoints
from billing.webhooks.delivery import Attempt, Begun, Delivery, Settled, Verdict, judge
from billing.webhooks.egress import Egress, Post
from billing.webhooks.endpoints import DISABLED, Endpoint, UrlPolicy
from billing.webhooks.events import Event
from billing.webhooks.signing import signed_headers

# What a worker takes of an endpoint at once. The last is begun so early that the lease outlasts it.
BATCH = 64
BEGUN_WITHIN_SECONDS = 30
# How much of it is in flight: one at first, then twice as much each time it went well. However many endpoints
# die, each holds one thread and not many.
IN_FLIGHT = 16
# What ends about together is kept in one transaction.
GATHERED_SECONDS = 0.005
MOST_PROVEN = 10_000
# Above this a receiver would hold the threads of those that answer at once.
SLOW_MS = 2000
PAUSE = timedelta(seconds=4)

RANDOM = random.SystemRandom()

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.deliveries")


@dataclass(frozen=True)
class Batch:
    """What is to be sent to an endpoint now, and what signs it."""

    tenant_id: UUID
    endpoint: Endpoint
    url: str
    secrets: Sequence[str] = field(repr=False)
    begun: Sequence[Begun] = ()


@dataclass(frozen=True)
class Ended:
    """Attempts that ended about together: how each went, and whether the receiver wants no more."""

    settled: Sequence[Settled] = ()
    gone: bool = False

    @property
    def all_delivered(self) -> bool:
        return all(one.status == "delivered" for one in self.settled)


@dataclass(frozen=True)
class Sent:
    """What became of a batch: what ended last and is not kept yet, what was not begun after all, and how it went."""

    last: Ended = Ended()
    rest: Sequence[Begun] = ()
    was_slow: bool = False
    went_well: bool = False


class Dispatcher:
    """Sends events to tenants' endpoints, each endpoint by one worker at a time, which the task's lease sees to."""

    def __init__(self, store: Store, egress: Egress, clock: Clock, *, threads: int) -> None:
        self._store = store
        self._egress = egress
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="delivery")
        self._stopping = threading.Event()
        # Endpoints whose last batch went well.
        self._proven: set[UUID] = set()

    def stop(self) -> None:
        """Begin nothing more; what is in flight is settled, and the rest goes back."""
        self._stopping.set()

    def deliver(self, task: Task) -> None:
        """Send what is due to one tenant's endpoint, and say when there will be more."""
        batch = self._begin(task.tenant_id)
        sent = self._send(batch) if batch.begun else Sent()
        with self._store.tenant(task.tenant_id) as tx:
            now = self._clock()
            endpoint = _keep(tx, batch, sent.last, now)
            _let_go(tx, task, endpoint, sent, now)
        if batch.begun:
            self._remember(task.tenant_id, went_well=sent.went_well and endpoint.url == batch.url)

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

    def _send(self, batch: Batch) -> Sent:
        """Send a batch and settle all but what ended last, until that is no use any more or we are to stop."""
        with self._egress.to(batch.url) as post:
            return self._send_by(post, batch)

    def _send_by(self, post: Post, batch: Batch) -> Sent:
        waiting, flying = deque(batch.begun), dict[Future[Attempt | None], Begun]()
        window, until = self._first_window(batch.tenant_id), time.monotonic() + BEGUN_WITHIN_SECONDS
        durations: list[int] = []
        last = Ended()  # Of what has ended, that which is not yet kept.
        while flying or (waiting and window):
            # Kept before more is begun, which is not to go where the endpoint no longer is.
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
        return Sent(last, list(waiting), _is_slow(durations), went_well=window > 0)

    def _submit(self, post: Post, batch: Batch, begun: Begun, until: float) -> Future[Attempt | None]:
        # In the context of the task: what the attempt logs, and its span, belong to that.
        return self._pool.submit(copy_context().run, self._attempt, post, batch, begun, until)

    def _first_window(self, tenant_id: UUID) -> int:
        return IN_FLIGHT if tenant_id in self._proven else 1

    def _remember(self, tenant_id: UUID, *, went_well: bool) -> None:
        if not went_well:
            self._proven.discard(tenant_id)
        elif len(self._proven) < MOST_PROVEN:
            self._proven.add(tenant_id)

    def _attempt(self, post: Post, batch: Batch, begun: Begun, until: float) -> Attempt | None:
        # None says that no more is to be sent. All threads may have been busy for a while; what begins now must end
        # before the lease does.
        if self._stopping.is_set() or time.monotonic() > until:
            return None
        return send(post, batch.secrets, begun, self._clock())

    def _settle(self, batch: Batch, ended: Ended) -> bool:
        """Keep how attempts went; whether what is left is still to go to the same place."""
        with self._store.tenant(batch.tenant_id) as tx:
            return _keep(tx, batch, ended, self._clock()).url == batch.url


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


def _keep(tx: TenantTx, batch: Batch, ended: Ended, now: datetime) -> Endpoint:
    """Keep how attempts went, for them and for the endpoint, which is locked from now on; returns it as it is then."""
    # The endpoint before its deliveries, as whoever removes it: or the two deadlock.
    endpoint = tx.webhooks.find(lock=True)
    if not ended.settled:
        return endpoint
    # What was sent is not for what is configured now, nor is the rest for what was.
    if endpoint.url == batch.url and endpoint.is_active:
        endpoint = _note(tx, endpoint, ended, now)
    tx.deliveries.settle(ended.settled)
    return endpoint


def _note(tx: TenantTx, endpoint: Endpoint, ended: Ended, now: datetime) -> Endpoint:
    """Keep how the endpoint does, and give it up if that is due."""
    if ended.all_delivered and endpoint.failing_since is None:
        return endpoint
    failed = [one for one in ended.settled if one.status != "delivered"]
    first_failures = sum(one.attempt == 1 for one in failed)
    after = endpoint.after(
        delivered=len(ended.settled) - len(failed), failed=len(failed), first_failures=first_failures, now=now
    )
    tx.webhooks.keep(after, now)
    reason = endpoints.reason_to_disable(after, gone=ended.gone, now=now)
    return endpoints.disable(tx, after, reason, now=now) if reason else after


def _only_types(endpoint: Endpoint) -> Sequence[str] | None:
    """The one type of event that a disabled endpoint still gets: the news of that. None where it is not disabled."""
    return None if endpoint.disabled_reason is None else [DISABLED]


def _gathered(flying: Iterable[Future[Attempt | None]]) -> set[Future[Attempt | None]]:
    """What has ended, once something has: and what ends just after it."""
    flying = list(flying)
    wait(flying, return_when=FIRST_COMPLETED)
    return wait(flying, timeout=GATHERED_SECONDS).done


def _judge_all(batch: Batch, made: Sequence[tuple[Begun, Attempt]], now: datetime) -> Ended:
    """What follows from attempts, which is told at once."""
    verdicts = [_verdict(begun, attempt, batch.endpoint, now) for begun, attempt in made]
    settled = [_settled(*one, verdict, now) for one, verdict in zip(made, verdicts, strict=True)]
    for (begun, _), one in zip(made, settled, strict=True):
        log_attempt(begun, one)
    return Ended(settled, any(verdict.gone for verdict in verdicts))


def _verdict(begun: Begun, attempt: Attempt, endpoint: Endpoint, now: datetime) -> Verdict:
    verdict = judge(begun.attempt, attempt, now, jitter=RANDOM.uniform(-1, 1))
    if verdict.status == "pending" and endpoint.disabled_reason is not None:
        return Verdict("failed")  # The news that it is disabled: tried once, and then there is silence.
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
    """Count an attempt, and log it with the request that the event came of."""
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


def _let_go(tx: TenantTx, task: Task, endpoint: Endpoint, sent: Sent, now: datetime) -> None:
    """Let go of an endpoint until its next attempt is due. One that fails or takes long waits in a queue of such."""
    if sent.rest:
        tx.deliveries.give_back(sent.rest)
    if endpoint.url is None:
        # An event that was being recorded while the URL was removed, or more than one statement gives up.
        due_at = now if tx.deliveries.cancel(endpoints.CANCELLED, now) else None
    else:
        due_at = tx.deliveries.next_due(types=_only_types(endpoint))
    if due_at is None:
        tx.tasks.finish(task)
    else:
        is_failing = endpoint.failing_since is not None
        # Not in the past: who was served goes behind those who were not. One that refuses every connection
        # would come round again at once, and be most of what the worker does.
        soonest = now + PAUSE if is_failing else now
        queue: Queue = "slow_webhooks" if is_failing or sent.was_slow else "webhooks"
        tx.tasks.postpone(task, max(due_at, soonest), queue=queue)


# Tests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What came of a test."""

    url: str
    event_type: str
    attempt: Attempt


class Tester:
    """Sends one event at once, for whoever builds a receiver."""

    def __init__(self, store: Store, egress: Egress, clock: Clock, *, one_at_a_time: bool = True) -> None:
        self._store = store
        self._egress = egress
        self._clock = clock
        # Or one tenant's slow receiver would be everybody's wait. How many a minute is `limits.Policies`' part.
        self._one_at_a_time = one_at_a_time
        # Whose test is in flight.
        self._busy: set[UUID] = set()
        self._lock = threading.Lock()

    @contextmanager
    def sent(
        self, tenant_id: UUID, event_type: str, data: dict[str, object]
    ) -> Iterator[tuple[TenantTx, Report]]:
        """Send one event now, and never again; the transaction is the one that keeps what came of it.

        Raises `WebhookNotConfigured` and `RateLimited`.
        """
        with self._alone(tenant_id):
            url, secrets, event = self._begin(tenant_id, event_type, data)
            begun = Begun(new_id(), event.id, event.type, 1, event.body)
            with self._egress.to(url) as post:
                attempt = send(post, secrets, begun, self._clock())
            with self._store.tenant(tenant_id) as tx:
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
        self, tenant_id: UUID, event_type: str, data: dict[str, object]
    ) -> tuple[str, list[str], Event]:
        with self._store.tenant(tenant_id, exclusive=True) as tx:
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


def policy_for(settings: Settings) -> UrlPolicy:
    """Which URLs this installation calls."""
    return UrlPolicy(
        allow_http=settings.webhook_allow_http, allow_localhost=bool(settings.webhook_allow_cidrs)
    )


def egress_for(settings: Settings, *, lookups: int = 16) -> Egress:
    """The way out as this installation's settings open it; so many names can be looked up at once."""
    return Egress(policy_for(settings), settings.webhook_allow_cidrs, lookups=lookups)


def dispatcher_for(settings: Settings, store: Store, clock: Clock, *, threads: int) -> Dispatcher:
    """Deliveries as this installation's settings allow them, so many at once."""
    # A lookup that hangs outlasts the attempt that gave up on it; names that do not hang must still find a thread.
    return Dispatcher(store, egress_for(settings, lookups=3 * threads), clock, threads=threads)


def tester_for(settings: Settings, store: Store, clock: Clock) -> Tester:
    """Tests as this installation's settings allow them."""
    return Tester(store, egress_for(settings), clock, one_at_a_time=settings.rate_limits)
