"""Deliveries: what an endpoint is sent, when it is retried or given up, and how much is sent at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, Select, Table, literal_column, select, text, true
from standardwebhooks import Webhook, WebhookVerificationError

from billing import deliveries as module
from billing import tenants
from billing.deliveries import BATCH, IN_FLIGHT, PAUSE, Dispatcher
from billing.errors import DatabaseUnavailable
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.shelf import BATCH_ROWS
from billing.storage.store import Store, TenantTx
from billing.storage.tables import deliveries, events, tasks, webhook_endpoints
from billing.tasks import LEASE, Queue, Task
from billing.webhooks import endpoints, replay
from billing.webhooks.delivery import DELIVER, JITTER, RETRY_DELAYS, Begun, Settled
from billing.webhooks.egress import Egress
from billing.webhooks.endpoints import DISABLED, TOO_LONG, TOO_MANY, Endpoint, UrlPolicy
from tests.clock import TurnedClock
from tests.conftest import waits_for_a_lock
from tests.receivers import Received, Receiver, Visit, head, receiving

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
DEVELOPMENT = UrlPolicy(allow_http=True, allow_localhost=True)
TEST, REVOKED = "webhook.test", "api_key.revoked"
DAY = timedelta(days=1)
# Ample, for a busy machine; what is waited for comes sooner.
PATIENCE_SECONDS = 10
# How long to watch for what must not happen, or only later.
MOMENT_SECONDS = 0.15


# A tenant, its worker, its receiver --------------------------------------------------------------


class Answering:
    """A receiver that answers every request with `status`, which a test may change."""

    def __init__(self, status: int = 200, **headers: str) -> None:
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def __call__(self, visit: Visit) -> None:
        while visit.receive():
            visit.send(head(self.status, {"Content-Length": "0", **self.headers}))


class Gate(Answering):
    """A receiver that holds requests until they are released, and counts those held."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(status)
        self.inside = 0
        self.most_inside = 0
        self._permits = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, visit: Visit) -> None:
        visit.receive()
        self._count(1)
        while not self._permits.acquire(timeout=0.05):
            if visit.receiver.stopped.is_set():
                return
        self._count(-1)
        visit.send(head(self.status, {"Content-Length": "0", "Connection": "close"}))

    def _count(self, more: int) -> None:
        with self._lock:
            self.inside += more
            self.most_inside = max(self.most_inside, self.inside)

    def release(self, number: int = 1) -> None:
        self._permits.release(number)


def url_of(receiver: Receiver) -> str:
    """The receiver by the one name that development permits: no webhook URL may have an address for its host."""
    return f"http://localhost:{receiver.port}/in"


def types_of(receiver: Receiver) -> list[str]:
    return [json.loads(received.body)["type"] for received in receiver.received]


def ids_of(receiver: Receiver) -> list[str]:
    return [received.headers["webhook-id"] for received in receiver.received]


@dataclass
class Bench:
    """A tenant with an endpoint, and a worker that delivers on demand."""

    store: Store
    clock: TurnedClock
    tenant_id: UUID
    secret: str
    deliveries: Dispatcher

    def all(self, query: Select[Any]) -> Sequence[Any]:
        """What is really stored, as rows."""
        with self.tx() as tx:
            return tx.deliveries._connection.execute(query).all()

    @contextmanager
    def tx(self) -> Iterator[TenantTx]:
        with self.store.tenant(self.tenant_id) as tx:
            yield tx

    # What the tenant does.

    def configure(self, url: str, event_types: Sequence[str] | None = None, **more: Any) -> str:
        """The new secret, if one was asked for."""
        given = {"regenerate_secret": False, "grace": DAY, **more}
        with self.store.tenant(self.tenant_id, exclusive=True) as tx:
            made = endpoints.configure(tx, url=url, event_types=event_types, now=self.clock(), **given)
        return made.new_secret or ""

    def remove(self) -> None:
        with self.store.tenant(self.tenant_id, exclusive=True) as tx:
            endpoints.remove(tx, now=self.clock())

    def record(self, number: int = 1, type: str = TEST) -> None:
        for _ in range(number):
            with self.tx() as tx:
                tx.events.record(type, {}, now=self.clock())

    # What the worker does.

    def take(self, queue: Queue = "webhooks") -> list[Task]:
        return [task for task in self.store.take_due(queue, self.clock(), most=100) if task.kind == DELIVER]

    def deliver(self) -> list[Queue]:
        """Run the due tasks of both queues once; returns the queue of each."""
        due = [*self.take("webhooks"), *self.take("slow_webhooks")]
        for task in due:
            self.deliveries.deliver(task)
        return [task.queue for task in due]

    def deliver_all(self) -> None:
        """Run due tasks until there are none."""
        for _ in range(3 * BATCH):
            if not self.deliver():
                return
        raise AssertionError("It never ends.")

    # What is kept.

    def rows(self) -> list[Any]:
        return list(self.all(select(deliveries).order_by(deliveries.c.id)))

    def statuses(self) -> list[tuple[str, int]]:
        return [(row.status, row.attempts) for row in self.rows()]

    def endpoint(self) -> Endpoint:
        with self.tx() as tx:
            return tx.webhooks.find()

    def waiting(self) -> list[tuple[Queue, datetime]]:
        """The queue in which the endpoint waits, and until when; empty if it does not wait."""
        ours = select(tasks.c.queue, tasks.c.due_at).where(tasks.c.kind == DELIVER)
        return [tuple(row) for row in self.all(ours)]

    def writer_of(self, table: Table) -> str:
        """The transaction that wrote the table's only row; of tasks, the one that delivers."""
        is_ours = table.c.kind == DELIVER if table is tasks else true()
        [row] = self.all(select(literal_column("xmin::text")).select_from(table).where(is_ours))
        return str(row[0])

    def sequences(self) -> list[int]:
        return [row.sequence for row in self.all(select(events.c.sequence).order_by(events.c.sequence))]


