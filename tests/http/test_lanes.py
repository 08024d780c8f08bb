"""Lanes: password checks wait for each other, and no other call waits for them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import pytest
import structlog

from billing.errors import Overloaded
from billing.handlers import authentication
from billing.http.lanes import PASSWORD_THREADS, Lane, Lanes, lane_of, runs_in

LONG = 30.0
SHORT = 0.05


class Work:
    """Calls that last until they are told to end."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self.begun = threading.Semaphore(0)
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.begun.release()
        assert self._end.wait(10)
        with self._lock:
            self.running -= 1
        return "done"

    def end(self) -> None:
        self._end.set()


@contextmanager
def working() -> Iterator[Work]:
    work = Work()
    try:
        yield work
    finally:
        work.end()


async def begin(lanes: Lanes, lane: Lane, work: Work, times: int) -> list[asyncio.Task[str]]:
    """Start that many calls, and wait until all are running."""
    tasks = [asyncio.create_task(lanes.run(lane, work)) for _ in range(times)]
    for _ in range(times):
        await asyncio.to_thread(work.begun.acquire, timeout=10)
    return tasks


async def is_overloaded(lanes: Lanes, lane: Lane, call: Callable[[], Any] = lambda: "done") -> bool:
    try:
        await lanes.run(lane, call)
    except Overloaded:
        return True
    return False


def test_a_third_simultaneous_password_check_is_refused_as_overloaded() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 2, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=SHORT)
        tasks = await begin(lanes, Lane.PASSWORDS, work, 2)
        started = perf_counter()
        assert await is_overloaded(lanes, Lane.PASSWORDS)
        assert perf_counter() - started >= SHORT
        work.end()
        assert await asyncio.gather(*tasks) == ["done", "done"]
        assert not await is_overloaded(lanes, Lane.PASSWORDS)
        assert work.most == 2

    with working() as work:
        asyncio.run(scenario(work))


def test_a_waiting_password_check_gets_a_thread_freed_in_time() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 2, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=LONG)
        tasks = await begin(lanes, Lane.PASSWORDS, work, 2)
        third = asyncio.create_task(lanes.run(Lane.PASSWORDS, lambda: "third"))
        await asyncio.sleep(SHORT)
        assert not third.done()
        work.end()
        assert await asyncio.gather(third, *tasks) == ["third", "done", "done"]

    with working() as work:
        asyncio.run(scenario(work))


def test_password_checks_run_two_at_a_time_and_refused_ones_hold_no_thread() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 2, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=SHORT)
        tasks = await begin(lanes, Lane.PASSWORDS, work, 2)
        refused = await asyncio.gather(*(is_overloaded(lanes, Lane.PASSWORDS) for _ in range(50)))
        assert refused == [True] * 50
        assert lanes._lanes[Lane.PASSWORDS].waiting == 0
        work.end()
        await asyncio.gather(*tasks)
        next_work = Work()
        more = await begin(lanes, Lane.PASSWORDS, next_work, 2)
        next_work.end()
        assert await asyncio.gather(*more) == ["done", "done"]

    with working() as work:
        asyncio.run(scenario(work))


def test_one_tenant_uses_at_most_half_of_the_threads() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 4}, longest_wait_seconds=LONG)
        calls = [asyncio.create_task(lanes.run(Lane.GENERAL, work, whose="acme")) for _ in range(10)]
        for _ in range(2):
            await asyncio.to_thread(work.begun.acquire, timeout=10)
        assert await lanes.run(Lane.GENERAL, lambda: "globex", whose="globex") == "globex"
        assert await lanes.run(Lane.GENERAL, lambda: "a stranger") == "a stranger"
        assert work.running == 2
        work.end()
        assert await asyncio.gather(*calls) == ["done"] * 10
        assert work.most == 2

    with working() as work:
        asyncio.run(scenario(work))


def test_password_changes_of_all_tenants_leave_half_of_the_threads_to_logins() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.PASSWORDS: 2}, longest_wait_seconds=LONG)
        tenants = ["acme", "globex", "initech"]
        calls = [asyncio.create_task(lanes.run(Lane.PASSWORDS, work, whose=whose)) for whose in tenants]
        await asyncio.to_thread(work.begun.acquire, timeout=10)
        assert await lanes.run(Lane.PASSWORDS, lambda: "a login") == "a login"
        work.end()
        assert await asyncio.gather(*calls) == ["done"] * 3
        assert work.most == 1

    with working() as work:
        asyncio.run(scenario(work))


def test_a_tenant_may_use_the_only_thread() -> None:
    lanes = Lanes({Lane.GENERAL: 1}, longest_wait_seconds=SHORT)
    assert asyncio.run(lanes.run(Lane.GENERAL, lambda: "acme", whose="acme")) == "acme"


