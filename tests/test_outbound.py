"""Outbound calls: whatever the other side does, they end in time and use little memory."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import requests
import stripe
from urllib3 import HTTPConnectionPool

from billing import outbound
from billing.outbound import (
    AddressRefused,
    Bounds,
    CallTimedOut,
    ConnectFailed,
    ConnectionBroken,
    NameUnknown,
    OutboundError,
    Resolver,
    ResponseTooLarge,
    Session,
)
from tests import receivers
from tests.receivers import MEGABYTE, Behaviour, Names, Visit, answers, receiving

TOTAL_SECONDS = 0.3
# For a busy machine: without a cut-off these calls would take a minute, or never end.
LATE_SECONDS = 10
AMPLE_SECONDS = 5
MOST_BYTES = 64 * 1024
LITTLE_MEMORY = 4 * MEGABYTE


@pytest.fixture
def session() -> Iterator[Session]:
    """A session whose deadline is too far away to be hit by chance."""
    with new_session(connect_seconds=AMPLE_SECONDS, total_seconds=AMPLE_SECONDS) as opened:
        yield opened


@pytest.fixture
def hasty() -> Iterator[Session]:
    with new_session() as opened:
        yield opened


def new_session(*, resolver: Resolver | None = None, **changes: Any) -> Session:
    return Session(bounds(**changes), resolver=resolver)


def bounds(**changes: Any) -> Bounds:
    return Bounds(
        **{"connect_seconds": 0.2, "total_seconds": TOTAL_SECONDS, "max_bytes": MOST_BYTES, **changes}
    )


@contextmanager
def bounded(seconds: float = TOTAL_SECONDS) -> Iterator[None]:
    """Require that the block ends in time and uses little memory."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < seconds + LATE_SECONDS
    assert peak < LITTLE_MEMORY


# Good receivers ----------------------------------------------------------------------------------


def test_a_request_arrives_as_it_was_made(session: Session) -> None:
    with receiving(answers(201, b"made", X_Said="so")) as receiver:
        response = session.post(receiver.url, data=b'{"a": 1}', headers={"X-Mine": "1"})
    assert (response.status_code, response.content, response.headers["X-Said"]) == (201, b"made", "so")
    assert (receiver.last.method, receiver.last.path, receiver.last.body) == ("POST", "/in", b'{"a": 1}')
    assert (receiver.last.headers["X-Mine"], receiver.last.headers["Accept-Encoding"]) == ("1", "identity")


@pytest.mark.parametrize("status", [200, 204, 404, 500])
def test_a_connection_is_reused(session: Session, status: int) -> None:
    with receiving(answers(status, b"" if status == 204 else b"ok")) as receiver:
        assert [session.get(receiver.url).status_code for _ in range(5)] == [status] * 5
    assert receiver.connections == 1


