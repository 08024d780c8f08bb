"""Deliveries under faults: killed workers, a lost database, and hostile receivers; no event is lost.

What a killed worker had taken waits until its lease ends, in 60 seconds. The tests do not wait for that:
`Bench.end_leases` ends it by an UPDATE. `BILLING_FAULTS_EVENTS` is how many events the longest test records.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import quantiles

import orjson
import pytest
from sqlalchemy import make_url, text

from billing.deliveries import BATCH, IN_FLIGHT
from billing.errors import DatabaseUnavailable
from billing.settings import Settings
from billing.storage import database, embedded
from billing.webhooks import endpoints
from tests import receivers
from tests.conftest import STATE, clone
from tests.faults.deliveries import (
    LOOPBACK,
    NUMBERS,
    PRODUCTION,
    Bench,
    Place,
    Tenant,
    Worker,
    assert_complete,
    duplicated,
    eventually,
    ids,
    now,
    url_of,
)
from tests.receivers import MEGABYTE, Behaviour, Received, Visit, answers, head, receiving

OK = head(200, {"Content-Length": "2"}) + b"ok"
REFUSED = head(500, {"Content-Length": "2"}) + b"no"
SHORT = 1_000
EVENTS = int(os.environ.get("BILLING_FAULTS_EVENTS", SHORT))


@pytest.fixture(scope="module")
def place(
    cluster: embedded.Cluster,
    worker_id: str,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """A database of this module's own: a worker takes the due tasks of all tenants."""
    name = f"billing_faults_{worker_id}"
    clone(cluster, name)
    app_url = database.url(cluster, database.APP, name)
    place = Place(settings, app_url, cluster.url(name), tmp_path_factory.mktemp("workers"))
    yield place
    place.close()


@pytest.fixture(scope="module")
def survivor(place: Place) -> Iterator[Worker]:
    """A worker for all tests: it continues what others leave, and must stop without having logged an error."""
    with place.working() as worker:
        yield worker
        worker.stop()


@pytest.fixture
def bench(place: Place) -> Bench:
    return Bench(place)


class Gate:
    """A receiver that answers the first request, and holds all others until it is opened."""

    def __init__(self, answer: bytes = OK) -> None:
        self.open = threading.Event()
        self.held: list[str] = []
        self._answer = answer

    def __call__(self, visit: Visit) -> None:
        request = visit.receive()
        if request is None:
            return
        if request is visit.receiver.received[0]:
            visit.send(OK)
            return
        if not self.open.is_set():
            self.held += ids([request])
            self.open.wait()
        visit.send(self._answer)


def prove(bench: Bench, tenant: Tenant) -> None:
    """Wait until the first event is delivered: from then on many are in flight at once."""
    eventually(lambda: [row.status for row in bench.rows(tenant)] == ["delivered"])
    eventually(lambda: bench.leases() == 0)


# kill -9 -----------------------------------------------------------------------------------------


def test_events_that_a_killed_worker_had_not_sent_are_sent_once(
    bench: Bench, place: Place, survivor: Worker
) -> None:
    with receiving(answers()) as receiver:
        with survivor.paused():
            tenant = bench.tenant(url_of(receiver))
            bench.record(tenant, 5)
            with bench.holding("deliveries", tenant), place.working() as worker:
                eventually(lambda: bench.leases() == 1 and bench.waiting() == 1)
                worker.kill()
            assert receiver.received == []
            bench.end_leases()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 6)
        assert duplicated(receiver.received) == set()
        assert {row.attempts for row in bench.rows(tenant)} == {1}


def test_only_events_in_flight_when_a_worker_is_killed_are_sent_again(
    bench: Bench, place: Place, survivor: Worker
) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        with survivor.paused(), place.working() as worker:
            tenant = bench.tenant(url_of(receiver))
            prove(bench, tenant)
            bench.record(tenant, 30)
            eventually(lambda: len(gate.held) == IN_FLIGHT)
            worker.kill()
            gate.open.set()
            assert bench.begun() >= set(gate.held)
            bench.end_leases()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 31)
        assert duplicated(receiver.received) == set(gate.held)
        assert len(receiver.received) == 31 + IN_FLIGHT


def just_before(visit: Visit, kill: Callable[[], None]) -> None:
    kill()
    visit.send(OK)


