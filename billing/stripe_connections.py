"""Stripe connections: what needs both database and Stripe, with no transaction open during its calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from uuid import UUID

from billing import stripe_connect
from billing.actors import Actor
from billing.clock import Clock
from billing.errors import (
    AccessDenied,
    BillingError,
    CodeRejected,
    StateExpired,
    StateMissing,
    StateUnknown,
    StripeNotConfigured,
    StripeUnavailable,
)
from billing.gateway import Gateway
from billing.security import Caller
from billing.storage.store import Store, TenantTx
from billing.stripe_connect import Account, Connected, Connection, Flow, State
from billing.tasks import Task

CALLBACK = "/api/v1/auth/tenants/stripe/callback/"


@dataclass(frozen=True)
class ConnectStart:
    """Where an owner's browser goes to connect an account, and what it brings back."""

    url: str = field(repr=False)
    redirect_uri: str
    state: State
    # Shown now; only its digest is kept.
    state_text: str = field(repr=False)


@dataclass(frozen=True)
class CallbackResult:
    """How a callback ended, and where to send the browser, if the state has a return URL."""

    outcome: Connected | BillingError
    return_url: str | None = None


@dataclass(frozen=True)
class StatusView:
    """A connection, or none, and whether Stripe was asked just now."""

    connection: Connection | None
    is_live: bool


