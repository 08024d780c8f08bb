"""Limits: windows, what is left of them, and the tables of docs/limits.md."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from billing.counters import InProcess
from billing.http.document import load, operations
from billing.limits import STANDARD, UNLIMITED, Meter, Policy, Usage
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
    """The usage after counting so many times."""
    for _ in range(times):
        usage = asyncio.run(meter.count(policy, subject))
    return usage


# Windows -----------------------------------------------------------------------------------------


def test_remaining_counts_down_to_zero_and_no_further(meter: Meter) -> None:
    counted = [count(meter) for _ in range(5)]
    assert [usage.remaining for usage in counted] == [2, 1, 0, 0, 0]
    assert [usage.is_over for usage in counted] == [False, False, False, True, True]


def test_each_subject_and_each_policy_is_counted_separately(meter: Meter) -> None:
    assert count(meter, times=4).is_over
    assert count(meter, "globex").remaining == 2
    assert count(meter, policy=Policy("others", 3, 60)).remaining == 2


@pytest.mark.parametrize("seconds", [1, 60, 300, 3600])
@pytest.mark.parametrize("subject", ["acme", "globex", "192.0.2.1", "2001db8::/64"])
def test_seconds_left_is_long_enough_to_wait_and_at_most_the_window(
    meter: Meter, clock: TurnedClock, subject: str, seconds: int
) -> None:
    policy = Policy("things", 1, seconds)
    over = count(meter, subject, times=2, policy=policy)
    assert over.is_over
    assert 1 <= over.window.seconds_left <= seconds
    clock.turn(seconds=over.window.seconds_left)
    assert not count(meter, subject, policy=policy).is_over


def test_an_exceeded_limit_stays_exceeded_until_the_window_ends(meter: Meter, clock: TurnedClock) -> None:
    over = count(meter, times=4)
    clock.turn(seconds=over.window.seconds_left - 1.01)
    assert count(meter).is_over


def test_windows_of_many_subjects_do_not_end_together(meter: Meter) -> None:
    ends = {meter.window(POLICY, str(number)).seconds_left for number in range(500)}
    assert len(ends) > 50


def test_taking_back_a_count_frees_its_place(meter: Meter) -> None:
    usage = count(meter, times=3)
    asyncio.run(meter.take_back(usage))
    assert count(meter).remaining == 0


def test_peeking_counts_nothing(meter: Meter) -> None:
    count(meter)
    assert [asyncio.run(meter.peek(POLICY, "acme")).remaining for _ in range(3)] == [2] * 3
    assert asyncio.run(meter.peek(POLICY, "globex")).remaining == 3


def test_a_forgotten_count_starts_again_from_zero(meter: Meter) -> None:
    asyncio.run(meter.forget(count(meter, times=4)))
    assert count(meter).remaining == 2


def test_a_counter_key_names_the_policy_but_not_the_subject(meter: Meter) -> None:
    key = meter.window(POLICY, "192.0.2.1 ada@acme.example").key
    assert re.fullmatch(r"things:[0-9a-f]{32}:[0-9]+", key)


def test_the_subject_in_a_counter_key_is_hashed_with_the_pepper(clock: TurnedClock) -> None:
    one, other = (Meter(InProcess(), pepper, clock).window(POLICY, "acme").key for pepper in (b"a", b"b"))
    assert one.split(":")[1] != other.split(":")[1]


def test_windows_are_the_same_in_every_process(meter: Meter, clock: TurnedClock) -> None:
    count(meter, times=2)
    assert Meter(InProcess(), PEPPER, clock).window(POLICY, "acme") == meter.window(POLICY, "acme")
    clock.turn(seconds=61)
    assert Meter(InProcess(), PEPPER, clock).window(POLICY, "acme") == meter.window(POLICY, "acme")


# In this process ---------------------------------------------------------------------------------


def test_beyond_capacity_the_subjects_idle_longest_are_dropped() -> None:
    counters = InProcess(most=100)

    async def scenario() -> int:
        await counters.add("first", 1, seconds=60)
        await counters.add("busy", 5, seconds=60)
        for number in range(10_000):
            await counters.add(str(number), 1, seconds=60)
            await counters.add("busy", 1, seconds=60)
        return await counters.add("busy", 0, seconds=60)

    assert asyncio.run(scenario()) == 10_005
    assert len(counters.counts) == 100
    assert "first" not in counters.counts


# What is limited ---------------------------------------------------------------------------------


def test_every_operation_has_a_limit() -> None:
    public = {o.operation_id for o in operations(load()) if not o.schemes}
    assert STANDARD.by_address.keys() == public
    assert STANDARD.by_tenant.keys() == set(Tier.__args__)  # type: ignore[attr-defined]


def test_costly_and_password_limits_name_existing_operations() -> None:
    known = {o.operation_id for o in operations(load())}
    assert STANDARD.costly.keys() | STANDARD.wrong_passwords.keys() <= known
    assert STANDARD.brakes.keys() <= STANDARD.wrong_passwords.keys()


def test_one_address_cannot_trigger_a_brake_and_a_brake_blocks_no_address_completely() -> None:
    for operation, brake in STANDARD.brakes.items():
        usual = STANDARD.wrong_passwords[operation]
        windows = brake.over.seconds // usual.seconds + 1
        assert windows * usual.quota < brake.over.quota
        assert 0 < brake.then.quota / brake.then.seconds < usual.quota / usual.seconds


def test_unlimited_has_no_policies() -> None:
    assert not any(vars(UNLIMITED).values())


def table_cells(policy: Policy) -> tuple[str, str, str]:
    spans = {60: "minute", 300: "5 minutes", 3600: "hour"}
    return f"`{policy.name}`", f"{policy.quota:,}", spans[policy.seconds]


def test_the_tables_of_the_docs_match_the_policies() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `")
    ]
    policies = STANDARD
    assert policies.bad_credentials is not None
    assert rows == [
        *((*table_cells(policy), f"`{operation}`") for operation, policy in policies.by_address.items()),
        (*table_cells(policies.bad_credentials), "those whose credentials are missing or bad"),
        *((*table_cells(policy), f"tier `{tier}`") for tier, policy in policies.by_tenant.items()),
        *((*table_cells(policy), f"`{operation}`") for operation, policy in policies.costly.items()),
        *((*table_cells(policy), f"`{operation}`") for operation, policy in policies.wrong_passwords.items()),
        *((*table_cells(brake.over), f"`{op}`, from all addresses") for op, brake in policies.brakes.items()),
        *((*table_cells(brake.then), f"`{op}`, beyond that") for op, brake in policies.brakes.items()),
    ]


def test_windows_use_the_injected_clock(meter: Meter, clock: TurnedClock) -> None:
    before = count(meter, times=3)
    clock.now += timedelta(days=365)
    assert count(meter).remaining == 2
    assert before.remaining == 0