def just_after(visit: Visit, kill: Callable[[], None]) -> None:
    visit.send(OK)
    kill()


@pytest.mark.parametrize("moment", [just_before, just_after])
def test_a_worker_killed_during_a_delivery_repeats_at_most_that_event(
    bench: Bench, place: Place, survivor: Worker, moment: Callable[[Visit, Callable[[], None]], None]
) -> None:
    victims: list[Worker] = []

    def behave(visit: Visit) -> None:
        visit.receive()
        if victims:
            moment(visit, victims.pop().process.kill)
        else:
            visit.send(OK)

    with receiving(behave) as receiver:
        with survivor.paused(), place.working() as worker:
            victims.append(worker)
            tenant = bench.tenant(url_of(receiver))
            bench.record(tenant, 5)
            worker.process.wait(20)
            [last] = ids(receiver.received)
            # Killed just after, the worker may have stored that this one arrived.
            in_flight = bench.begun() & {last}
            assert moment is just_after or in_flight
            bench.end_leases()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 6)
        assert duplicated(receiver.received) == in_flight


def test_events_that_arrived_but_were_not_stored_as_such_are_sent_again(
    bench: Bench, place: Place, survivor: Worker
) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        with survivor.paused(), place.working() as worker:
            tenant = bench.tenant(url_of(receiver))
            prove(bench, tenant)
            bench.record(tenant, 3)
            eventually(lambda: len(gate.held) == 3)
            with bench.holding("deliveries", tenant):
                gate.open.set()
                eventually(lambda: bench.waiting() == 1)
                worker.kill()
                # The first results may be on their way to being stored, with the COMMIT.
                bench.cut_waiting()
                eventually(lambda: bench.waiting() == 0)
            bench.end_leases()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 4)
        assert duplicated(receiver.received) == set(gate.held)
        assert [row.attempts for row in bench.rows(tenant)] == [1, 2, 2, 2]


# Changes during delivery -------------------------------------------------------------------------


def test_a_worker_that_lost_its_lease_does_not_change_its_successors_results(
    bench: Bench, survivor: Worker
) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        tenant = bench.tenant(url_of(receiver))
        prove(bench, tenant)
        bench.record(tenant, IN_FLIGHT)
        eventually(lambda: len(gate.held) == IN_FLIGHT)
        # Now the worker takes the endpoint a second time: that it is the same one makes no difference.
        bench.end_leases()
        eventually(lambda: len(gate.held) == 2 * IN_FLIGHT)
        gate.open.set()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 1 + IN_FLIGHT)
        assert len(receiver.received) == 1 + 2 * IN_FLIGHT
        assert [row.attempts for row in bench.rows(tenant)] == [1] + [2] * IN_FLIGHT


def test_a_late_release_does_not_affect_the_next_holder(bench: Bench) -> None:
    tenant = bench.tenant("https://hooks.acme.example/in")
    with bench.store.tenant(tenant.id) as tx:
        tx.tasks.drop("webhook.deliver", subject=str(tenant.id))
        late = tx.deliveries.begin(now(), types=None, most=BATCH)
    with bench.store.tenant(tenant.id) as tx:
        again = tx.deliveries.begin(now(), types=None, most=BATCH)
        tx.deliveries.uncount(late)
    assert [one.attempt for one in again] == [row.attempts for row in bench.rows(tenant)] == [2]


def test_losing_the_database_before_settling_repeats_only_what_was_in_flight(
    bench: Bench, survivor: Worker
) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        tenant = bench.tenant(url_of(receiver))
        prove(bench, tenant)
        bench.record(tenant, 30)
        eventually(lambda: len(gate.held) == IN_FLIGHT)
        output = survivor.output
        with bench.away():
            gate.open.set()
            eventually(lambda: "waits for the database" in survivor.output.removeprefix(output))
        assert bench.begun() >= set(gate.held)
        # The others of the batch were never sent.
        assert len(receiver.received) == 1 + IN_FLIGHT
        bench.end_leases()
        bench.await_settled()
        assert_complete(receiver.received, tenant, 31)
        assert duplicated(receiver.received) == set(gate.held)