class StripeConnections:
    """Connects and watches the Stripe accounts of tenants."""

    def __init__(
        self, store: Store, gateway: Gateway, clock: Clock, *, base_url: str, return_origins: Collection[str]
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._clock = clock
        self._redirect_uri = base_url + CALLBACK
        self._return_origins = frozenset([*return_origins, base_url])

    # Starting ------------------------------------------------------------------------------------

    @contextmanager
    def starting(
        self, caller: Caller, actor: Actor, *, flow: Flow, return_url: str | None, browser: str | None
    ) -> Iterator[tuple[TenantTx, ConnectStart]]:
        """Start a flow for an owner; yields the transaction that stores the state.

        Raises `ReturnUrlRefused` and `StripeAlreadyConnected`.
        """
        self._gateway.require_configured(for_oauth=flow == "oauth")
        stripe_connect.require_return_url(return_url, self._return_origins)
        user, text = caller.signed_in_user(), stripe_connect.new_state()
        if flow == "account_link":
            url = self._account_link(caller, actor, text)
        else:
            url = self._gateway.authorize_url(
                state=text, redirect_uri=self._redirect_uri, tenant=caller.tenant, user=user
            )
        with caller.changing(self._store, actor) as tx:
            state = stripe_connect.start(
                tx, user, text, flow=flow, return_url=return_url, browser=browser, now=self._clock()
            )
            yield tx, ConnectStart(url, self._redirect_uri, state, text)

    def _account_link(self, caller: Caller, actor: Actor, state: str) -> str:
        account = self._account_of_our_own(caller, actor)
        return self._gateway.account_link(account.id, return_url=f"{self._redirect_uri}?state={state}")

    def _account_of_our_own(self, caller: Caller, actor: Actor) -> Account:
        """The unfinished account that we made for the tenant, made now if there is none."""
        tenant = caller.tenant
        with self._store.tenant(tenant.id, actor) as tx:
            last = tx.stripe.find()
        stripe_connect.require_startable(last, "account_link")
        if last is not None and last.is_living:
            return last.account
        # Two calls at once, or a repeat, get the same account. A new key each hour: Stripe keeps failures
        # too.
        key = f"account-{tenant.id}-{last.id if last else 'first'}-{self._clock():%Y%m%d%H}"
        made = self._gateway.create_account(tenant, idempotency_key=key)
        with caller.changing(self._store, actor) as tx:
            now = self._clock()
            return stripe_connect.adopt(tx, made, livemode=self._gateway.livemode, now=now).account

    # Finishing -----------------------------------------------------------------------------------

    def complete(
        self, *, state: str | None, code: str | None, error: str | None, browser: str | None, actor: Actor
    ) -> CallbackResult:
        """Finish what a state began. A refusal is returned as the outcome, so that a browser can be told."""
        if not state:
            return CallbackResult(AccessDenied() if error else StateMissing())
        with self._store.platform() as platform:
            found = platform.find_connect_state(stripe_connect.hashed(state).hex())
        if found is None:
            return CallbackResult(StateUnknown())
        tenant_id, state_id = found
        with self._store.tenant(tenant_id, actor) as tx:
            used, refusal = stripe_connect.consume(tx, state_id, browser=browser, now=self._clock())
        outcome = refusal or self._finish(tenant_id, used, code, error, actor)
        return CallbackResult(outcome, used.return_url)

    def _finish(
        self, tenant_id: UUID, state: State, code: str | None, error: str | None, actor: Actor
    ) -> Connected | BillingError:
        if state.flow == "account_link":
            return self._look_again(tenant_id)
        try:
            if error:
                raise AccessDenied
            if not code:
                raise CodeRejected("Stripe's redirect brought no authorization code.")
            grant = self._gateway.complete(code)
        except BillingError as refusal:
            with self._store.tenant(tenant_id, actor) as tx:
                return stripe_connect.refuse(tx, refusal, self._clock())
        account = self._ask(grant.account_id)
        with self._store.tenant(tenant_id, actor, exclusive=True) as tx:
            withdrawn = stripe_connect.withdrawal(tx, state)
            livemode, now = self._gateway.livemode, self._clock()
            return stripe_connect.connect(tx, grant, account, livemode=livemode, now=now, withdrawn=withdrawn)

    def _ask(self, account_id: str) -> Account | None:
        """The account, None if Stripe does not answer: the worker checks it again."""
        try:
            return self._gateway.account(account_id)
        except StripeUnavailable:
            return None

    def _look_again(self, tenant_id: UUID) -> Connected | BillingError:
        """How far the owner got in Stripe's form."""
        connection = self.status(tenant_id).connection
        if connection is None or not connection.is_living:
            return StateExpired("The account was disconnected in the meantime.")
        with self._store.tenant(tenant_id) as tx:
            return Connected(connection, tx.tenants.get())

    # Watching ------------------------------------------------------------------------------------

    def status(self, tenant_id: UUID) -> StatusView:
        """The connection as Stripe has it, or as it was last known if Stripe does not answer."""
        with self._store.tenant(tenant_id) as tx:
            known = tx.stripe.find()
        if known is None or not known.is_living:
            return StatusView(known, is_live=False)
        try:
            return StatusView(self._check(tenant_id, known), is_live=True)
        except (StripeUnavailable, StripeNotConfigured):
            return StatusView(known, is_live=False)

    def _check(self, tenant_id: UUID, known: Connection) -> Connection | None:
        if known.livemode != self._gateway.livemode:
            # With a key of the other mode no account is known, and every connection would seem to have ended.
            raise StripeUnavailable(
                "The connection is of another mode, live or test, than this server's key."
            )
        asked_at = self._clock()
        account = self._gateway.account(known.account.id)
        with self._store.tenant(tenant_id, exclusive=True) as tx:
            return stripe_connect.note(tx, known, account, asked_at=asked_at, now=self._clock())

    # What the worker does ------------------------------------------------------------------------

    def deauthorize(self, task: Task) -> None:
        """Deauthorise a disconnected account at Stripe; the task is retried later if that fails."""
        is_revoked = True
        try:
            self._gateway.revoke(task.subject)
        except (StripeUnavailable, StripeNotConfigured):
            is_revoked = False
        with self._store.tenant(task.tenant_id, exclusive=True) as tx:
            stripe_connect.note_deauthorized(tx, task, is_revoked=is_revoked, now=self._clock())

    def check(self, task: Task) -> None:
        """Update what is known of an account from Stripe, outside of any request."""
        with self._store.tenant(task.tenant_id) as tx:
            known = tx.stripe.find()
            if known is None or not known.is_living or known.id != task.id:
                tx.tasks.finish(task)
                return
        # If Stripe does not answer, the next check is soon enough, unless there was none yet.
        with suppress(StripeUnavailable, StripeNotConfigured):
            known = self._check(task.tenant_id, known) or known
        with self._store.tenant(task.tenant_id) as tx:
            now = self._clock()
            tx.tasks.postpone(
                task, task.retry_at(now) if known.checked_at is None else stripe_connect.next_check(now)
            )