@pytest.fixture
def bench(store: Store, settings: Settings) -> Bench:
    clock = TurnedClock()
    with store.tenant(new_id()) as tx:
        details = {"company_name": "Acme", "email": "ada@acme.example"}
        digests = KeyDigests(settings.key_peppers)
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=clock())
    return Bench(store, clock, made.tenant.id, made.webhook_secret, sender(store, clock))


def sender(store: Store, clock: TurnedClock, total_seconds: float = PATIENCE_SECONDS) -> Dispatcher:
    egress = Egress(DEVELOPMENT, LOOPBACK, total_seconds=total_seconds)
    return Dispatcher(store, egress, clock, threads=2 * IN_FLIGHT)


@contextmanager
def in_thread(do: Callable[[], object]) -> Iterator[Future[object]]:
    """Run it in a thread, and require its success when the block ends."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        yield future
        future.result(PATIENCE_SECONDS)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "It never came about."
        time.sleep(0.005)


# Delivered ---------------------------------------------------------------------------------------


def test_an_event_is_sent_signed_and_as_stored(bench: Bench) -> None:
    with receiving(Answering(204)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        assert bench.deliver() == ["webhooks"]

    [event] = bench.all(select(events).where(events.c.type == TEST))
    assert (receiver.last.method, receiver.last.path) == ("POST", "/in")
    assert receiver.last.body == bytes(event.body)
    assert receiver.last.headers["webhook-id"] == str(event.id)
    assert receiver.last.headers["content-type"] == "application/json"
    assert Webhook(bench.secret).verify(receiver.last.body, dict(receiver.last.headers))["sequence"] == 2
    [row] = bench.rows()
    assert (row.status, row.attempts, row.http_status, row.error) == ("delivered", 1, 204, None)
    assert row.next_attempt_at is None
    assert row.settled_at == bench.clock()
    assert row.duration_ms >= 0
    assert bench.waiting() == []


def test_a_tenant_without_a_url_has_events_and_no_deliveries(bench: Bench) -> None:
    bench.record(2)

    assert bench.deliver() == []
    assert bench.rows() == []
    assert bench.sequences() == [1, 2, 3]


def test_events_from_before_the_url_was_configured_are_not_sent(bench: Bench) -> None:
    bench.record(2)
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.deliver_all()
        bench.record()
        bench.deliver_all()

    assert [json.loads(received.body)["sequence"] for received in receiver.received] == [4]


def test_more_events_than_a_batch_are_each_sent_once(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        with bench.tx() as tx:
            for _ in range(BATCH + 1):
                tx.events.record(TEST, {}, now=bench.clock())
        assert bench.deliver() == ["webhooks"]
        assert len(receiver.received) == BATCH
        bench.deliver_all()

    assert len(set(ids_of(receiver))) == len(receiver.received) == BATCH + 1
    assert set(bench.statuses()) == {("delivered", 1)}
    assert bench.waiting() == []


def test_a_batch_reuses_connections_and_leaves_none_for_another_tenant(
    bench: Bench, settings: Settings
) -> None:
    with bench.store.tenant(new_id()) as tx:
        details = {"company_name": "Globex", "email": "ada@globex.example"}
        digests = KeyDigests(settings.key_peppers)
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=bench.clock())
    with receiving(Answering()) as receiver:
        for tenant_id in (bench.tenant_id, made.tenant.id):
            ours = replace(bench, tenant_id=tenant_id)
            ours.configure(url_of(receiver))
            ours.record(BATCH)
            used = receiver.connections
            assert bench.deliver() == ["webhooks"]
            assert 0 < receiver.connections - used <= IN_FLIGHT
            for _ in range(receiver.connections - used):
                assert receiver.ended.acquire(timeout=PATIENCE_SECONDS)
    assert len(receiver.received) == 2 * BATCH


def test_each_tenants_events_go_to_its_own_endpoint(bench: Bench, store: Store, settings: Settings) -> None:
    with store.tenant(new_id()) as tx:
        details = {"company_name": "Globex", "email": "ada@globex.example"}
        digests = KeyDigests(settings.key_peppers)
        made = tenants.register(tx, details, password_hash="-", digests=digests, now=bench.clock())
    globex = replace(bench, tenant_id=made.tenant.id)
    with receiving(Answering()) as ours, receiving(Answering(500)) as theirs:
        bench.configure(url_of(ours))
        globex.configure(url_of(theirs))
        bench.record(type=REVOKED)
        globex.record(type=TEST)
        assert bench.deliver() == ["webhooks", "webhooks"]

    assert (types_of(ours), types_of(theirs)) == ([REVOKED], [TEST])
    assert bench.endpoint().failing_since is None
    assert globex.endpoint().failing_since is not None


# Retried -----------------------------------------------------------------------------------------


def test_a_failing_delivery_is_retried_on_schedule_and_finally_given_up(bench: Bench) -> None:
    with receiving(Answering(500)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        for attempt in range(1, len(RETRY_DELAYS)):
            bench.deliver_all()
            [row] = bench.rows()
            assert (row.status, row.attempts, row.http_status) == ("pending", attempt, 500)
            assert (row.error, row.settled_at) == ("bad_status", None)
            wait = row.next_attempt_at - bench.clock()
            assert abs(wait / RETRY_DELAYS[attempt] - 1) <= JITTER + 0.001
            assert bench.waiting() == [("slow_webhooks", row.next_attempt_at)]
            bench.clock.now = row.next_attempt_at - timedelta(milliseconds=1)
            assert bench.deliver() == []
            bench.clock.now = row.next_attempt_at
        bench.deliver_all()
        bench.clock.turn(days=30)
        assert bench.deliver() == []

    [row] = bench.rows()
    assert (row.status, row.attempts, row.next_attempt_at) == ("failed", len(RETRY_DELAYS), None)
    assert row.settled_at is not None
    assert bench.waiting() == []
    assert len(receiver.received) == len(RETRY_DELAYS)


def test_every_attempt_has_the_same_id_and_body_and_a_new_signature(bench: Bench) -> None:
    with receiving(Answering(503)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        for _ in range(3):
            bench.deliver_all()
            bench.clock.now = bench.rows()[0].next_attempt_at

    assert len({received.body for received in receiver.received}) == 1
    assert len(set(ids_of(receiver))) == 1
    assert len({received.headers["webhook-timestamp"] for received in receiver.received}) == 3
    for received in receiver.received:
        assert signature(bench.secret, received) == received.headers["webhook-signature"]


def signature(secret: str, received: Received) -> str:
    """The library's signature, at the attempt's own time: the test's clock is not the library's."""
    at = datetime.fromtimestamp(int(received.headers["webhook-timestamp"]), tz=None).astimezone()
    return Webhook(secret).sign(received.headers["webhook-id"], at, received.body.decode())


@pytest.mark.parametrize("status", [301, 302, 307, 400, 404, 500])
def test_any_status_but_2xx_is_a_failure_and_redirects_are_not_followed(bench: Bench, status: int) -> None:
    with receiving(Answering()) as elsewhere, receiving(Answering(status, Location=url_of(elsewhere))) as to:
        bench.configure(url_of(to))
        bench.record()
        bench.deliver()

    assert elsewhere.received == []
    [row] = bench.rows()
    assert (row.status, row.http_status, row.error) == ("pending", status, "bad_status")


def test_a_later_success_ends_the_delivery_and_clears_the_failure(bench: Bench) -> None:
    answering = Answering(500)
    with receiving(answering) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()
        assert bench.endpoint().failing_since == bench.clock()
        answering.status = 200
        bench.clock.turn(seconds=7)
        bench.deliver()

    [row] = bench.rows()
    assert (row.status, row.attempts, row.http_status, row.error) == ("delivered", 2, 200, None)
    assert (bench.endpoint().failing_since, bench.endpoint().failed_events) == (None, 0)


def test_a_timeout_is_retried_after_60_seconds(bench: Bench) -> None:
    bench.deliveries = sender(bench.store, bench.clock, total_seconds=0.3)
    with receiving(Gate()) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()
        receiver.stopped.set()

    [row] = bench.rows()
    assert (row.status, row.http_status, row.error) == ("pending", None, "timeout")
    assert row.next_attempt_at == bench.clock() + timedelta(seconds=60)


def test_the_retry_delay_has_jitter(bench: Bench) -> None:
    with receiving(Answering(500)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()
    [row] = bench.rows()
    assert row.next_attempt_at - bench.clock() not in RETRY_DELAYS


def test_retry_after_is_honoured(bench: Bench) -> None:
    with receiving(Answering(503, Retry_After="9")) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()

    assert bench.rows()[0].next_attempt_at == bench.clock() + timedelta(seconds=9)


def test_a_closed_port_is_connection_failed(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        pass
    bench.configure(url_of(receiver))
    bench.record()
    bench.deliver()

    [row] = bench.rows()
    assert (row.status, row.http_status, row.error) == ("pending", None, "connection_failed")


@pytest.mark.parametrize("status", [600, 999])
def test_a_status_above_599_is_connection_broken(bench: Bench, status: int) -> None:
    with receiving(Answering(status)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()

    [row] = bench.rows()
    assert (row.status, row.http_status, row.error) == ("pending", None, "connection_broken")


# Failing endpoints -------------------------------------------------------------------------------


def test_the_first_failure_leaves_the_rest_untried(bench: Bench) -> None:
    with receiving(Answering(500)) as receiver:
        bench.configure(url_of(receiver))
        bench.record(5)
        bench.deliver()

    assert len(receiver.received) == 1
    assert sorted(bench.statuses()) == [("pending", 0)] * 4 + [("pending", 1)]


def test_a_failing_endpoint_stays_in_the_slow_queue_until_it_succeeds(bench: Bench) -> None:
    answering = Answering(500)
    with receiving(answering) as receiver:
        bench.configure(url_of(receiver))
        bench.record(2)
        assert bench.deliver() == ["webhooks"]
        assert bench.deliver() == []
        bench.clock.now += PAUSE
        assert bench.deliver() == ["slow_webhooks"]
        # A new event does not move it back.
        bench.record()
        assert bench.deliver() == ["slow_webhooks"]
        answering.status = 200
        bench.clock.turn(seconds=5 * 1.2)
        assert bench.deliver() == ["slow_webhooks"]
        assert set(bench.statuses()) == {("delivered", 2)}
        bench.record()
        assert bench.deliver() == ["webhooks"]


def test_a_slow_endpoint_moves_to_the_slow_queue_and_gets_one_event_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW_MS", -1)  # Every answer takes longer.
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        for number in (1, 2):
            bench.deliver()
            assert len(receiver.received) == number
            assert [queue for queue, _ in bench.waiting()] == ["slow_webhooks"]
        bench.deliver_all()
    assert bench.statuses() == [("delivered", 1)] * 3


def test_a_success_after_a_failure_in_the_same_batch_clears_it(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            gate.release()
            eventually(lambda: gate.inside == 2)
            gate.status = 500
            gate.release()
            eventually(lambda: bench.endpoint().failing_since is not None)
            gate.status = 200
            gate.release()

    assert sorted(bench.statuses()) == [("delivered", 1), ("delivered", 1), ("pending", 1)]
    assert (bench.endpoint().failing_since, bench.endpoint().failed_events) == (None, 0)
    assert [queue for queue, _ in bench.waiting()] == ["webhooks"]


def test_410_disables_the_endpoint_and_webhook_disabled_is_sent_once(bench: Bench) -> None:
    with receiving(Answering(410)) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        bench.deliver_all()

        assert bench.endpoint().disabled_reason == "gone"
        assert types_of(receiver) == [TEST, DISABLED]
        news = json.loads(receiver.last.body)
        assert news["data"] == {
            "webhook_url": url_of(receiver),
            "disabled_reason": "gone",
            "failing_since": None,
        }
        # After that nothing is sent: pending deliveries are kept, new events have none.
        assert sorted(bench.statuses()) == [("failed", 1), ("failed", 1), ("pending", 0), ("pending", 0)]
        bench.record()
        bench.clock.turn(days=30)
        bench.deliver_all()

    assert len(receiver.received) == 2
    assert len(bench.rows()) == 4
    assert bench.sequences() == [1, 2, 3, 4, 5, 6]


def test_410_while_others_are_in_flight_disables_once(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record(8)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            gate.release()
            eventually(lambda: gate.inside == 2)
            gate.status = 410
            gate.release(2)
        gate.release(BATCH)
        bench.deliver_all()

    assert types_of(receiver) == [TEST] * 3 + [DISABLED]
    assert sorted(bench.statuses()) == [("delivered", 1)] + [("failed", 1)] * 3 + [("pending", 0)] * 5


@pytest.mark.parametrize(
    ("number", "age", "reason"),
    [
        (TOO_MANY, TOO_LONG, "failing"),
        (TOO_MANY, TOO_LONG - timedelta(seconds=1), None),
        (TOO_MANY - 1, TOO_LONG, None),
    ],
)
def test_failing_for_five_days_and_ten_events_disables_the_endpoint(
    bench: Bench, number: int, age: timedelta, reason: str | None
) -> None:
    answering = Answering(500)
    with receiving(answering) as receiver:
        bench.configure(url_of(receiver))
        bench.record(number)
        since = bench.clock()
        for _ in range(number):
            bench.deliver()
            bench.clock.now += PAUSE
        assert (bench.endpoint().failing_since, bench.endpoint().failed_events) == (since, number)
        tried = len(receiver.received)
        bench.clock.now = since + age
        bench.deliver()
        assert bench.endpoint().disabled_reason == reason
        answering.status = 200
        bench.clock.now += PAUSE
        bench.deliver_all()

    if reason is None:
        assert DISABLED not in types_of(receiver)
        assert bench.endpoint().failing_since is None
    else:
        assert types_of(receiver)[tried:] == [TEST, DISABLED]
        news = json.loads(receiver.last.body)["data"]
        assert news["disabled_reason"] == "failing"
        assert datetime.fromisoformat(news["failing_since"]) == since
        assert bench.statuses()[-1] == ("delivered", 1)
        assert [status for status, _ in bench.statuses()[:-1]] == ["pending"] * number


def test_webhook_disabled_bypasses_the_filter_and_is_tried_once(bench: Bench) -> None:
    answering = Answering(410)
    with receiving(answering) as receiver:
        bench.configure(url_of(receiver), [TEST])
        bench.record()
        bench.deliver()
        answering.status = 500
        bench.deliver_all()
        bench.clock.turn(days=1)
        bench.deliver_all()

    assert types_of(receiver) == [TEST, DISABLED]
    assert bench.statuses() == [("failed", 1), ("failed", 1)]


def test_reconfiguring_a_disabled_endpoint_sends_pending_and_new_events(bench: Bench) -> None:
    answering = Answering(410)
    with receiving(answering) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        bench.deliver_all()
        bench.record(type=REVOKED)  # Has no delivery.
        answering.status = 200
        bench.configure(url_of(receiver))
        assert bench.endpoint() == Endpoint(url_of(receiver))
        bench.record()
        bench.deliver_all()

    assert types_of(receiver) == [TEST, DISABLED, TEST, TEST, TEST]
    assert sorted(bench.statuses()) == [("delivered", 1)] * 3 + [("failed", 1)] * 2


# Changes during delivery -------------------------------------------------------------------------


def test_the_event_filter_is_applied_when_sending(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(type=REVOKED)
        bench.record(type=TEST)
        bench.configure(url_of(receiver), [TEST])
        bench.record(type=REVOKED)
        bench.deliver_all()
        assert types_of(receiver) == [TEST]
        bench.configure(url_of(receiver), [])
        bench.record(type=REVOKED)
        bench.deliver_all()

    assert types_of(receiver) == [TEST, REVOKED]
    assert bench.statuses() == [("delivered", 1)] * 2
    assert bench.sequences() == [1, 2, 3, 4, 5]


def test_unsubscribed_events_are_not_sent_however_many_are_due(bench: Bench, superuser: Engine) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        others = ", ".join(column.name for column in deliveries.columns if column.name != "id")
        many = f"SELECT gen_random_uuid(), {others} FROM deliveries, generate_series(1, :many)"
        with superuser.begin() as connection:
            connection.execute(text(f"INSERT INTO deliveries (id, {others}) {many}"), {"many": BATCH_ROWS})
        bench.configure(url_of(receiver), [REVOKED])
        bench.record(type=REVOKED)
        bench.deliver_all()

    assert types_of(receiver) == [REVOKED]
    assert bench.statuses() == [("delivered", 1)]


def test_a_batch_goes_to_the_url_configured_while_it_begins(bench: Bench, superuser: Engine) -> None:
    with receiving(Answering()) as old, receiving(Answering()) as new, ThreadPoolExecutor(1) as pool:
        bench.configure(url_of(old))
        bench.record()
        [task] = bench.take()
        with bench.tx() as tx:
            given = {"event_types": None, "regenerate_secret": False, "grace": DAY, "now": bench.clock()}
            endpoints.configure(tx, url=url_of(new), **given)
            delivering = pool.submit(bench.deliveries.deliver, task)
            eventually(lambda: waits_for_a_lock(superuser))
        delivering.result(PATIENCE_SECONDS)
    assert (len(old.received), len(new.received)) == (0, 1)


def test_configuring_the_same_url_while_it_is_disabled_re_enables_it(bench: Bench, superuser: Engine) -> None:
    url = "https://hooks.acme.example/"
    bench.configure(url)
    with ThreadPoolExecutor(1) as pool:
        with bench.tx() as tx:
            endpoints.disable(tx, tx.webhooks.find(lock=True), "gone", now=bench.clock())
            configuring = pool.submit(bench.configure, url)
            eventually(lambda: configuring.done() or waits_for_a_lock(superuser))
        configuring.result(PATIENCE_SECONDS)
    assert bench.endpoint() == Endpoint(url)


def test_removing_the_endpoint_cancels_due_deliveries(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(2)
        bench.remove()
        bench.deliver_all()

    assert receiver.received == []
    assert [(row.status, row.error) for row in bench.rows()] == [("failed", "cancelled")] * 2
    assert bench.waiting() == []


@pytest.mark.parametrize("status", [200, 500])
def test_deliveries_in_flight_when_the_endpoint_is_removed_stay_cancelled(bench: Bench, status: int) -> None:
    gate = Gate(status)
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            bench.remove()
            gate.release(3)

    assert [(row.status, row.error) for row in bench.rows()] == [("failed", "cancelled")] * 3
    assert bench.endpoint() == Endpoint(None)
    bench.deliver_all()
    assert bench.waiting() == []


@pytest.mark.parametrize("status", [500, 410])
def test_a_failure_at_the_old_url_does_not_count_against_the_new_one(bench: Bench, status: int) -> None:
    gate = Gate(status)
    with receiving(gate) as old, receiving(Answering()) as new:
        bench.configure(url_of(old))
        bench.record(2)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            bench.configure(url_of(new))
            gate.release()
        assert bench.endpoint() == Endpoint(url_of(new))
        bench.clock.turn(seconds=7)
        bench.deliver_all()

    assert len(old.received) == 1
    assert len(new.received) == (2 if status == 500 else 1)
    assert DISABLED not in types_of(new)


def test_both_secrets_sign_during_the_grace_period_the_new_one_first(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        new = bench.configure(url_of(receiver), regenerate_secret=True, grace=timedelta(hours=1))
        bench.record()
        bench.deliver()
        for secret in (bench.secret, new):
            assert Webhook(secret).verify(receiver.last.body, dict(receiver.last.headers))
        signatures = [signature(secret, receiver.last) for secret in (new, bench.secret)]
        assert receiver.last.headers["webhook-signature"] == " ".join(signatures)

        bench.clock.turn(hours=1)
        bench.record()
        bench.deliver()
        assert receiver.last.headers["webhook-signature"] == signature(new, receiver.last)


def test_without_a_grace_period_the_old_secret_stops_signing(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        new = bench.configure(url_of(receiver), regenerate_secret=True, grace=timedelta())
        bench.record()
        bench.deliver()

    headers = dict(receiver.last.headers)
    assert Webhook(new).verify(receiver.last.body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(bench.secret).verify(receiver.last.body, headers)


# One worker per endpoint -------------------------------------------------------------------------


def test_only_one_worker_at_a_time_delivers_to_an_endpoint(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            bench.record()
            assert bench.deliver() == []
            gate.release(2)
        bench.deliver_all()

    assert len(set(ids_of(receiver))) == len(receiver.received) == 2


def test_an_event_recorded_while_a_batch_is_in_flight_is_sent_next(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            bench.record(type=REVOKED)
            gate.release(2)
        assert bench.deliver() == ["webhooks"]

    assert types_of(receiver) == [TEST, REVOKED]


def test_an_event_committed_while_the_task_finishes_is_sent_next(bench: Bench, superuser: Engine) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        [task] = bench.take()
        with ThreadPoolExecutor(1) as pool:
            with bench.tx() as tx:
                tx.events.record(REVOKED, {}, now=bench.clock())
                tx.webhooks.find()  # Any query flushes what was written: the task's row is locked.
                delivering = pool.submit(bench.deliveries.deliver, task)
                eventually(lambda: waits_for_a_lock(superuser))
            delivering.result(PATIENCE_SECONDS)
        assert bench.deliver() == ["webhooks"]

    assert types_of(receiver) == [TEST, REVOKED]
    assert bench.waiting() == []


def test_a_dead_workers_deliveries_are_retried_when_its_lease_expires(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        [task] = bench.take()
        bench.deliveries._begin(task.tenant_id)  # The worker dies here.
        assert bench.deliver() == []
        bench.clock.now += LEASE
        assert bench.deliver() == ["webhooks"]

    assert bench.statuses() == [("delivered", 2)]
    assert len(receiver.received) == 1


def test_the_last_result_is_stored_in_the_transaction_that_releases_the_task(bench: Bench) -> None:
    with receiving(Answering(500)) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        bench.deliver()

    assert len({bench.writer_of(table) for table in (deliveries, webhook_endpoints, tasks)}) == 1


def test_failing_to_release_the_task_loses_only_the_last_result(bench: Bench, superuser: Engine) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(2)
        [task] = bench.take()
        with superuser.begin() as somebody, pytest.raises(DatabaseUnavailable):
            somebody.execute(select(tasks.c.id).where(tasks.c.id == task.id).with_for_update())
            bench.deliveries.deliver(task)
        assert bench.statuses() == [("delivered", 1), ("pending", 1)]
        bench.clock.now += LEASE
        assert bench.deliver() == ["webhooks"]

    assert bench.statuses() == [("delivered", 1), ("delivered", 2)]
    assert ids_of(receiver)[1] == ids_of(receiver)[2]


# How much at a time ------------------------------------------------------------------------------


def test_a_new_endpoints_window_starts_at_one_and_doubles_up_to_the_limit(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3 * IN_FLIGHT)
        with in_thread(bench.deliver):
            for released, window in enumerate((1, 2, 4, 8, IN_FLIGHT, IN_FLIGHT)):
                begun = released + window
                eventually(lambda begun=begun: len(receiver.received) == begun)
                time.sleep(MOMENT_SECONDS)
                assert (len(receiver.received), gate.inside) == (begun, window)
                gate.release()
            gate.release(3 * IN_FLIGHT)
        assert gate.most_inside == IN_FLIGHT
        assert set(bench.statuses()) == {("delivered", 1)}

        # An endpoint that has proved itself gets as many at once.
        gate.most_inside = 0
        bench.record(IN_FLIGHT + 1)
        drain(gate)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == IN_FLIGHT)
            gate.release(IN_FLIGHT + 1)
        assert gate.most_inside == IN_FLIGHT


def drain(gate: Gate) -> None:
    while gate._permits.acquire(blocking=False):
        pass


def test_a_failure_resets_the_endpoints_window_to_one(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        for status in (200, 500):
            gate.status = status
            bench.record()
            gate.release()
            bench.deliver()
        bench.clock.turn(seconds=7)
        bench.record(3)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            time.sleep(MOMENT_SECONDS)
            assert gate.inside == 1
            gate.status = 200
            gate.release(4)


def test_an_empty_batch_leaves_the_endpoints_window_at_one(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver), [TEST])
        bench.record(type=REVOKED)
        assert bench.deliver() == ["webhooks"]
        bench.record(2)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            time.sleep(MOMENT_SECONDS)
            assert gate.inside == 1
            gate.release(2)


def test_deliveries_that_cannot_begin_within_the_lease_are_released(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(3)
        with monkeypatch.context() as busy:
            busy.setattr(module, "BEGUN_WITHIN_SECONDS", -1)  # No thread was free until now.
            assert bench.deliver() == ["webhooks"]
        assert bench.statuses() == [("pending", 0)] * 3
        bench.deliver_all()

    assert len(receiver.received) == 3
    assert bench.endpoint().failing_since is None


# Stopping ----------------------------------------------------------------------------------------


def test_stop_settles_deliveries_in_flight_and_releases_the_rest(bench: Bench) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        bench.configure(url_of(receiver))
        bench.record(5)
        with in_thread(bench.deliver):
            eventually(lambda: gate.inside == 1)
            bench.deliveries.stop()
            gate.release()
        assert sorted(bench.statuses()) == [("delivered", 1)] + [("pending", 0)] * 4
        assert len(receiver.received) == 1

        # Another worker need not wait for the lease.
        bench.deliveries = sender(bench.store, bench.clock)
        gate.release(4)
        assert bench.deliver() == ["webhooks"]
    assert bench.statuses() == [("delivered", 1)] * 5


def test_no_delivery_begins_after_stop(bench: Bench) -> None:
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record(2)
        bench.deliveries.stop()
        bench.deliver()

    assert receiver.received == []
    assert bench.statuses() == [("pending", 0)] * 2


# Stored attempts ---------------------------------------------------------------------------------


@pytest.fixture
def begun(bench: Bench) -> Begun:
    """An attempt that is being made, the first of a delivery."""
    bench.configure("https://hooks.acme.example/")
    bench.record()
    with bench.tx() as tx:
        [begun] = tx.deliveries.begin(bench.clock(), types=None, most=BATCH)
    return begun


def settled(begun: Begun, now: datetime, *, attempt: int = 1) -> Settled:
    return Settled(begun.id, attempt, "delivered", None, 204, None, 5, now)


def test_only_the_latest_attempt_settles_a_delivery(bench: Bench, begun: Begun) -> None:
    with bench.tx() as tx:
        [again] = tx.deliveries.begin(bench.clock(), types=None, most=BATCH)
        assert (again.id, again.attempt) == (begun.id, 2)
    for attempt, expected in ((1, "pending"), (3, "pending"), (2, "delivered")):
        with bench.tx() as tx:
            tx.deliveries.record_results([settled(begun, bench.clock(), attempt=attempt)])
        assert bench.statuses() == [(expected, 2)]


def test_an_ended_delivery_is_not_settled_again(bench: Bench, begun: Begun) -> None:
    with bench.tx() as tx:
        tx.deliveries.cancel("cancelled", bench.clock())
        tx.deliveries.record_results([settled(begun, bench.clock())])
        tx.deliveries.uncount([begun])
    [row] = bench.rows()
    assert (row.status, row.attempts, row.error, row.http_status) == ("failed", 1, "cancelled", None)


def test_a_released_delivery_does_not_count_as_attempted(bench: Bench, begun: Begun) -> None:
    with bench.tx() as tx:
        tx.deliveries.uncount([begun])
        assert tx.deliveries.next_due(types=None) == bench.clock()
    assert bench.statuses() == [("pending", 0)]


def test_several_deliveries_are_settled_each_with_its_own_result(bench: Bench, begun: Begun) -> None:
    bench.record(2)
    later = bench.clock() + DAY
    with bench.tx() as tx:
        tx.deliveries.uncount([begun])
        first, second, third = sorted(
            tx.deliveries.begin(bench.clock(), types=None, most=BATCH), key=lambda one: one.id
        )
        tx.deliveries.record_results(
            [
                settled(first, bench.clock()),
                Settled(second.id, 1, "pending", later, None, "timeout", 15000, None),
                Settled(third.id, 1, "failed", None, 410, "bad_status", 7, bench.clock()),
            ]
        )
    assert [(row.status, row.next_attempt_at, row.http_status, row.error) for row in bench.rows()] == [
        ("delivered", None, 204, None),
        ("pending", later, None, "timeout"),
        ("failed", None, 410, "bad_status"),
    ]
    assert [row.duration_ms for row in bench.rows()] == [5, 15000, 7]


def test_the_earliest_due_deliveries_begin_first_up_to_the_limit(bench: Bench, begun: Begun) -> None:
    with bench.tx() as tx:
        tx.deliveries.record_results(
            [Settled(begun.id, 1, "pending", bench.clock() + DAY, 500, "bad_status", 1, None)]
        )
    bench.clock.turn(seconds=1)
    bench.record(2)
    with bench.tx() as tx:
        first = tx.deliveries.begin(bench.clock(), types=None, most=2)
        assert begun.id not in {one.id for one in first}
        assert tx.deliveries.begin(bench.clock(), types=[DISABLED], most=2) == []


def test_a_replay_restarts_an_ended_delivery(bench: Bench, begun: Begun) -> None:
    with bench.tx() as tx:
        tx.deliveries.record_results(
            [Settled(begun.id, 1, "failed", None, 410, "bad_status", 7, bench.clock())]
        )
    bench.clock.turn(hours=1)
    with receiving(Answering()) as receiver:
        bench.configure(url_of(receiver))
        bench.record()
        with bench.tx() as tx:
            tx.deliveries.replay([begun.event_id], bench.clock())
        [row] = [row for row in bench.rows() if row.id == begun.id]
        assert (row.status, row.attempts, row.next_attempt_at) == ("pending", 0, bench.clock())
        assert row.settled_at is None
        bench.deliver_all()

    assert set(bench.statuses()) == {("delivered", 1)}
    assert receiver.received[0].body == begun.body or receiver.last.body == begun.body


def test_a_replay_brings_a_pending_delivery_forward_and_keeps_its_count(bench: Bench, begun: Begun) -> None:
    waiting = Settled(begun.id, 1, "pending", bench.clock() + DAY, 500, "bad_status", 7, None)
    with bench.tx() as tx:
        tx.deliveries.record_results([waiting])
        tx.deliveries.replay([begun.event_id], bench.clock())
    [row] = bench.rows()
    assert (row.status, row.attempts, row.next_attempt_at) == ("pending", 1, bench.clock())


# Concurrent changes of the same rows -------------------------------------------------------------


def test_events_recorded_during_a_replay_are_not_part_of_it(bench: Bench) -> None:
    bench.configure("https://hooks.acme.example/")
    bench.record(2)
    choice = replay.Choice(since=bench.clock() - DAY)
    with bench.tx() as tx:
        extent = replay.measure(tx, choice)
    bench.record()
    with bench.tx() as tx:
        chosen = replay.replay(tx, choice, after=0, last=extent.last, now=bench.clock())
    assert [one.sequence for one in chosen] == bench.sequences()[:-1]


def test_removing_while_a_failure_is_settled_does_not_deadlock(
    bench: Bench, superuser: Engine, begun: Begun
) -> None:
    """Removing locks the endpoint, then the deliveries: settling must not lock the deliveries first."""
    batch = replace(
        bench.deliveries._begin(bench.tenant_id), url="https://hooks.acme.example/", begun=[begun]
    )
    attempt = module.Attempt(500, None, 5)
    with ThreadPoolExecutor(1) as pool, bench.store.tenant(bench.tenant_id, exclusive=True) as tx:
        tx.webhooks.find(lock=True)
        ended = module._judge_all(batch, [(replace(begun, attempt=2), attempt)], bench.clock())
        settling = pool.submit(bench.deliveries._settle, batch, ended)
        eventually(lambda: settling.done() or waits_for_a_lock(superuser))
        endpoints.remove(tx, now=bench.clock())
    assert settling.result(PATIENCE_SECONDS) is False
    assert [(row.status, row.error) for row in bench.rows()] == [("failed", "cancelled")]


def test_configuring_moves_a_failing_endpoint_back_to_the_usual_queue(bench: Bench) -> None:
    with receiving(Answering(500)) as old, receiving(Answering()) as new:
        bench.configure(url_of(old))
        bench.record()
        assert bench.deliver() == ["webhooks"]
        assert [queue for queue, _ in bench.waiting()] == ["slow_webhooks"]
        bench.configure(url_of(new))
        assert [queue for queue, _ in bench.waiting()] == ["webhooks"]