def test_nothing_more_is_sent_to_a_url_removed_during_delivery(bench: Bench, survivor: Worker) -> None:
    gate = Gate()
    with receiving(gate) as receiver:
        tenant = bench.tenant(url_of(receiver))
        prove(bench, tenant)
        bench.record(tenant, 40)
        eventually(lambda: len(gate.held) == IN_FLIGHT)
        with bench.store.tenant(tenant.id, exclusive=True) as tx:
            endpoints.remove(tx, now=now())
        gate.open.set()
        bench.await_settled()
        assert len(receiver.received) == 1 + IN_FLIGHT
        assert Counter(row.error for row in bench.rows(tenant)) == {None: 1, "cancelled": 40}


def test_the_remaining_events_go_to_a_url_configured_during_delivery(bench: Bench, survivor: Worker) -> None:
    gate = Gate()
    with receiving(gate) as old, receiving(answers()) as new:
        tenant = bench.tenant(url_of(old))
        prove(bench, tenant)
        bench.record(tenant, 40)
        eventually(lambda: len(gate.held) == IN_FLIGHT)
        bench.configure(tenant, url_of(new))
        gate.open.set()
        bench.await_settled()
        assert len(old.received) == 1 + IN_FLIGHT
        assert_complete([*old.received, *new.received], tenant, 41)
        assert duplicated([*old.received, *new.received]) == set()


@pytest.mark.parametrize("answer", [OK, REFUSED], ids=["delivered", "failed"])
def test_removing_an_endpoint_and_settling_its_deliveries_do_not_deadlock(
    bench: Bench, survivor: Worker, answer: bytes
) -> None:
    gate = Gate(answer)
    with receiving(gate) as receiver:
        tenant = bench.tenant(url_of(receiver))
        prove(bench, tenant)
        bench.record(tenant, IN_FLIGHT)
        eventually(lambda: len(gate.held) == IN_FLIGHT)
        output = survivor.output
        with bench.store.tenant(tenant.id, exclusive=True) as tx:
            tx.webhooks.find(lock=True)
            gate.open.set()
            eventually(lambda: bench.waiting() == 1)
            # A deadlock would reach the worker as an unreachable database.
            endpoints.remove(tx, now=now())
        bench.await_settled()
        assert "waits for the database" not in survivor.output.removeprefix(output)


@pytest.mark.slow
def test_an_event_recorded_while_the_endpoint_is_released_is_delivered(
    bench: Bench, survivor: Worker
) -> None:
    """A few hundred small batches, each of which may end just as the next event is recorded."""
    with receiving(answers()) as receiver:
        tenant = bench.tenant(url_of(receiver))
        for number in range(200):
            bench.record(tenant)
            time.sleep(number % 20 / 1000)
        bench.await_settled()
        assert_complete(receiver.received, tenant, 201)
        assert duplicated(receiver.received) == set()


# SIGTERM -----------------------------------------------------------------------------------------


def test_sigterm_settles_deliveries_in_flight_and_releases_the_rest(
    bench: Bench, place: Place, survivor: Worker
) -> None:
    is_slow = threading.Event()

    def behave(visit: Visit) -> None:
        visit.receive()
        if is_slow.is_set():
            time.sleep(2)
        visit.send(OK)

    with receiving(behave) as receiver:
        with survivor.paused(), place.working() as worker:
            tenant = bench.tenant(url_of(receiver))
            prove(bench, tenant)
            is_slow.set()
            bench.record(tenant, 30)
            eventually(lambda: len(receiver.received) == 1 + IN_FLIGHT)
            # Within 20 seconds.
            worker.stop()
            assert len(receiver.received) == 1 + IN_FLIGHT
            rows = Counter((row.status, row.attempts) for row in bench.rows(tenant))
            assert rows == {("delivered", 1): 1 + IN_FLIGHT, ("pending", 0): 30 - IN_FLIGHT}
            is_slow.clear()
        # No lease was ended by an UPDATE.
        bench.await_settled()
        assert_complete(receiver.received, tenant, 31)
        assert duplicated(receiver.received) == set()
        assert {row.attempts for row in bench.rows(tenant)} == {1}


def test_repeated_signals_stop_the_worker_like_one(place: Place) -> None:
    with place.working() as worker:
        for number in [signal.SIGTERM, signal.SIGINT] * 50:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, number)
        assert worker.process.wait(20) == 0, worker.output


