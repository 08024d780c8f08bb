"""Stripe Connect: states that lead to a connection, what an account's status is, and the rules of connecting."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol
from urllib.parse import urlencode, urlsplit, urlunsplit
from uuid import UUID

from billing.errors import (
    AccessDenied,
    BillingError,
    ReturnUrlRefused,
    StateExpired,
    StateUnknown,
    StateUsed,
    StripeAccountTaken,
    StripeAlreadyConnected,
    StripeUnavailable,
    TenantDisabled,
)
from billing.ids import new_id
from billing.ports import Audit, Directory, Events, Tasks
from billing.tasks import Task
from billing.tenants import Tenant
from billing.users import User
from billing.webhooks.events import EventType

Flow = Literal["oauth", "account_link"]
Status = Literal["pending", "incomplete", "under_review", "restricted", "active", "rejected"]

STATE_BYTES = 32
STATE_LIFETIME = timedelta(minutes=10)
# So long a state that came too late can be distinguished from an unknown one.
STATE_KEPT = timedelta(days=1)
CHECKED_EVERY = timedelta(hours=1)
# Of another machine's clock. What one stored that is further ahead would keep all answers out until then.
MOST_AHEAD = timedelta(minutes=1)

CHECK = "stripe.check"
DEAUTHORIZE = "stripe.deauthorize"
STATE_NAME = "connect_state"
ACCOUNT_NAME = "stripe_account"

UNDER_REVIEW = ("requirements.pending_verification", "under_review", "listed")

MESSAGES = {
    "not_connected": "No Stripe account is connected.",
    "disconnected": "The Stripe account is no longer connected.",
    "pending": "The form at Stripe is not finished.",
    "incomplete": "Stripe needs more information before it pays out.",
    "under_review": "Stripe is reviewing the account.",
    "restricted": "The account cannot take payments until Stripe has what is overdue.",
    "active": "The account takes payments and is paid out.",
    "rejected": "Stripe has rejected the account.",
}


# Accounts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequirementError:
    """Something given to Stripe that it did not accept."""

    code: str
    reason: str
    requirement: str


@dataclass(frozen=True)
class Requirements:
    """What Stripe asks for, by the names of its fields. `current_deadline` is in Unix seconds."""

    currently_due: tuple[str, ...] = ()
    eventually_due: tuple[str, ...] = ()
    past_due: tuple[str, ...] = ()
    pending_verification: tuple[str, ...] = ()
    disabled_reason: str | None = None
    current_deadline: int | None = None
    errors: tuple[RequirementError, ...] = ()


@dataclass(frozen=True)
class Account:
    """What Stripe says of an account. Only the id is certain; None stands for what it did not say."""

    id: str
    charges_enabled: bool | None = None
    payouts_enabled: bool | None = None
    details_submitted: bool | None = None
    requirements: Requirements = field(default_factory=Requirements)
    capabilities: Mapping[str, str] = field(default_factory=dict)
    email: str | None = None
    business_type: str | None = None
    country: str | None = None
    default_currency: str | None = None

    @property
    def status(self) -> Status:
        """The one status that sums it all up: the first that applies."""
        requirements = self.requirements
        reason = requirements.disabled_reason or ""
        if reason.startswith("rejected."):
            return "rejected"
        if not self.details_submitted:
            return "pending"
        if reason in UNDER_REVIEW:
            return "under_review"
        if reason or requirements.past_due or not self.charges_enabled:
            return "restricted"
        if requirements.currently_due or not self.payouts_enabled:
            return "incomplete"
        return "active"


@dataclass(frozen=True)
class Grant:
    """What Stripe returned for an authorization code."""

    account_id: str
    scope: str
    livemode: bool


@dataclass(frozen=True)
class Connection:
    """A tenant's link to an account. `checked_at` is when Stripe was last asked, None if it never answered."""

    id: UUID
    flow: Flow
    livemode: bool
    account: Account
    connected_at: datetime
    checked_at: datetime | None
    ended_at: datetime | None = None

    @property
    def is_living(self) -> bool:
        return self.ended_at is None

    @property
    def status(self) -> str:
        return self.account.status if self.is_living else "disconnected"


# States ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Ties a callback to the user who started the flow, and to their browser if that is known."""

    id: UUID
    user_id: UUID
    digest: str
    flow: Flow
    return_url: str | None
    browser_digest: bytes | None
    created_at: datetime
    expires_at: datetime
    consumed_at: datetime | None = None

    def is_for(self, browser: str | None) -> bool:
        """Whether this browser started it. A state bound to no browser is accepted from any."""
        if self.browser_digest is None:
            return True
        return browser is not None and hmac.compare_digest(self.browser_digest, hashed(browser))


