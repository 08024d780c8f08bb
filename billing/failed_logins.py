"""Failed and throttled logins: noted in memory by the request, and audited outside of it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import structlog

from billing.actors import Actor
from billing.clock import Clock
from billing.errors import DatabaseUnavailable
from billing.storage.driver import StorageError
from billing.storage.store import Store
from billing.users import User

Action = Literal["user.login_failed", "user.password_change_failed"]
THROTTLED = "user.login_throttled"

# A storm of them while the database is down must not fill the memory.
MOST = 10_000
NOT_AUDITED = "a failed login was not audited"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


@dataclass(frozen=True)
class Failure:
    """A failed login or change of password, of an existing account."""

    action: Action
    user: User
    actor: Actor
    cause: str
    at: datetime


@dataclass(frozen=True)
class Refusal:
    """A login refused before its password was checked; whether the account exists is not known yet."""

    email: str
    actor: Actor
    limit: str
    at: datetime


class FailedLogins:
    """Rows yet to be written. Written before the answer, their time would reveal which emails exist."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._noted: deque[Failure | Refusal] = deque(maxlen=MOST)

    def note(self, action: Action, actor: Actor, user: User, cause: str) -> None:
        """Remember a failed attempt."""
        self._add(Failure(action, user, actor, cause, self._clock()))

    def note_throttled(self, actor: Actor, email: str, limit: str) -> None:
        """Remember that logins with this normalised email are refused from now on for a while."""
        self._add(Refusal(email, actor, limit, self._clock()))

    def flush(self, store: Store) -> None:
        """Write what was noted; raises `DatabaseUnavailable`, and keeps what is left for the next time."""
        # At shutdown two flushes may run at once: each takes rows from the same queue.
        while (noted := self._oldest()) is not None:
            try:
                _write(store, noted)
            except DatabaseUnavailable:
                self._put_back(noted)
                raise
            except StorageError as error:
                log.warning(NOT_AUDITED, cause=str(error))

    @property
    def waiting(self) -> int:
        """How many are yet to be written."""
        return len(self._noted)

    def _oldest(self) -> Failure | Refusal | None:
        with suppress(IndexError):
            return self._noted.popleft()
        return None

    def _put_back(self, noted: Failure | Refusal) -> None:
        if len(self._noted) == MOST:
            log.warning(NOT_AUDITED, cause="too many wait")
        else:
            self._noted.appendleft(noted)

    def _add(self, noted: Failure | Refusal) -> None:
        """Add a row; where `MOST` wait already the oldest is dropped for it, and a log line says so."""
        if len(self._noted) == MOST:
            log.warning(NOT_AUDITED, cause="too many wait")
        self._noted.append(noted)


def _write(store: Store, noted: Failure | Refusal) -> None:
    if isinstance(noted, Refusal):
        _write_refusal(store, noted)
        return
    with store.tenant(noted.user.tenant_id, noted.actor) as tx:
        details = {"cause": noted.cause}
        tx.audit.record(noted.action, subject=noted.user.email, now=noted.at, details=details)


def _write_refusal(store: Store, refusal: Refusal) -> None:
    with store.platform() as platform:
        account = platform.find_account(refusal.email)
    if account is None:
        return
    with store.tenant(account.tenant.id, refusal.actor) as tx:
        details = {"limit": refusal.limit}
        tx.audit.record(THROTTLED, subject=account.user.email, now=refusal.at, details=details)
