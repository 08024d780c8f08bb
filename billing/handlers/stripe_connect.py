"""Stripe Connect: connect an account, read its status, disconnect it."""

from __future__ import annotations

from billing import stripe_connect
from billing.actors import Actor
from billing.clock import Clock
from billing.errors import BillingError, settled
from billing.handlers import shapes
from billing.http import browsers, replies
from billing.http.browsers import Browser
from billing.http.idempotency import Once
from billing.http.lanes import Lane, runs_in
from billing.http.problems import status_of
from billing.http.replies import Reply, ok
from billing.security import Caller
from billing.storage.store import Store
from billing.stripe_connect import Connected
from billing.stripe_connections import StripeConnections


@runs_in(Lane.STRIPE)
def start_stripe_connect(
    body: dict[str, str] | None,
    *,
    caller: Caller,
    actor: Actor,
    browser: Browser,
    connections: StripeConnections,
    base_url: str,
    once: Once,
) -> Reply:
    options = body or {}
    binding = browser.bind_at(base_url)
    starting = connections.starting(
        caller,
        actor,
        flow="account_link" if options.get("flow") == "account_link" else "oauth",
        return_url=options.get("return_url"),
        browser=binding,
    )
    with starting as (tx, start):
        reply = ok(shapes.connect_start(start))
        if binding is not None:
            reply = reply.with_header("set-cookie", browsers.cookie(binding))
        return once.keep(tx, reply)


@runs_in(Lane.STRIPE)
def complete_stripe_connect(
    *,
    state: str | None,
    code: str | None,
    error: str | None,
    actor: Actor,
    browser: Browser,
    connections: StripeConnections,
) -> Reply:
    result = connections.complete(state=state, code=code, error=error, browser=browser.binding, actor=actor)
    if result.return_url is not None:
        reply = replies.see_other(stripe_connect.returning(result.return_url, result.outcome))
    elif browser.prefers_html:
        reply = _page(result.outcome)
    else:
        return ok(shapes.connected(settled(result.outcome)))
    return reply.refusing(result.outcome.code()) if isinstance(result.outcome, BillingError) else reply


def _page(outcome: Connected | BillingError) -> Reply:
    if isinstance(outcome, BillingError):
        # Without a detail of its own the page would show the title twice.
        text = outcome.explanation() if outcome.detail == outcome.title() else outcome.detail
        return replies.page(outcome.title(), text, status=status_of(type(outcome)))
    status = outcome.connection.status
    title = "There is more to do at Stripe." if status == "pending" else "The Stripe account is connected."
    # Names the tenant: the person may have been deceived about whose page led here.
    text = f"It belongs to {outcome.tenant.company_name} on this platform. {stripe_connect.MESSAGES[status]}"
    return replies.page(title, text)


@runs_in(Lane.STRIPE)
def get_stripe_status(*, caller: Caller, connections: StripeConnections) -> Reply:
    return ok(shapes.stripe_status(connections.status(caller.tenant_id)))


def disconnect_stripe(*, caller: Caller, actor: Actor, store: Store, clock: Clock, once: Once) -> Reply:
    with caller.changing(store, actor) as tx:
        stripe_connect.disconnect(tx, now=clock())
        tenant = shapes.tenant(tx.tenants.get())
        return once.keep(tx, ok({"message": "The Stripe account is disconnected.", "tenant": tenant}))
