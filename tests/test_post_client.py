"""POSTs to one URL: each is answered or an error; only one lost on a kept connection is sent once more."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from billing.outbound import (
    AddressRefused,
    Bounds,
    CallTimedOut,
    ConnectionBroken,
    NameUnknown,
    Resolver,
    UrlInvalid,
    tls_context,
)
from billing.post_client import PostClient
from tests import receivers
from tests.receivers import MEGABYTE, Behaviour, Names, Visit, answers, receiving

TOTAL_SECONDS = 0.3
# A busy machine must not fail a test.
LATE_SECONDS = 1
AMPLE_SECONDS = 5


def client_for(url: str, *, resolver: Resolver | None = None, **changes: Any) -> PostClient:
    """A client whose deadline is too far away to be hit by chance."""
    ample = {"connect_seconds": AMPLE_SECONDS, "total_seconds": AMPLE_SECONDS, "max_bytes": 64 * 1024}
    return PostClient(url, Bounds(**{**ample, **changes}), resolver=resolver or Resolver(), tls=tls_context())


def post(opened: PostClient) -> int:
    return opened.post(b"{}", {"X-Mine": "1"}).status


@pytest.mark.parametrize("status", [200, 204, 301, 404, 500])
def test_a_client_reuses_its_connection(status: int) -> None:
    with (
        receiving(answers(status, b"" if status == 204 else b"ok")) as receiver,
        client_for(receiver.url) as opened,
    ):
        assert [post(opened) for _ in range(5)] == [status] * 5
    assert receiver.connections == 1
    assert [one.body for one in receiver.received] == [b"{}"] * 5


def repeats(data: bytes) -> Behaviour:
    """Sends these bytes in answer to each request of the connection."""

    def behave(visit: Visit) -> None:
        while visit.receive():
            visit.send(data)

    return behave


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmore",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmore\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
def test_a_connection_that_is_unsafe_to_reuse_is_not_kept(data: bytes) -> None:
    with receiving(repeats(data)) as receiver, client_for(receiver.url, max_bytes=3, cut=True) as opened:
        for number in (1, 2):
            post(opened)
            assert receiver.connections == number


def test_informational_responses_before_the_answer_are_skipped() -> None:
    announced = (
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 9\r\n\r\n"
    )
    answer = announced + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with receiving(repeats(answer)) as receiver, client_for(receiver.url) as opened:
        assert [opened.post(b"{}", {}).body for _ in range(3)] == [b"ok"] * 3
    assert receiver.connections == 1


def test_unsolicited_data_on_a_kept_connection_is_not_an_answer() -> None:
    said = threading.Event()

    def behave(visit: Visit) -> None:
        visit.receive()
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        said.wait(AMPLE_SECONDS)
        visit.send(b"HTTP/1.1 500 Not This\r\nContent-Length: 0\r\n\r\n")
        visit.receiver.ended.release()
        visit.receiver.stopped.wait()

    with receiving(behave) as receiver, client_for(receiver.url) as opened:
        assert post(opened) == 200
        said.set()
        assert receiver.ended.acquire(timeout=AMPLE_SECONDS)
        assert post(opened) == 200
    assert receiver.connections == 2


def answers_once_then(end: Behaviour) -> Behaviour:
    """Answers the first request of a connection, and reads the second before it ends."""

    def behave(visit: Visit) -> None:
        visit.receive()
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        end(visit)

    return behave


@pytest.mark.parametrize("end", [receivers.says(b""), receivers.resets])
def test_a_request_lost_on_a_kept_connection_is_sent_once_more_on_a_new_one(end: Behaviour) -> None:
    with receiving(answers_once_then(end)) as receiver, client_for(receiver.url) as opened:
        assert [post(opened), post(opened)] == [200, 200]
    assert (receiver.connections, len(receiver.received)) == (2, 3)


@pytest.mark.parametrize("end", [receivers.says(b""), receivers.resets])
def test_a_request_lost_on_a_new_connection_is_not_sent_again(end: Behaviour) -> None:
    with receiving(end) as receiver, client_for(receiver.url) as opened, pytest.raises(ConnectionBroken):
        post(opened)
    assert len(receiver.received) == 1


@pytest.mark.parametrize(
    "data", [b"H", b"HTTP/1.1 200 OK\r\nX", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]
)
def test_a_request_whose_answer_has_begun_is_not_sent_again(data: bytes) -> None:
    with (
        receiving(answers_once_then(receivers.breaks_off(data))) as receiver,
        client_for(receiver.url) as opened,
    ):
        assert post(opened) == 200
        with pytest.raises(ConnectionBroken):
            post(opened)
    assert (receiver.connections, len(receiver.received)) == (1, 2)


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_early_answer_to_the_request_head_is_read(is_kept: bool) -> None:
    early = receivers.answers_head(410)
    with (
        receiving(answers_once_then(early) if is_kept else early) as receiver,
        client_for(receiver.url) as opened,
    ):
        if is_kept:
            assert post(opened) == 200
        # More than the socket buffers hold.
        assert opened.post(b"x" * 50 * MEGABYTE, {}).status == 410
    assert receiver.connections == 1


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 16 * 1024 + 1, MEGABYTE])
def test_a_body_of_any_size_arrives_whole(size: int) -> None:
    with receiving(answers()) as receiver, client_for(receiver.url) as opened:
        assert [opened.post(b"x" * size, {}).status for _ in range(2)] == [200, 200]
    assert [one.body for one in receiver.received] == [b"x" * size] * 2
    assert (receiver.connections, receiver.last.headers["Content-Length"]) == (1, str(size))


def test_a_request_that_times_out_on_a_kept_connection_is_not_sent_again() -> None:
    with (
        receiving(answers_once_then(receivers.drips_head)) as receiver,
        client_for(receiver.url, total_seconds=TOTAL_SECONDS) as opened,
    ):
        post(opened)
        began = time.monotonic()
        with pytest.raises(CallTimedOut):
            post(opened)
    assert time.monotonic() - began < TOTAL_SECONDS + LATE_SECONDS
    assert len(receiver.received) == 2


def test_no_connection_outlives_its_client() -> None:
    inside = threading.Semaphore(0)

    def behave(visit: Visit) -> None:
        while visit.receive():
            inside.release()
            visit.receiver.ended.acquire(timeout=AMPLE_SECONDS)
            visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    before = descriptors()
    with receiving(behave) as receiver, ThreadPoolExecutor(2) as threads:
        with client_for(receiver.url) as opened:
            posted = [threads.submit(post, opened) for _ in range(2)]
            assert inside.acquire(timeout=AMPLE_SECONDS) and inside.acquire(timeout=AMPLE_SECONDS)
            receiver.ended.release()
            while not any(one.done() for one in posted):
                time.sleep(0.01)
        # One connection was kept when the client closed, the other is answered only now.
        receiver.ended.release()
        assert [one.result() for one in posted] == [200, 200]
    assert descriptors() <= before


# Names -------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    stub = Names({"a.example": ["127.0.0.1"]})
    monkeypatch.setattr(socket, "getaddrinfo", stub)
    return stub


def test_many_requests_of_a_client_resolve_the_name_once(names: Names) -> None:
    with (
        receiving(answers(Connection="close")) as receiver,
        client_for(f"http://a.example:{receiver.port}/in?a=1") as opened,
        ThreadPoolExecutor(16) as threads,
    ):
        assert list(threads.map(post, [opened] * 64)) == [200] * 64
    assert (receiver.connections, names.looked_up) == (64, ["a.example"])
    assert (receiver.last.path, receiver.last.headers["Host"]) == ("/in?a=1", f"a.example:{receiver.port}")


def test_every_connection_of_a_client_checks_the_address_again(names: Names) -> None:
    verdicts = iter([True, False])
    with (
        receiving(answers(Connection="close")) as receiver,
        client_for(f"http://a.example:{receiver.port}/", permitted=lambda _: next(verdicts)) as opened,
    ):
        assert post(opened) == 200
        with pytest.raises(AddressRefused):
            post(opened)
    assert receiver.connections == 1


def test_a_hanging_lookup_holds_one_thread_for_all_its_callers(hanging_resolver: threading.Event) -> None:
    resolver = Resolver(threads=2)
    with (
        receiving(answers()) as receiver,
        client_for("http://hangs.example/", resolver=resolver, connect_seconds=0.2) as hanging,
        client_for(f"http://good.example:{receiver.port}/", resolver=resolver) as good,
        ThreadPoolExecutor(4) as threads,
    ):
        posted = [threads.submit(post, hanging) for _ in range(3)]
        # This one still waits when the earlier ones have given up.
        time.sleep(0.1)
        posted.append(threads.submit(post, hanging))
        assert post(good) == 200
        assert {type(one.exception()) for one in posted} == {NameUnknown}
        with client_for(f"http://good.example:{receiver.port}/", resolver=resolver) as another:
            assert post(another) == 200


@pytest.mark.parametrize("url", ["ftp://a.example/", "http://", "a.example", "http://a.example:b/", "http:a"])
def test_a_client_requires_an_http_url(url: str) -> None:
    with pytest.raises(UrlInvalid):
        client_for(url)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
