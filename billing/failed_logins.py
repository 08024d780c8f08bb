"""Failed logins: noted in memory by the request that refuses one, and written into the audit log outside of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import structlog

from billing.actors import Actor
from billing.clock import Clock
from billing.errors import DatabaseUnavailable
from billing.storage.store import StorageError, Store
from billing.users import User

Action = Literal["user.login_failed", "user.password_change_failed"]

# A storm of them while the database is away must not fill the memory.
MOST = 10_000

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing")


@dataclass(frozen=True)
class Failure:
    """A password that opened nothing, of an account that there is."""

    action: Action
    user: User
    actor: Actor
    cause: str
    at: datetime


class FailedLogins:
    """Rows yet to be written. Before the answer they would tell, by the time they take, whose email is known."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._noted: deque[Failure] = deque(maxlen=MOST)

    def note(self, action: Action, actor: Actor, user: User, cause: str) -> None:
        """Remember one. If none could be written for long, the oldest is forgotten for it, and a log line says so."""
        if len(self._noted) == MOST:
            log.warning("a failed login was not audited", cause="too many wait")
        self._noted.append(Failure(action, user, actor, cause, self._clock()))

    def flush(self, store: Store) -> None:
        """Write down what was noted; raises `DatabaseUnavailable`, and keeps what is left for the next time."""
        while self._noted:
            failure = self._noted.popleft()
            try:
                _write(store, failure)
            except DatabaseUnavailable:
                self._noted.appendleft(failure)
                raise
            except StorageError as error:
                log.warning("a failed login was not audited", cause=str(error))

    @property
    def waiting(self) -> int:
        """How many are yet to be written."""
        return len(self._noted)


def _write(store: Store, failure: Failure) -> None:
    with store.tenant(failure.user.tenant_id, failure.actor) as tx:
        details = {"cause": failure.cause}
        tx.audit.record(failure.action, subject=failure.user.email, now=failure.at, details=details)