@dataclass(frozen=True)
class Connected:
    """The result of a successful callback."""

    connection: Connection
    tenant: Tenant


def hashed(secret: str) -> bytes:
    """What is kept of a state, or of a browser's binding."""
    return hashlib.sha256(secret.encode()).digest()


def require_return_url(url: str | None, origins: Collection[str]) -> None:
    """Raises `ReturnUrlRefused` unless the URL is a page of one of the origins."""
    if url is None:
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ReturnUrlRefused from None
    # A browser reads a backslash as a slash, and so another host than we would.
    if f"{parts.scheme}://{parts.netloc}" not in origins or "\\" in url or not url.isascii():
        raise ReturnUrlRefused


def returning(url: str, outcome: Connected | BillingError) -> str:
    """The return URL with the outcome: `stripe=connected`, or `stripe=error&code=…`."""
    parameters = {"stripe": "connected"}
    if isinstance(outcome, BillingError):
        parameters = {"stripe": "error", "code": outcome.code()}
    parts = urlsplit(url)
    # Without those of an earlier outcome: of two the page would read the first.
    others = [
        part for part in parts.query.split("&") if part and part.partition("=")[0] not in ("stripe", "code")
    ]
    return urlunsplit(parts._replace(query="&".join([*others, urlencode(parameters)])))


# Starting ----------------------------------------------------------------------------------------


def new_state() -> str:
    """The text of a state: what ties a callback to its start."""
    return secrets.token_urlsafe(STATE_BYTES)


def start(
    tx: Storage,
    user: User,
    text: str,
    *,
    flow: Flow,
    return_url: str | None,
    browser: str | None,
    now: datetime,
) -> State:
    """Store a new state of this user, and end the tenant's earlier unused ones. The caller holds the tenant's lock.

    Raises `StripeAlreadyConnected`, but not for an account of ours whose form is not finished yet.
    """
    require_startable(tx.stripe.find(), flow)
    digest = hashed(text).hex()
    expires_at = now + STATE_LIFETIME
    bound = hashed(browser) if browser else None
    state = State(new_id(), user.id, digest, flow, return_url, bound, now, expires_at)
    tx.stripe.end_unused_states()
    tx.directory.add(STATE_NAME, digest, state.id)
    tx.stripe.add_state(state)
    tx.audit.record("stripe.connect_started", subject=flow, now=now)
    return state


def forget_states(tx: Storage, *, now: datetime) -> bool:
    """Delete states made more than `STATE_KEPT` ago, or some of them; returns whether there were any."""
    digests = tx.stripe.forget_states(now - STATE_KEPT)
    tx.directory.release(STATE_NAME, *digests)
    return bool(digests)


def require_startable(connection: Connection | None, flow: Flow) -> None:
    """Raises `StripeAlreadyConnected`, unless the link to an unfinished form is to be renewed."""
    if connection is None or not connection.is_living:
        return
    if not (flow == connection.flow == "account_link" and connection.status == "pending"):
        raise StripeAlreadyConnected


# Finishing ---------------------------------------------------------------------------------------


def consume(
    tx: Storage, id: UUID, *, browser: str | None, now: datetime
) -> tuple[State, BillingError | None]:
    """Use up a state; returns it, and the reason if it is refused."""
    state = tx.stripe.lock_state(id)
    refusal = _refusal(tx, state, browser, now)
    if refusal is None:
        tx.stripe.consume_state(id, now)
        return state, None
    if isinstance(refusal, StateUsed | StateExpired):
        return state, refusal  # A page loaded again is not audited: it must not fill the log.
    # A browser that did not start it does not learn where the one that did returns to.
    shown = replace(state, return_url=None) if isinstance(refusal, StateUnknown) else state
    return shown, refuse(tx, refusal, now)


def _refusal(tx: Storage, state: State, browser: str | None, now: datetime) -> BillingError | None:
    if not state.is_for(browser):
        return StateUnknown()
    if state.consumed_at is not None:
        return StateUsed()
    return StateExpired() if now >= state.expires_at else _lost_right(tx, state)


def _lost_right(tx: Storage, state: State) -> BillingError | None:
    """Why the user who began it may no longer finish it, None if they may."""
    user = tx.users.find(state.user_id)
    if user is None or not user.is_active_owner:
        return StateExpired()
    return None if tx.tenants.get().is_active else TenantDisabled()


