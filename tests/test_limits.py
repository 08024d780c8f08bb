"""Limits: windows, what is left of them, and the tables of docs/limits.md."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from billing.counters import InProcess
from billing.http.document import load, operations
from billing.limits import UNLIMITED, Meter, Policies, Policy, Usage
from billing.tenants import Tier
from tests.clock import TurnedClock

POLICY = Policy("things", 3, 60)
PEPPER = b"p" * 32
DOCS = Path(__file__).parents[1] / "docs/limits.md"


@pytest.fixture
def clock() -> TurnedClock:
    clock = TurnedClock()
    clock.now = datetime(2026, 1, 15, 9, 30, 0, 500_000, tzinfo=UTC)
    return clock


@pytest.fixture
def meter(clock: TurnedClock) -> Meter:
    return Meter(InProcess(), PEPPER, clock)


def count(meter: Meter, subject: str = "acme", *, times: int = 1, policy: Policy = POLICY) -> Usage:
    """How it stands after so many."""
    for _ in range(times):
        usage = asyncio.run(meter.count(policy, subject))
    return usage


# Windows -----------------------------------------------------------------------------------------


def test_what_is_left_counts_down_to_nothing_and_no_further(meter: Meter) -> None:
    counted = [count(meter) for _ in range(5)]
    assert [usage.remaining for usage in counted] == [2, 1, 0, 0, 0]
    assert [usage.is_over for usage in counted] == [False, False, False, True, True]


def test_each_subject_and_each_policy_has_its_own(meter: Meter) -> None:
    assert count(meter, times=4).is_over
    assert count(meter, "globex").remaining == 2
    assert count(meter, policy=Policy("others", 3, 60)).remaining == 2


@pytest.mark.parametrize("seconds", [1, 60, 300, 3600])
@pytest.mark.parametrize("subject", ["acme", "globex", "192.0.2.1", "2001db8::/64"])
def test_the_seconds_left_are_enough_to_wait_and_no_more_than_the_window(
    meter: Meter, clock: TurnedClock, subject: str, seconds: int
) -> None:
    policy = Policy("things", 1, seconds)
    over = count(meter, subject, times=2, policy=policy)
    assert over.is_over
    assert 1 <= over.window.seconds_left <= seconds
    clock.turn(seconds=over.window.seconds_left)
    assert not count(meter, subject, policy=policy).is_over


def test_until_its_end_a_window_stays_over(meter: Meter, clock: TurnedClock) -> None:
    over = count(meter, times=4)
    clock.turn(seconds=over.window.seconds_left - 1.01)
    assert count(meter).is_over


def test_windows_of_many_subjects_do_not_end_together(meter: Meter) -> None:
    ends = {meter.window(POLICY, str(number)).seconds_left for number in range(500)}
    assert len(ends) > 50


def test_what_is_taken_back_was_not_counted(meter: Meter) -> None:
    usage = count(meter, times=3)
    asyncio.run(meter.take_back(usage))
    assert count(meter).remaining == 0


def test_to_look_counts_nothing(meter: Meter) -> None:
    count(meter)
    assert [asyncio.run(meter.peek(POLICY, "acme")).remaining for _ in range(3)] == [2] * 3
    assert asyncio.run(meter.peek(POLICY, "globex")).remaining == 3


def test_what_is_forgotten_begins_anew(meter: Meter) -> None:
    asyncio.run(meter.forget(count(meter, times=4)))
    assert count(meter).remaining == 2


def test_a_key_names_the_policy_and_not_the_subject(meter: Meter) -> None:
    key = meter.window(POLICY, "192.0.2.1 ada@acme.example").key
    assert re.fullmatch(r"things:[0-9a-f]{32}:[0-9]+", key)


def test_without_the_pepper_a_subject_cannot_be_guessed_from_its_key(clock: TurnedClock) -> None:
    one, other = (Meter(InProcess(), pepper, clock).window(POLICY, "acme").key for pepper in (b"a", b"b"))
    assert one.split(":")[1] != other.split(":")[1]


def test_processes_agree_whatever_they_counted_before(meter: Meter, clock: TurnedClock) -> None:
    count(meter, times=2)
    assert Meter(InProcess(), PEPPER, clock).window(POLICY, "acme") == meter.window(POLICY, "acme")
    clock.turn(seconds=61)
    assert Meter(InProcess(), PEPPER, clock).window(POLICY, "acme") == meter.window(POLICY, "acme")


# In this process ---------------------------------------------------------------------------------


def test_more_subjects_than_there_is_room_for_drop_those_idle_for_longest() -> None:
    counters = InProcess(most=100)

    async def story() -> int:
        await counters.add("first", 1, seconds=60)
        await counters.add("busy", 5, seconds=60)
        for number in range(10_000):
            await counters.add(str(number), 1, seconds=60)
            await counters.add("busy", 1, seconds=60)
        return await counters.add("busy", 0, seconds=60)

    assert asyncio.run(story()) == 10_005
    assert len(counters.counts) == 100
    assert "first" not in counters.counts


# What is limited ---------------------------------------------------------------------------------


def test_every_operation_has_a_limit() -> None:
    public = {o.operation_id for o in operations(load()) if not o.schemes}
    assert Policies().by_address.keys() == public
    assert Policies().by_tenant.keys() == set(Tier.__args__)  # type: ignore[attr-defined]


def test_what_else_is_limited_is_an_operation() -> None:
    known = {o.operation_id for o in operations(load())}
    assert Policies().costly.keys() | Policies().wrong_passwords.keys() <= known
    assert Policies().brakes.keys() <= Policies().wrong_passwords.keys()


def test_one_address_alone_brings_no_brake_on_and_a_brake_leaves_each_address_something() -> None:
    for operation, brake in Policies().brakes.items():
        usual = Policies().wrong_passwords[operation]
        windows = brake.over.seconds // usual.seconds + 1
        assert windows * usual.quota < brake.over.quota
        assert 0 < brake.then.quota / brake.then.seconds < usual.quota / usual.seconds


def test_unlimited_is_without_any() -> None:
    assert not any(vars(UNLIMITED).values())


def said(policy: Policy) -> tuple[str, str, str]:
    spans = {60: "minute", 300: "5 minutes", 3600: "hour"}
    return f"`{policy.name}`", f"{policy.quota:,}", spans[policy.seconds]


def test_the_tables_of_the_docs_are_the_code() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `")
    ]
    policies = Policies()
    assert policies.bad_credentials is not None
    assert rows == [
        *((*said(policy), f"`{operation}`") for operation, policy in policies.by_address.items()),
        (*said(policies.bad_credentials), "those whose credentials are missing or bad"),
        *((*said(policy), f"tier `{tier}`") for tier, policy in policies.by_tenant.items()),
        *((*said(policy), f"`{operation}`") for operation, policy in policies.costly.items()),
        *((*said(policy), f"`{operation}`") for operation, policy in policies.wrong_passwords.items()),
        *((*said(brake.over), f"`{op}`, from all addresses") for op, brake in policies.brakes.items()),
        *((*said(brake.then), f"`{op}`, beyond that") for op, brake in policies.brakes.items()),
    ]


def test_the_clock_of_a_window_is_the_one_that_was_given(meter: Meter, clock: TurnedClock) -> None:
    before = count(meter, times=3)
    clock.now += timedelta(days=365)
    assert count(meter).remaining == 2
    assert before.remaining == 0
