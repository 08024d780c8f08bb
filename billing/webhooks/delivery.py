"""What follows from an attempt to deliver an event: success, a retry at some time, or giving up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Literal
from uuid import UUID

from billing.ports import Tasks

# The task of sending a tenant's endpoint its due deliveries.
DELIVER = "webhook.deliver"

# The delay of each attempt after the one before it; Standard Webhooks 1.0 suggests these.
RETRY_DELAYS = (
    timedelta(0),
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=24),
)
JITTER = 0.2
LONGEST_STRETCH = 2
BREATHER = timedelta(seconds=60)

Status = Literal["pending", "delivered", "failed"]
Failure = Literal["refused_url", "connection_failed", "tls_failed", "timeout", "connection_broken"]
"""Why there is no answer, as a tenant may be told.

- `refused_url`: the URL is not allowed (see `UrlPolicy`).
- `connection_failed`: the name is unknown, or has an address that may not be called, or no address accepted the
  connection. One value for the three, or a tenant could map the network that we are in.
- `tls_failed`: no TLS with a certificate that is valid for the name.
- `timeout`: the answer was not complete in time, whether it never came or dripped.
- `connection_broken`: the connection ended before the answer was complete, or the answer was no HTTP/1.1, or had a
  head of more than 64 KiB.
"""
MESSAGES_OF_FAILURES: Mapping[Failure, str] = {
    "refused_url": "The webhook URL is not allowed.",
    "connection_failed": "The receiver could not be reached.",
    "tls_failed": "The receiver has no certificate that is valid for its name.",
    "timeout": "The receiver did not answer in time.",
    "connection_broken": "The receiver's answer was not complete, or no HTTP.",
}

# Ten digits are three hundred years, and no overflow.
DELAY_SECONDS = re.compile(r"[0-9]{1,10}", re.ASCII)
# RFC 9110, 5.6.7. Its two obsolete forms are ignored: a receiver that sends them loses no event, only its wish.
HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"


@dataclass(frozen=True)
class Delivery:
    """An event on its way to the tenant's endpoint. `attempts` are those begun, `duration_ms` is the last one's."""

    id: UUID
    event_id: UUID
    event_type: str
    status: Status
    attempts: int
    next_attempt_at: datetime | None
    http_status: int | None
    error: str | None
    duration_ms: int | None
    created_at: datetime
    settled_at: datetime | None = None


@dataclass(frozen=True)
class Begun:
    """An attempt about to be made, the first being number 1; `body` and `request_id` are the event's."""

    id: UUID
    event_id: UUID
    event_type: str
    attempt: int
    body: bytes
    request_id: str | None


@dataclass(frozen=True)
class Settled:
    """The result of an attempt, and what follows. `settled_at` is None if there will be another."""

    id: UUID
    attempt: int
    status: Status
    next_attempt_at: datetime | None
    http_status: int | None
    error: str | None
    duration_ms: int
    settled_at: datetime | None


@dataclass(frozen=True)
class Stats:
    """The numbers of deliveries that ended in the last 24 hours, and of those that are pending."""

    delivered_24h: int
    failed_24h: int
    pending: int


@dataclass(frozen=True)
class Attempt:
    """The result of one attempt: either `http_status` or `error` is None.

    `body` is the beginning of the response body. `retry_after` is the header as it came, if of at most 64 characters.
    """

    http_status: int | None
    error: Failure | None
    duration_ms: int
    body: bytes = b""
    retry_after: str | None = None

    @property
    def is_success(self) -> bool:
        """Any 2xx, and nothing else, not even a redirect."""
        return self.http_status is not None and 200 <= self.http_status <= 299

    @property
    def reason(self) -> Failure | Literal["bad_status"] | None:
        """Why it failed, None if it did not."""
        return self.error if self.http_status is None or self.is_success else "bad_status"


@dataclass(frozen=True)
class Verdict:
    """What to do next. `gone`: the receiver wants no more events, and its endpoint is disabled at once."""

    status: Status
    next_attempt_at: datetime | None = None
    gone: bool = False


def judge(number: int, attempt: Attempt, now: datetime, *, jitter: float) -> Verdict:
    """Decide what follows from the result of an attempt, the first being number 1.

    Any 2xx is a success, even if the rest of the response is cut off; all else, a redirect too, is a failure.
    The next attempt is due after the longest of three waits: the delay of `RETRY_DELAYS`, changed by jitter;
    what `Retry-After` asks for, clamped to between one and two of those delays; and, after 429 or a timeout,
    60 seconds. So jitter never shortens what the receiver asked for, and Retry-After never shortens a delay.
    `jitter` is from -1 to 1, and stands for up to 20 % less or more.
    """
    if attempt.is_success:
        return Verdict("delivered")
    if attempt.http_status == HTTPStatus.GONE:
        return Verdict("failed", gone=True)
    if number >= len(RETRY_DELAYS):
        return Verdict("failed")
    delay = RETRY_DELAYS[number]
    wait = max(_jittered(delay, jitter), _asked(attempt, delay, now), _rest(attempt))
    return Verdict("pending", now + wait)


def wake(tasks: Tasks, tenant_id: UUID, now: datetime, *, anew: bool = False) -> None:
    """Have the worker send a tenant's due deliveries now; `anew` also takes the task out of the slow queue."""
    subject = str(tenant_id)
    tasks.add(DELIVER, tenant_id, subject=subject, due_at=now, now=now, queue="webhooks", moved=anew)


def _jittered(delay: timedelta, jitter: float) -> timedelta:
    return delay * (1 + JITTER * jitter)


def _asked(attempt: Attempt, delay: timedelta, now: datetime) -> timedelta:
    wait = _wait_of(attempt.retry_after or "", now)
    return timedelta(0) if wait is None else min(max(wait, delay), LONGEST_STRETCH * delay)


def _rest(attempt: Attempt) -> timedelta:
    tired = attempt.http_status == HTTPStatus.TOO_MANY_REQUESTS or attempt.error == "timeout"
    return BREATHER if tired else timedelta(0)


def _wait_of(retry_after: str, now: datetime) -> timedelta | None:
    """The wait that the header asks for, None if it has neither of its two forms exactly (RFC 9110, 10.2.3)."""
    if DELAY_SECONDS.fullmatch(retry_after):
        return timedelta(seconds=int(retry_after))
    try:
        moment = datetime.strptime(retry_after, HTTP_DATE).replace(tzinfo=UTC)
    except ValueError:
        return None
    # strptime accepts a wrong weekday, single digits and lower case; strftime writes none of them.
    return moment - now if moment.strftime(HTTP_DATE) == retry_after else None