def test_a_call_that_waited_too_long_holds_no_share() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 2}, longest_wait_seconds=SHORT)
        first = asyncio.create_task(lanes.run(Lane.GENERAL, work, whose="acme"))
        await asyncio.to_thread(work.begun.acquire, timeout=10)
        for _ in range(3):
            with pytest.raises(Overloaded):
                await lanes.run(Lane.GENERAL, lambda: "acme", whose="acme")
        # Nor does a call whose own share is free but no thread is. A share exists while it is referenced.
        kept = lanes._lanes[Lane.GENERAL]._share_of("initech")
        other = asyncio.create_task(lanes.run(Lane.GENERAL, work, whose="globex"))
        await asyncio.to_thread(work.begun.acquire, timeout=10)
        with pytest.raises(Overloaded):
            await lanes.run(Lane.GENERAL, lambda: "initech", whose="initech")
        work.end()
        await asyncio.gather(first, other)
        for whose in ("acme", "globex", "initech"):
            assert await lanes.run(Lane.GENERAL, lambda: "again", whose=whose) == "again"
        assert not kept.locked()

    with working() as work:
        asyncio.run(scenario(work))


def test_a_general_call_does_not_wait_for_passwords() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=LONG)
        await begin(lanes, Lane.PASSWORDS, work, 2)
        waiting = [asyncio.create_task(is_overloaded(lanes, Lane.PASSWORDS)) for _ in range(20)]
        await asyncio.sleep(0)
        started = perf_counter()
        assert await lanes.run(Lane.GENERAL, lambda: "general") == "general"
        assert perf_counter() - started < 5
        assert work.running == 2
        assert not any(task.done() for task in waiting)
        work.end()
        assert await asyncio.gather(*waiting) == [False] * 20

    with working() as work:
        asyncio.run(scenario(work))


def test_passwords_do_not_wait_for_general_calls() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 3, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=SHORT)
        await begin(lanes, Lane.GENERAL, work, 3)
        assert not await is_overloaded(lanes, Lane.PASSWORDS)
        assert await is_overloaded(lanes, Lane.GENERAL)
        work.end()

    with working() as work:
        asyncio.run(scenario(work))


def test_a_call_releases_its_place_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        lanes = Lanes({Lane.GENERAL: 1}, longest_wait_seconds=SHORT)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                assert await is_overloaded(lanes, Lane.GENERAL)
        assert await lanes.run(Lane.GENERAL, lambda: "next") == "next"

    asyncio.run(scenario())


def test_stop_iteration_in_a_call_is_raised_as_a_runtime_error() -> None:
    async def scenario() -> None:
        lanes = Lanes({Lane.GENERAL: 1})
        with pytest.raises(RuntimeError) as raised:
            await asyncio.wait_for(lanes.run(Lane.GENERAL, lambda: next(iter(()))), LONG)
        assert isinstance(raised.value.__cause__, StopIteration)

    asyncio.run(scenario())


def test_a_call_that_outlives_its_request_is_logged_and_awaited_at_shutdown() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 2})
        with structlog.contextvars.bound_contextvars(request_id="the-late-one"):
            (task,) = await begin(lanes, Lane.GENERAL, work, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ending = asyncio.create_task(lanes.emptied())
        await asyncio.sleep(SHORT)
        assert not ending.done()
        work.end()
        await ending
        assert work.running == 0

    merge = structlog.contextvars.merge_contextvars
    with working() as work, structlog.testing.capture_logs(processors=[merge]) as events:
        asyncio.run(scenario(work))
    assert [(event["event"], event.get("request_id")) for event in events] == [
        ("a call ended after its request", "the-late-one")
    ]


@pytest.mark.parametrize("error", [ValueError, TimeoutError])
def test_an_exception_in_a_call_is_raised_and_frees_its_thread(error: type[Exception]) -> None:
    def fail() -> None:
        raise error

    async def scenario() -> None:
        lanes = Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=SHORT)
        for _ in range(5):
            with pytest.raises(error):
                await lanes.run(Lane.GENERAL, fail)

    asyncio.run(scenario())


def test_a_cancelled_waiting_call_frees_its_place() -> None:
    async def scenario(work: Work) -> None:
        lanes = Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: PASSWORD_THREADS}, longest_wait_seconds=LONG)
        (task,) = await begin(lanes, Lane.GENERAL, work, 1)
        waiting = asyncio.create_task(lanes.run(Lane.GENERAL, lambda: "never"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        work.end()
        await task
        assert await lanes.run(Lane.GENERAL, lambda: "next") == "next"

    with working() as work:
        asyncio.run(scenario(work))


def test_calls_run_off_the_event_loop() -> None:
    ran_in = asyncio.run(
        Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: PASSWORD_THREADS}).run(Lane.GENERAL, threading.current_thread)
    )
    assert ran_in is not threading.main_thread()


def test_an_unmarked_handler_is_in_the_general_lane_only_if_it_waits() -> None:
    @runs_in(Lane.PASSWORDS)
    def marked() -> str:
        return "itself"

    assert (lane_of(marked, waits=False), marked()) == (Lane.PASSWORDS, "itself")
    assert lane_of(lambda: None, waits=True) is Lane.GENERAL
    assert lane_of(lambda: None, waits=False) is None


def test_exactly_the_handlers_that_hash_run_in_the_password_lane() -> None:
    for name, handler in inspect.getmembers(authentication, inspect.isfunction):
        if handler.__module__ == authentication.__name__:
            hashes = "passwords" in inspect.signature(handler).parameters
            assert (lane_of(handler, waits=True) is Lane.PASSWORDS) == hashes, name