def test_a_signal_to_another_thread_stops_the_worker(place: Place) -> None:
    """As the kernel may choose after a SIGSTOP. Python's handlers run in the main thread, which must be woken."""
    with place.working() as worker:
        threads = [int(path.name) for path in Path(f"/proc/{worker.process.pid}/task").iterdir()]
        # Linux prefers the thread whose id is given.
        os.kill(max(threads), signal.SIGTERM)
        assert worker.process.wait(20) == 0, worker.output


# A storm -----------------------------------------------------------------------------------------

TENANTS = 20
TOGETHER = 10
VOLATILE = {"fsync": "off", "full_page_writes": "off"}
# Which worker has taken which endpoint: the leases to end when one of the two is killed.
NOTE_TAKERS = """
CREATE TABLE takers (tenant_id uuid PRIMARY KEY, name text NOT NULL);
CREATE FUNCTION note_taker() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO public.takers VALUES (NEW.tenant_id, session_user)
        ON CONFLICT (tenant_id) DO UPDATE SET name = excluded.name;
    RETURN NULL;
END $$;
CREATE TRIGGER note_taker AFTER UPDATE ON tasks FOR EACH ROW
    WHEN (NEW.attempts > OLD.attempts) EXECUTE FUNCTION note_taker();
"""


class Storm:
    """A PostgreSQL of its own, and two workers that are killed and replaced, each identified by its role."""

    def __init__(self, place: Place, state_dir: Path) -> None:
        self.bench = Bench(place)
        self.in_flight: list[set[str]] = []
        self._place = place
        self._data = state_dir / "postgres/data"
        self._stack = ExitStack()
        self._urls: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}

    def admit(self, name: str) -> None:
        """Create a role like the application's, which identifies a worker."""
        password = secrets.token_hex()
        with self.bench.superuser.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' IN ROLE billing_app")
        url = make_url(self._place.environ["DATABASE_URL"]).set(username=name, password=password)
        self._urls[name] = url.render_as_string(hide_password=False)

    def start(self, *names: str) -> None:
        for name in names:
            environ = {**LOOPBACK, "DATABASE_URL": self._urls[name]}
            self._workers[name] = self._stack.enter_context(self._place.starting(environ))

    def kill(self, name: str) -> None:
        """kill -9; its leases are ended, and it is started again."""
        self._workers[name].await_running()
        self._workers[name].kill()
        self._free(name)
        self.start(name)

    def restart_postgres(self) -> None:
        """Immediate shutdown, as in a crash; the keeper starts the server again."""
        for worker in self._workers.values():
            worker.await_running()
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGQUIT)
        eventually(lambda: self._answers(postmaster))
        self.in_flight.append(self.bench.begun())

    def _answers(self, former: int) -> bool:
        with suppress(OSError, IndexError, DatabaseUnavailable):
            is_new = int((self._data / "postmaster.pid").read_text().split()[0]) != former
            with self.bench.store.platform() as platform:
                platform._connection.exec_driver_sql("SELECT 1")
                return is_new
        return False

    def replace(self, name: str) -> None:
        """SIGTERM; leases that it could not release without the database are ended."""
        worker = self._workers[name]
        worker.await_running()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(20) == 0, worker.output
        self._free(name)
        self.start(name)

    def _free(self, name: str) -> None:
        self.in_flight.append(self.bench.begun())
        with self.bench.superuser.connect() as connection:
            query = text("SELECT tenant_id FROM takers WHERE name = :name")
            taken = set(connection.scalars(query, {"name": name}))
        self.bench.end_leases(of=taken)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def storm(settings: Settings, tmp_path: Path) -> Iterator[Storm]:
    state_dir = STATE / f"storm-{os.getpid()}-{next(NUMBERS)}"
    opened = database.open_embedded(state_dir, options=VOLATILE)
    assert opened.server is not None
    superuser_url = opened.server.cluster.url(database.NAME)
    place = Place(settings, opened.app_url, superuser_url, tmp_path)
    with place.superuser.begin() as connection:
        connection.exec_driver_sql(NOTE_TAKERS)
    storm = Storm(place, state_dir)
    for name in ("one", "other"):
        storm.admit(name)
    yield storm
    storm.close()
    place.close()
    opened.close()