def test_a_kept_connection_closed_by_the_receiver_is_reopened(session: Session) -> None:
    with receiving(receivers.says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as receiver:
        for _ in range(3):
            assert session.get(receiver.url).content == b"ok"
            assert receiver.ended.acquire(timeout=AMPLE_SECONDS)
    assert receiver.connections == 3


def test_a_body_may_be_as_long_as_max_bytes() -> None:
    with receiving(answers(200, b"x" * 1000)) as receiver:
        with new_session(max_bytes=1000) as session:
            assert len(session.get(receiver.url).content) == 1000
        with new_session(max_bytes=999) as session, pytest.raises(ResponseTooLarge):
            session.get(receiver.url)
        with new_session(max_bytes=999, cut=True) as session:
            assert len(session.get(receiver.url).content) == 999


def test_a_chunked_body_is_read() -> None:
    data = receivers.head(200, {"Transfer-Encoding": "chunked"}) + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
    with receiving(receivers.says(data)) as receiver, new_session(max_bytes=5) as session:
        assert session.get(receiver.url).content == b"abcde"


def test_a_streamed_body_is_read_at_once(session: Session) -> None:
    with receiving(answers()) as receiver:
        assert session.get(receiver.url, stream=True).raw.read() == b"ok"


def test_proxies_and_ca_bundles_of_the_environment_are_ignored(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with receiving(answers()) as receiver:
        assert session.get(receiver.url, proxies={"http": "http://127.0.0.1:9"}).status_code == 200


def test_no_cookie_is_kept(session: Session) -> None:
    with receiving(answers(Set_Cookie="a=b")) as receiver:
        session.get(receiver.url)
        session.get(receiver.url)
    assert receiver.last.headers["Cookie"] is None
    assert not session.cookies


# Bad receivers -----------------------------------------------------------------------------------

SLOW = [receivers.hangs, receivers.drips_head, receivers.drips_body, receivers.drips_until_the_end]
BAD: list[tuple[Behaviour, type[OutboundError]]] = [
    (receivers.resets, ConnectionBroken),
    (receivers.floods(), ResponseTooLarge),
    (receivers.floods_head, ResponseTooLarge),
    (receivers.floods_continue, ResponseTooLarge),
    (receivers.floods_negative_chunk, ResponseTooLarge),
    (receivers.floods_trailers, ResponseTooLarge),
    (receivers.sends_bomb, ResponseTooLarge),
    (receivers.floods(302, Location="http://127.0.0.1:9/"), ResponseTooLarge),
    (receivers.says(b""), ConnectionBroken),
    (receivers.says(b"SSH-2.0-OpenSSH\r\n"), ConnectionBroken),
    (receivers.says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhalf"), ConnectionBroken),
    (receivers.says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf"), ConnectionBroken),
    (receivers.says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhalf"), ConnectionBroken),
]


@pytest.mark.parametrize("behave", SLOW)
def test_a_slow_receiver_times_out(hasty: Session, behave: Behaviour) -> None:
    with receiving(behave) as receiver, bounded(), pytest.raises(CallTimedOut):
        hasty.get(receiver.url)


@pytest.mark.parametrize(("behave", "error"), BAD)
def test_a_bad_receiver_raises_its_error_in_little_memory(
    session: Session, behave: Behaviour, error: type[OutboundError]
) -> None:
    receivers.bomb()
    with receiving(behave) as receiver, bounded(AMPLE_SECONDS), pytest.raises(OutboundError) as raised:
        session.get(receiver.url)
    assert type(raised.value) is error


def test_an_immediately_reset_connection_is_an_error(session: Session) -> None:
    with receiving(receivers.resets_at_once) as receiver, pytest.raises(OutboundError) as raised:
        session.get(receiver.url)
    assert type(raised.value) in (ConnectFailed, ConnectionBroken)


@pytest.mark.parametrize(
    "behave", [receivers.floods(), receivers.sends_bomb, receivers.floods(307, Location="/")]
)
def test_a_cut_body_is_not_read_beyond_max_bytes(behave: Behaviour) -> None:
    receivers.bomb()
    with (
        receiving(behave) as receiver,
        new_session(total_seconds=AMPLE_SECONDS, cut=True) as session,
        bounded(AMPLE_SECONDS),
    ):
        assert len(session.get(receiver.url).content) == MOST_BYTES


def test_a_redirect_is_returned_and_not_followed(session: Session) -> None:
    with receiving(answers()) as other, receiving(answers(307, Location=other.url)) as receiver:
        assert session.get(receiver.url, allow_redirects=True).status_code == 307
    assert not other.received


def test_a_receiver_that_does_not_read_times_out(hasty: Session) -> None:
    data = b"x" * 50 * MEGABYTE
    with receiving(receivers.hangs) as receiver, bounded(), pytest.raises(CallTimedOut):
        hasty.post(receiver.url, data=data)


def test_a_closed_port_is_an_error(session: Session) -> None:
    with receiving(answers()) as receiver:
        url = receiver.url
    with bounded(), pytest.raises(ConnectFailed):
        session.get(url)


def test_a_listener_that_accepts_no_connection_fails_in_time(hasty: Session) -> None:
    # A full backlog: Linux leaves further connections hanging.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, bounded():
        queued = [socket.socket() for _ in range(4)]
        for one in queued:
            one.setblocking(False)
            assert one.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        with pytest.raises(ConnectFailed):
            hasty.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        for one in queued:
            one.close()


@pytest.mark.parametrize("behave", [receivers.hangs, receivers.resets])
def test_an_error_contains_no_secret(hasty: Session, behave: Behaviour) -> None:
    with receiving(behave) as receiver, pytest.raises(OutboundError) as raised:
        hasty.get(f"{receiver.url}?token=hunter2", headers={"Authorization": "Bearer hunter2"})
    error = raised.value
    assert "hunter2" not in f"{error!r} {error} {vars(error)}"
    assert (error.request, error.response, error.__cause__, error.__context__) == (None, None, None, None)


# Names -------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Names]:
    def resolve(**addresses: list[str]) -> Names:
        stub = Names({name.replace("_", "."): found for name, found in addresses.items()})
        monkeypatch.setattr(socket, "getaddrinfo", stub)
        return stub

    return resolve


def test_the_next_address_is_tried(session: Session, names: Callable[..., Names]) -> None:
    resolver = names(a_example=["127.0.0.3", "127.0.0.2"])
    with receiving(answers(), host="127.0.0.2") as receiver:
        assert session.get(f"http://a.example:{receiver.port}/").status_code == 200
    assert receiver.last.headers["Host"] == f"a.example:{receiver.port}"
    assert resolver.looked_up == ["a.example"]


def test_every_address_must_be_permitted(names: Callable[..., Names]) -> None:
    names(a_example=["127.0.0.2", "127.0.0.3"])
    first = ip_address("127.0.0.2")
    with (
        receiving(answers(), host="127.0.0.2") as receiver,
        new_session(permitted=lambda address: address == first) as session,
        pytest.raises(AddressRefused),
    ):
        session.get(f"http://a.example:{receiver.port}/")
    assert not receiver.connections


@pytest.mark.parametrize("name", ["unknown.example", "a..example", "a" * 64 + ".example"])
def test_an_unknown_name_is_an_error(session: Session, names: Callable[..., Names], name: str) -> None:
    names()
    with pytest.raises((NameUnknown, requests.exceptions.InvalidURL)):
        session.get(f"http://{name}/")


def test_a_hanging_lookup_fails_in_time(hanging_resolver: threading.Event) -> None:
    with new_session() as session, bounded(0.2), pytest.raises(NameUnknown):
        session.get("http://hangs.example/")
    with new_session(connect_seconds=60) as session, bounded(), pytest.raises(CallTimedOut):
        session.get("http://hangs.example/")


def test_while_all_resolver_threads_hang_every_name_is_unknown(
    hanging_resolver: threading.Event,
) -> None:
    resolver = Resolver(threads=1)
    with (
        receiving(answers()) as receiver,
        new_session(resolver=resolver, total_seconds=AMPLE_SECONDS) as session,
    ):
        good = f"http://good.example:{receiver.port}/"
        for url in ("http://hangs.example/", good):
            with bounded(0.2), pytest.raises(NameUnknown):
                session.get(url)
        with new_session(connect_seconds=AMPLE_SECONDS, total_seconds=AMPLE_SECONDS) as other:
            assert other.get(good).status_code == 200
        hanging_resolver.set()
        with resolver._free:
            pass
        assert session.get(good).status_code == 200


def test_a_resolver_thread_is_reused_and_ends_when_idle(
    names: Callable[..., Names], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.threads.IDLE_SECONDS", 0.2)
    known, threads = names(good_example=["127.0.0.1"]), list[threading.Thread]()

    def look_up(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return known(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    resolver = Resolver()
    for _ in range(2):
        assert resolver.look_up("good.example", 80, AMPLE_SECONDS)
        with pytest.raises(NameUnknown):
            resolver.look_up("unknown.example", 80, AMPLE_SECONDS)
    assert len(threads) == 4 and len(set(threads)) == 1
    threads[0].join(AMPLE_SECONDS)
    assert not threads[0].is_alive()
    assert resolver.look_up("good.example", 80, AMPLE_SECONDS)


# Many at once ------------------------------------------------------------------------------------


def by_path(visit: Visit) -> None:
    """Answers `/hang` never, `/drip` without end, `/slow` after 0.6 s, all else at once."""
    while request := visit.receive():
        if request.path == "/drip":
            visit.drip(itertools.cycle(b"x"))
        if request.path == "/hang":
            visit.receiver.stopped.wait()
        if request.path == "/slow":
            visit.receiver.stopped.wait(0.6)
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def test_a_deadline_ends_with_its_request() -> None:
    with receiving(by_path) as receiver, new_session(total_seconds=1) as session:
        base = f"http://127.0.0.1:{receiver.port}"
        for _ in range(2):
            # The second is on the same connection when the first would have been cut off.
            assert session.get(f"{base}/slow").content == b"ok"
    assert receiver.connections == 1


def test_a_reused_connection_times_out_too(hasty: Session) -> None:
    with receiving(by_path) as receiver:
        base = f"http://127.0.0.1:{receiver.port}"
        hasty.get(base)
        with bounded(), pytest.raises(CallTimedOut):
            hasty.get(f"{base}/drip")
        assert receiver.connections == 1
        assert hasty.get(base).status_code == 200


def test_a_connection_made_too_late_is_not_used(hasty: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def connect_late(sock: socket.socket, address: Any) -> None:
        time.sleep(TOTAL_SECONDS)
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", connect_late)
    with receiving(answers()) as receiver, pytest.raises(CallTimedOut):
        hasty.get(receiver.url)
    assert not receiver.received


def test_a_call_releases_its_socket_before_another_can_have_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Any] = []
    really = HTTPConnectionPool._put_conn

    def put(pool: Any, conn: Any) -> None:
        watched.append(outbound._CALL.get()._socket)
        really(pool, conn)

    with receiving(answers()) as receiver:
        session.get(receiver.url)
        monkeypatch.setattr(HTTPConnectionPool, "_put_conn", put)
        session.get(receiver.url)
    assert watched == [None]


def test_a_deadline_does_not_affect_other_threads() -> None:
    with (
        receiving(by_path) as receiver,
        new_session(total_seconds=1) as session,
        ThreadPoolExecutor(4) as threads,
    ):
        base = f"http://127.0.0.1:{receiver.port}"
        session.get(base)
        hanging = [threads.submit(session.get, f"{base}/hang") for _ in range(3)]
        while not all(one.done() for one in hanging):
            assert session.get(base).status_code == 200
        assert {type(one.exception()) for one in hanging} == {CallTimedOut}
        assert session.get(base).status_code == 200


def test_two_hundred_concurrent_calls_end_in_time() -> None:
    paths = ["/hang" if number % 20 == 0 else "/" for number in range(200)]
    with receiving(by_path) as receiver, new_session(total_seconds=2) as session:
        base = f"http://127.0.0.1:{receiver.port}"
        with ThreadPoolExecutor(64) as threads, bounded(2):
            outcomes = list(threads.map(lambda path: status_of(session, base + path), paths))
    assert outcomes == [None if path == "/hang" else 200 for path in paths]
    assert receiver.connections <= 64 + 10


def status_of(session: Session, url: str) -> int | None:
    try:
        return session.get(url).status_code
    except CallTimedOut:
        return None


def test_there_is_one_watchdog_and_no_leaked_descriptor(session: Session) -> None:
    with receiving(by_path) as receiver:
        base = f"http://127.0.0.1:{receiver.port}"
        session.get(base)
        before = descriptors()
        for _ in range(20):
            session.get(base)
        assert descriptors() <= before
    assert [thread.name for thread in threading.enumerate()].count("watchdog") == 1


def test_an_ended_call_does_not_wake_the_watchdog(session: Session) -> None:
    with receiving(answers()) as receiver:
        session.get(receiver.url)
    with outbound._WATCHDOG._changed:
        assert outbound._WATCHDOG._seconds() is None


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_child_process_has_a_watchdog_of_its_own(hasty: Session) -> None:
    with receiving(receivers.drips_body) as receiver:
        with pytest.raises(CallTimedOut):
            hasty.get(receiver.url)
        child = os.fork()
        if child == 0:
            os._exit(0 if ends_by_deadline(receiver.url) else 1)
        assert exit_code_of(child) == 0


def ends_by_deadline(url: str) -> bool:
    try:
        new_session().get(url)
    except CallTimedOut:
        return True
    except OutboundError:
        return False
    return False


def exit_code_of(child: int) -> int:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# stripe-python -----------------------------------------------------------------------------------


@pytest.mark.parametrize("behave", [receivers.resets_at_once, *(behave for behave, _ in BAD)])
def test_stripe_reports_each_failure_as_a_connection_error(session: Session, behave: Behaviour) -> None:
    with receiving(behave) as receiver, pytest.raises(stripe.APIConnectionError):
        stripe_client(session, receiver.url).v1.balance.retrieve()


@pytest.mark.parametrize("behave", SLOW)
def test_a_stripe_call_to_a_slow_receiver_times_out(hasty: Session, behave: Behaviour) -> None:
    with receiving(behave) as receiver, bounded(), pytest.raises(stripe.APIConnectionError) as raised:
        stripe_client(hasty, receiver.url).v1.balance.retrieve()
    assert raised.value.should_retry


def test_stripe_calls_work_through_the_session(session: Session) -> None:
    with receiving(answers(200, b'{"object": "balance", "livemode": false}')) as receiver:
        client = stripe_client(session, receiver.url)
        for _ in range(3):
            assert client.v1.balance.retrieve().livemode is False
    assert receiver.connections == 1
    assert receiver.last.headers["User-Agent"].startswith("Stripe/")


def stripe_client(session: Session, url: str) -> stripe.StripeClient:
    base = url.removesuffix("/in")
    return stripe.StripeClient(
        "sk_test_0123456789",
        max_network_retries=0,
        http_client=stripe.RequestsClient(session=session),
        base_addresses={"api": base, "connect": base, "files": base, "meter_events": base},
    )
