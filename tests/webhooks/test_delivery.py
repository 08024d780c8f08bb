"""Deliveries: the verdict on each outcome of an attempt, and when the next attempt is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.webhooks.delivery import RETRY_DELAYS, Attempt, Verdict, judge

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = datetime(2026, 1, 15, 10, 2, 11, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = (
    timedelta(**unit) for unit in ({"seconds": 1}, {"minutes": 1}, {"hours": 1}, {"days": 1})
)
LAST = 10
# Before attempt 3, whose delay is 5 minutes.
SECOND_ATTEMPT = 2


def wait_after(attempt_number: int, outcome: Attempt, *, jitter: float = 0) -> timedelta:
    """How long until the next attempt, where there is one."""
    verdict = judge(attempt_number, outcome, NOW, jitter=jitter)
    assert verdict.status == "pending"
    assert verdict.next_attempt_at is not None
    return verdict.next_attempt_at - NOW


def ended(http_status: int | None, error: Any = None, retry_after: str | None = None) -> Attempt:
    return Attempt(http_status, error, 0, retry_after=retry_after)


def refused(status: int = 503, *, retry_after: str | None = None) -> Attempt:
    return ended(status, None, retry_after)


# Success and failure -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 250, 299])
@pytest.mark.parametrize("attempt_number", [1, 5, LAST])
def test_any_2xx_status_is_delivered(status: int, attempt_number: int) -> None:
    delivered = Verdict("delivered", next_attempt_at=None, gone=False)
    assert judge(attempt_number, ended(status), NOW, jitter=0) == delivered
    assert judge(attempt_number, ended(status, "timeout", "60"), NOW, jitter=0) == delivered


FAILURES = [
    *(
        pytest.param(refused(status), id=str(status))
        for status in (
            100,
            199,
            300,
            301,
            302,
            304,
            307,
            308,
            400,
            401,
            404,
            409,
            413,
            422,
            429,
            500,
            503,
            599,
        )
    ),
    *(
        pytest.param(ended(None, word), id=word)
        for word in ("connection_failed", "tls_failed", "timeout", "a_word_of_later")
    ),
    pytest.param(ended(None), id="nothing"),
]


@pytest.mark.parametrize("outcome", FAILURES)
def test_any_other_outcome_is_retried_until_the_last_attempt_fails(outcome: Attempt) -> None:
    for attempt_number in range(1, LAST):
        verdict = judge(attempt_number, outcome, NOW, jitter=0)
        assert (verdict.status, verdict.gone) == ("pending", False)
    assert judge(LAST, outcome, NOW, jitter=0) == Verdict("failed", next_attempt_at=None, gone=False)
    assert judge(LAST + 1, outcome, NOW, jitter=0).status == "failed"


@pytest.mark.parametrize("attempt_number", [1, 5, LAST])
def test_410_is_not_retried_and_is_reported_as_gone(attempt_number: int) -> None:
    gone = refused(410, retry_after="60")
    assert judge(attempt_number, gone, NOW, jitter=0) == Verdict("failed", next_attempt_at=None, gone=True)


# The retry schedule ------------------------------------------------------------------------------


def test_the_retry_delays() -> None:
    minutes = [0, 1 / 12, 5, 30, 120, 300, 600, 840, 1200, 1440]
    assert [delay / MINUTE for delay in RETRY_DELAYS] == minutes
    assert len(RETRY_DELAYS) == LAST


@pytest.mark.parametrize("attempt_number", range(1, LAST))
def test_each_retry_waits_its_own_delay_with_20_percent_jitter(attempt_number: int) -> None:
    delay = RETRY_DELAYS[attempt_number]
    assert wait_after(attempt_number, refused()) == delay
    assert wait_after(attempt_number, refused(), jitter=-1) == delay * 0.8
    assert wait_after(attempt_number, refused(), jitter=0.5) == delay * 1.1
    assert wait_after(attempt_number, refused(), jitter=1) == delay * 1.2


# Retry-After -------------------------------------------------------------------------------------


# The delay is 5 minutes, so that a wait is between 300 and 600 seconds. NOW is a Thursday, 10:02:11.
@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("0", 300),
        ("1", 300),
        ("299", 300),
        ("301", 301),
        ("000450", 450),
        ("600", 600),
        ("601", 600),
        ("9999999999", 600),
        ("Thu, 15 Jan 2026 10:09:41 GMT", 450),
        ("Thu, 15 Jan 2026 10:02:12 GMT", 300),
        ("Thu, 15 Jan 2026 12:00:00 GMT", 600),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 300),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600),
    ],
)
def test_retry_after_is_bounded_by_one_and_two_delays(retry_after: str, seconds: int) -> None:
    for status in (503, 429, 302, 500):
        asked = refused(status, retry_after=retry_after)
        assert wait_after(SECOND_ATTEMPT, asked) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("retry_after", "jitter", "seconds"),
    [
        ("0", -1, 300),  # Any Retry-After, even of 0, rules out jitter that shortens the delay.
        ("450", -1, 450),
        ("450", 1, 450),
        ("310", 1, 360),
        ("600", 1, 600),
    ],
)
def test_jitter_never_shortens_a_requested_wait(retry_after: str, jitter: float, seconds: int) -> None:
    asked = refused(retry_after=retry_after)
    assert wait_after(SECOND_ATTEMPT, asked, jitter=jitter) == timedelta(seconds=seconds)


UNSUPPORTED = [
    "",
    " ",
    " 450",
    "450 ",
    "+450",
    "-450",
    "450.0",
    "4.5e2",
    "4_50",
    "0x1c2",
    "450s",
    "450, 460",
    "٤٥٠",
    "45\n",
    "99999999999",
    "9" * 5000,
    "soon",
    "2026-01-15T10:09:41Z",
    "Thu, 15 Jan 2026 10:09:41",
    "Thu, 15 Jan 2026 10:09:41 UTC",
    "Thu, 15 Jan 2026 10:09:41 +0000",
    "Thu, 15 Jan 2026 11:09:41 +0100",
    "Fri, 15 Jan 2026 10:09:41 GMT",
    "thu, 15 jan 2026 10:09:41 gmt",
    "Thu, 15 Jan 2026  10:09:41 GMT",
    "Thu, 15 Jan 2026 10:9:41 GMT",
    "Thu, 15 Jan 2026 10:09:60 GMT",
    "Thu, 15 Jan 2026 10:09:61 GMT",
    "Thu, 32 Jan 2026 10:09:41 GMT",
    "Thu, 15 Jan 26 10:09:41 GMT",
    "Thu, 15 Jan 2026 10:09:41 GMT\n",
    # RFC 9110 calls these obsolete.
    "Thursday, 15-Jan-26 10:09:41 GMT",
    "Thu Jan 15 10:09:41 2026",
]


@pytest.mark.parametrize("retry_after", UNSUPPORTED)
def test_a_retry_after_in_an_unsupported_format_is_ignored(retry_after: str) -> None:
    for jitter in (-1.0, 0.0, 1.0):
        asked = wait_after(SECOND_ATTEMPT, refused(retry_after=retry_after), jitter=jitter)
        assert asked == wait_after(SECOND_ATTEMPT, refused(), jitter=jitter)


# The 60 second minimum ---------------------------------------------------------------------------


@pytest.mark.parametrize("overloaded", [refused(429), ended(None, "timeout"), ended(500, "timeout")])
def test_at_least_60_seconds_after_429_or_a_timeout(overloaded: Attempt) -> None:
    for jitter in (-1.0, 0.0, 1.0):
        assert wait_after(1, overloaded, jitter=jitter) == MINUTE
        assert wait_after(2, overloaded, jitter=jitter) == 5 * MINUTE * (1 + 0.2 * jitter)


@pytest.mark.parametrize(("retry_after", "seconds"), [("0", 60), ("8", 60), ("61", 60), ("3600", 60)])
def test_the_60_second_minimum_overrides_retry_after_on_the_first_attempt(
    retry_after: str, seconds: int
) -> None:
    assert wait_after(1, refused(429, retry_after=retry_after)) == timedelta(seconds=seconds)


def test_other_failures_have_no_60_second_minimum() -> None:
    assert wait_after(1, refused(503)) == 5 * SECOND
    assert wait_after(1, refused(503, retry_after="3600")) == 10 * SECOND
    assert wait_after(1, ended(None, "connection_failed")) == 5 * SECOND


# Properties of any outcome -----------------------------------------------------------------------


attempts = st.integers(1, LAST - 1)
jitters = st.floats(-1, 1)
retry_afters = (
    st.none()
    | st.integers(0, 10**12).map(str)
    | st.datetimes().map(lambda moment: moment.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    | st.text()
)
failures = st.builds(
    ended,
    st.none() | st.integers(300, 599).filter(lambda status: status != 410),
    st.none() | st.sampled_from(["timeout", "connection_failed", "tls_failed", "bad_status"]),
    retry_afters,
)


@UNHURRIED
@given(attempt_number=attempts, outcome=failures, jitter=jitters)
def test_every_wait_is_within_bounds(attempt_number: int, outcome: Attempt, jitter: float) -> None:
    delay, wait = RETRY_DELAYS[attempt_number], wait_after(attempt_number, outcome, jitter=jitter)
    assert wait > timedelta(0)
    assert delay * 0.8 <= wait <= max(delay * 2, MINUTE)
    if outcome.retry_after is None:
        assert wait <= max(delay * 1.2, MINUTE)


@UNHURRIED
@given(attempt_number=attempts, outcome=failures, one=jitters, other=jitters)
def test_more_jitter_never_shortens_the_wait(
    attempt_number: int, outcome: Attempt, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    assert wait_after(attempt_number, outcome, jitter=less) <= wait_after(
        attempt_number, outcome, jitter=more
    )


@UNHURRIED
@given(attempt_number=attempts, jitter=jitters, seconds=st.integers(0, 10**6), more=st.integers(0, 10**6))
def test_a_longer_retry_after_never_shortens_the_wait(
    attempt_number: int, jitter: float, seconds: int, more: int
) -> None:
    waits = [
        wait_after(attempt_number, refused(retry_after=wish), jitter=jitter)
        for wish in (None, str(seconds), str(seconds + more))
    ]
    assert waits == sorted(waits)


@UNHURRIED
@given(outcome=failures, jitter=jitters)
def test_each_wait_is_at_least_as_long_as_the_one_before(outcome: Attempt, jitter: float) -> None:
    waits = [wait_after(attempt_number, outcome, jitter=jitter) for attempt_number in range(1, LAST)]
    assert waits == sorted(waits)


@UNHURRIED
@given(
    attempt_number=st.integers(1, LAST + 5),
    status=st.none() | st.integers(100, 599),
    error=st.none() | st.just("timeout"),
    retry_after=retry_afters,
    jitter=jitters,
)
def test_only_a_pending_delivery_has_a_next_attempt(
    attempt_number: int, status: int | None, error: str | None, retry_after: str | None, jitter: float
) -> None:
    verdict = judge(attempt_number, ended(status, error, retry_after), NOW, jitter=jitter)
    assert (verdict.next_attempt_at is not None) == (verdict.status == "pending")
    assert verdict.gone == (status == 410)
    assert not verdict.gone or verdict.status == "failed"