def record_all(storm: Storm, tenants: list[Tenant], number: int) -> None:
    """That many events, the tenants in turn; what may or may not have been recorded is recorded again."""
    for turn in range(number // TOGETHER):
        while True:
            try:
                storm.bench.record(tenants[turn % len(tenants)], TOGETHER)
                break
            except DatabaseUnavailable:
                time.sleep(0.1)


def crash(storm: Storm) -> None:
    """PostgreSQL at once, and both workers: results they could not store would wait for their leases."""
    storm.restart_postgres()
    storm.replace("other")
    storm.kill("one")


@pytest.mark.slow
def test_no_event_is_lost_in_a_storm_of_faults(storm: Storm, capsys: pytest.CaptureFixture[str]) -> None:
    """Many events of many tenants, a worker killed three times, another replaced, and PostgreSQL crashed once."""
    bench = storm.bench
    with receiving(answers()) as receiver, ThreadPoolExecutor(1) as pool:
        tenants = [bench.tenant(url_of(receiver, f"{number}")) for number in range(TENANTS)]
        storm.start("one", "other")
        began = time.monotonic()
        recording = pool.submit(record_all, storm, tenants, EVENTS)
        faults: list[Callable[[], None]] = [
            lambda: storm.kill("one"),
            lambda: crash(storm),
            lambda: storm.kill("one"),
        ]
        for part, fault in enumerate(faults, start=1):
            eventually(lambda part=part: len(receiver.received) >= EVENTS * part / (len(faults) + 2))
            fault()
        recording.result()
        bench.await_settled()
        seconds = time.monotonic() - began

    # A killed worker may have sent part of a request.
    requests = [one for one in receiver.received if len(one.body) == int(one.headers["content-length"])]
    received: dict[str, list[Received]] = defaultdict(list)
    for one in requests:
        received[one.path].append(one)
    twice = duplicated(requests)
    with capsys.disabled():
        print(
            f"\n{EVENTS} events, {len(faults)} faults, {seconds:.1f} s: {len(twice)} came more than once, "
            f"{len(requests) - len(set(ids(requests)))} requests too many"
        )
    total = 0
    for number, tenant in enumerate(tenants):
        recorded = len(bench.rows(tenant))
        total += recorded
        assert_complete(received[f"/{number}"], tenant, recorded)
        # A fault may repeat what was in flight to an endpoint.
        assert len(duplicated(received[f"/{number}"])) <= len(storm.in_flight) * IN_FLIGHT
    assert total >= EVENTS + TENANTS
    assert twice <= set().union(*storm.in_flight)


# Bad receivers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A receiver, and what must be stored of an event sent there."""

    behave: Behaviour
    status: str = "pending"
    http_status: int | None = None
    error: str | None = None
    attempts: int = 1
    wait_seconds: tuple[float, float] = (60, 60)


AGAIN_LATER = (240, 360)
CASES = {
    "resets": Case(receivers.resets, error="connection_broken", attempts=2, wait_seconds=AGAIN_LATER),
    "hangs": Case(receivers.hangs, error="timeout"),
    "drips its head": Case(receivers.drips_head, error="timeout"),
    "drips its body": Case(receivers.drips_body, error="timeout"),
    "drips without a length": Case(receivers.drips_until_the_end, error="timeout"),
    "floods": Case(receivers.floods(), "delivered", 200),
    "floods its head": Case(
        receivers.floods_head, error="connection_broken", attempts=2, wait_seconds=AGAIN_LATER
    ),
    "sends a bomb": Case(receivers.sends_bomb, "delivered", 200),
    "redirects, and floods": Case(
        receivers.floods(307, Location="/elsewhere"),
        http_status=307,
        error="bad_status",
        attempts=2,
        wait_seconds=AGAIN_LATER,
    ),
    "refuses for a while": Case(
        answers(503, Retry_After="9"),
        http_status=503,
        error="bad_status",
        attempts=2,
        wait_seconds=(300, 360),
    ),
    "has too many requests": Case(answers(429, Retry_After="9"), http_status=429, error="bad_status"),
    "is gone": Case(answers(410), "failed", 410, "bad_status"),
}


@contextmanager
def full() -> Iterator[int]:
    """The port of a listener that accepts no connection: its queue is full."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.slow
def test_hostile_receivers_cost_little_memory_and_get_the_right_verdict(
    place: Place, survivor: Worker, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    receivers.bomb()
    with survivor.paused(), ExitStack() as stack:
        worker = stack.enter_context(place.working())
        usual = stack.enter_context(receiving(answers()))
        bench.record(bench.tenant(url_of(usual)), 64)
        bench.await_settled()
        at_rest = worker.resident_bytes()

        opened = {name: stack.enter_context(receiving(case.behave)) for name, case in CASES.items()}
        tenants = {name: bench.tenant(url_of(receiver)) for name, receiver in opened.items()}
        unreachable = bench.tenant(f"http://localhost:{stack.enter_context(full())}/in")
        most = at_rest

        def is_over() -> bool:
            nonlocal most
            most = max(most, worker.resident_bytes())
            return all(
                (bench.rows(tenants[name])[0].attempts, bench.rows(tenants[name])[0].duration_ms is not None)
                == (case.attempts, True)
                for name, case in CASES.items()
            )

        eventually(is_over)
        # The last attempts of those that have two are settled too.
        eventually(lambda: bench.leases() == 0)
        seen = now()
        for name, case in CASES.items():
            row = bench.rows(tenants[name])[0]
            told = (row.status, row.http_status, row.error, row.attempts)
            assert told == (case.status, case.http_status, case.error, case.attempts), name
            assert row.duration_ms <= 16_000, name
            if case.status == "pending":
                least, longest = case.wait_seconds
                assert least - 30 <= (row.next_attempt_at - seen).total_seconds() <= longest, name
        assert bench.rows(unreachable)[0].error == "connection_failed"
        assert bench.endpoint(tenants["is gone"]).disabled_reason == "gone"
        # The event about it, once.
        assert [row.event_type for row in bench.rows(tenants["is gone"])] == [
            "tenant.registered",
            "webhook.disabled",
        ]
        with capsys.disabled():
            print(f"\n{at_rest / MEGABYTE:.0f} MB at rest, {(most - at_rest) / MEGABYTE:.1f} MB more at most")
        assert most - at_rest < 16 * MEGABYTE


@pytest.mark.slow
def test_thirty_dead_endpoints_do_not_delay_a_healthy_one(
    place: Place, survivor: Worker, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def note(visit: Visit) -> None:
        if request := visit.receive():
            created_at = datetime.fromisoformat(orjson.loads(request.body)["created_at"])
            waits.append((now() - created_at).total_seconds())
            visit.send(OK)

    with survivor.paused(), ExitStack() as stack:
        dead = stack.enter_context(receiving(receivers.hangs))
        well = stack.enter_context(receiving(note))
        for tenant in [bench.tenant(url_of(dead)) for _ in range(30)]:
            bench.record(tenant, 4)
        stack.enter_context(place.working())
        healthy = bench.tenant(url_of(well))
        # Longer than the first attempts' timeout: by then the dead endpoints are in the slow queue.
        until = time.monotonic() + 17
        while time.monotonic() < until:
            bench.record(healthy)
            time.sleep(0.1)
        eventually(lambda: len(well.received) == len(bench.rows(healthy)))
        assert dead.connections >= 30
    percentiles = quantiles(waits, n=100)
    with capsys.disabled():
        print(
            f"\na healthy endpoint beside 30 dead: p50 {percentiles[49]:.2f} s, p99 {percentiles[98]:.2f} s"
        )
    assert max(waits) < 5


def test_a_worker_without_permission_never_connects_to_loopback(
    place: Place, survivor: Worker, bench: Bench
) -> None:
    """What a name resolves to, and whether that may change, is in tests/webhooks/test_egress.py."""
    with receiving(answers()) as receiver, survivor.paused():
        hosts = ("localhost", "127.0.0.1", "[::1]", "2130706433", "0x7f.1")
        tenants = [
            bench.tenant(f"{scheme}://{host}:{receiver.port}/in")
            for host in hosts
            for scheme in ("http", "https")
        ]
        with place.working(PRODUCTION):
            eventually(lambda: {bench.rows(tenant)[0].error for tenant in tenants} == {"refused_url"})
        assert receiver.connections == 0