def withdrawal(tx: Storage, used: State) -> BillingError | None:
    """Why a state that was used may not be finished after all: it was ended meanwhile, as while Stripe was asked."""
    has_ended = tx.stripe.lock_state(used.id).expires_at < used.expires_at
    return StateExpired() if has_ended else _lost_right(tx, used)


def refuse(tx: Storage, refusal: BillingError, now: datetime) -> BillingError:
    """Audit that a connection was refused, and why; returns the refusal."""
    tx.audit.record("stripe.connect_refused", reason=refusal.code(), now=now)
    return refusal


def connect(
    tx: Storage,
    grant: Grant,
    account: Account | None,
    *,
    livemode: bool,
    now: datetime,
    withdrawn: BillingError | None = None,
) -> Connected | BillingError:
    """Link the tenant to the account that was granted, or return why that is refused.

    The caller holds the tenant's lock. `account` is None if Stripe did not say more than its id; `livemode`
    is the platform's own; `withdrawn` is the `withdrawal` of the state. A refused grant is revoked at Stripe,
    unless a tenant holds the account.
    """
    current = tx.stripe.find()
    if not _claim(tx, grant.account_id):
        return refuse(tx, StripeAccountTaken(), now)
    if refusal := withdrawn or _unfit(grant, current, livemode=livemode):
        if current is None or not current.is_living or current.account.id != grant.account_id:
            _give_back(tx, grant.account_id, now=now)
        return refuse(tx, refusal, now)
    tx.tasks.drop(DEAUTHORIZE, subject=grant.account_id)
    found = account or Account(grant.account_id)
    return link(tx, "oauth", found, livemode=livemode, known=account is not None, now=now)


def _claim(tx: Storage, account_id: str) -> bool:
    """Claim the account; returns whether it is this tenant's now, and no other's."""
    claimed = tx.directory.claim(ACCOUNT_NAME, account_id, tx.tenant_id)
    return claimed or tx.directory.owns(ACCOUNT_NAME, account_id)


def _unfit(grant: Grant, current: Connection | None, *, livemode: bool) -> BillingError | None:
    if grant.scope != "read_write":
        return AccessDenied("The account was shared for reading only, and payments need more.")
    if grant.livemode != livemode:
        return StripeUnavailable("Stripe answered for another mode, live or test, than this server's.")
    return StripeAlreadyConnected() if current is not None and current.is_living else None


def _give_back(tx: Storage, account_id: str, *, now: datetime) -> None:
    # The account remains this tenant's until it is deauthorised at Stripe: another tenant's connection to it
    # must not be cut. So there is one task for it, the last: with two, the first would free the account.
    tx.tasks.drop(DEAUTHORIZE, subject=account_id)
    tx.tasks.add(DEAUTHORIZE, new_id(), subject=account_id, due_at=now, now=now)


def link(
    tx: Storage, flow: Flow, account: Account, *, livemode: bool, known: bool = True, now: datetime
) -> Connected:
    """Link the tenant to an account that is nobody else's. The caller holds the tenant's lock."""
    connection = Connection(new_id(), flow, livemode, account, now, now if known else None)
    tx.stripe.keep(connection)
    tx.tenants.set_stripe(account.id, connection.status, now)
    tx.audit.record("stripe.connected", subject=account.id, now=now, details={"flow": flow})
    _record_event(tx, "stripe.account.connected", connection, now)
    due_at = next_check(now) if known else now
    tx.tasks.add(CHECK, connection.id, subject=account.id, due_at=due_at, now=now, queue="checks")
    return Connected(connection, tx.tenants.get())


def adopt(tx: Storage, account: Account, *, livemode: bool, now: datetime) -> Connection:
    """Link the tenant to an account made for it, unless it is linked already; returns the connection."""
    current = tx.stripe.find()
    if current is not None and current.is_living:
        return current
    tx.directory.claim(ACCOUNT_NAME, account.id, tx.tenant_id)
    return link(tx, "account_link", account, livemode=livemode, now=now).connection


# Afterwards --------------------------------------------------------------------------------------


def note(
    tx: Storage, connection: Connection, account: Account | None, *, asked_at: datetime, now: datetime
) -> Connection | None:
    """Store what Stripe answered: the account as it is, or None once it is no longer connected there.

    An answer requested before the last one stored, unless that came from a clock far ahead, or about a connection
    that has ended meanwhile, changes nothing. Returns the connection as it is now. The caller holds the tenant's lock.
    """
    current = tx.stripe.find()
    if current is None or current.id != connection.id or not current.is_living:
        return current
    if current.checked_at is not None and asked_at <= current.checked_at <= now + MOST_AHEAD:
        return current
    if account is None:
        tx.directory.release(ACCOUNT_NAME, current.account.id)
        return end(tx, current, reason="disconnected at Stripe", now=now)
    seen = replace(current, account=account, checked_at=asked_at)
    tx.stripe.keep(seen)
    if seen.status != current.status:
        tx.tenants.set_stripe(account.id, seen.status, now)
        _record_event(tx, "stripe.account.updated", seen, now)
    return seen


def disconnect(tx: Storage, *, now: datetime) -> None:
    """End the tenant's connection, if any, and have it revoked at Stripe. The caller holds the tenant's lock.

    What was started and not finished ends too. An account that we made is unlinked here only: at Stripe it has no
    other platform.
    """
    tx.stripe.end_unused_states()
    current = tx.stripe.find()
    if current is None or not current.is_living:
        return
    end(tx, current, reason=None, now=now)
    if current.flow == "account_link":
        tx.directory.release(ACCOUNT_NAME, current.account.id)
    else:
        _give_back(tx, current.account.id, now=now)


def note_deauthorized(tx: Storage, task: Task, *, is_revoked: bool, now: datetime) -> None:
    """Note whether Stripe deauthorised an account; if not, retry later. The caller holds the tenant's lock.

    If the tenant connected it again meanwhile, a check asks Stripe which of the two holds.
    """
    current = tx.stripe.find()
    if current is not None and current.is_living and current.account.id == task.subject:
        tx.tasks.finish(task)
        tx.tasks.add(CHECK, current.id, subject=task.subject, due_at=now, now=now, queue="checks")
    elif not is_revoked:
        tx.tasks.postpone(task, task.retry_at(now))
    elif tx.tasks.finish(task):
        tx.directory.release(ACCOUNT_NAME, task.subject)


def end(tx: Storage, current: Connection, *, reason: str | None, now: datetime) -> Connection:
    """End a connection, for whatever reason."""
    ended = replace(current, ended_at=now)
    tx.stripe.keep(ended)
    tx.tenants.set_stripe(None, ended.status, now)
    tx.tasks.drop(CHECK, subject=ended.account.id)
    tx.audit.record("stripe.disconnected", subject=ended.account.id, reason=reason, now=now)
    _record_event(tx, "stripe.account.disconnected", ended, now)
    return ended


def next_check(now: datetime) -> datetime:
    """In an hour or up to a quarter more, so that the checks of many accounts spread out."""
    return now + CHECKED_EVERY * (1 + secrets.randbelow(1000) / 4000)


def _record_event(tx: Storage, type: EventType, connection: Connection, now: datetime) -> None:
    data = {"account_id": connection.account.id, "status": connection.status}
    tx.events.record(type, data, livemode=connection.livemode, now=now)


# What storage is asked for -----------------------------------------------------------------------


class StripeShelf(Protocol):
    def find(self) -> Connection | None: ...
    def keep(self, connection: Connection) -> None: ...
    def add_state(self, state: State) -> None: ...
    def end_unused_states(self) -> None: ...
    def forget_states(self, before: datetime) -> list[str]: ...
    def lock_state(self, id: UUID) -> State: ...
    def consume_state(self, id: UUID, now: datetime) -> None: ...


class TenantShelf(Protocol):
    def get(self) -> Tenant: ...
    def set_stripe(self, account_id: str | None, status: str, now: datetime) -> None: ...


class UserShelf(Protocol):
    def find(self, id: UUID) -> User | None: ...


class Names(Directory, Protocol):
    def owns(self, kind: str, name: str) -> bool: ...
    def release(self, kind: str, *names: str) -> None: ...


class HeldTasks(Tasks, Protocol):
    def finish(self, task: Task) -> bool: ...
    def postpone(self, task: Task, due_at: datetime) -> None: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenant_id(self) -> UUID: ...
    @property
    def tenants(self) -> TenantShelf: ...
    @property
    def users(self) -> UserShelf: ...
    @property
    def stripe(self) -> StripeShelf: ...
    @property
    def directory(self) -> Names: ...
    @property
    def tasks(self) -> HeldTasks: ...
    @property
    def events(self) -> Events: ...
    @property
    def audit(self) -> Audit: ...
