"""Webhooks: where events go, how deliveries went, and a test of the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from billing.actors import Actor
from billing.clock import Clock
from billing.deliveries import Tester
from billing.handlers import shapes
from billing.http.idempotency import Once
from billing.http.lanes import Lane, runs_in
from billing.http.replies import Reply, ok
from billing.security import Caller
from billing.storage.store import Store, TenantTx
from billing.webhooks import endpoints
from billing.webhooks.delivery import Delivery, Stats
from billing.webhooks.endpoints import Endpoint, Secret, UrlPolicy
from billing.webhooks.events import TEST

RECENT = 20
DEFAULT_GRACE_SECONDS = 86400


def get_webhook_config(*, caller: Caller, store: Store, clock: Clock, base_url: str) -> Reply:
    now = clock()

    def query(tx: TenantTx) -> tuple[Endpoint, Sequence[Secret], Sequence[Delivery], Stats]:
        return (
            tx.webhooks.find(),
            tx.webhooks.secrets(now),
            tx.deliveries.recent(RECENT),
            tx.deliveries.stats(now),
        )

    endpoint, secrets, recent, stats = store.read(caller.tenant_id, query, since=caller.position)
    return ok(shapes.webhook_config(endpoint, secrets, recent, stats, base_url))


def configure_webhook(
    body: dict[str, Any],
    *,
    caller: Caller,
    actor: Actor,
    store: Store,
    clock: Clock,
    url_policy: UrlPolicy,
    base_url: str,
    once: Once,
) -> Reply:
    url = url_policy.check(body["webhook_url"])
    with caller.changing(store, actor) as tx:
        configured = endpoints.configure(
            tx,
            url=url,
            event_types=body.get("event_types"),
            regenerate_secret=body.get("regenerate_secret", False),
            grace=timedelta(seconds=body.get("secret_grace_seconds", DEFAULT_GRACE_SECONDS)),
            now=clock(),
        )
        return once.keep(tx, ok(shapes.webhook_configured(configured, base_url)))


def remove_webhook(*, caller: Caller, actor: Actor, store: Store, clock: Clock, once: Once) -> Reply:
    with caller.changing(store, actor) as tx:
        endpoints.remove(tx, now=clock())
        note = "Nothing is sent any more. The secret is kept for when a URL is configured again."
        return once.keep(tx, ok({"message": "The webhook is removed.", "note": note}))


@runs_in(Lane.WEBHOOKS)
def send_test_webhook(
    body: dict[str, Any] | None, *, caller: Caller, actor: Actor, tester: Tester, once: Once
) -> Reply:
    options = body or {}
    event_type, data = options.get("event_type", TEST), options.get("test_data", {})
    with tester.sent(caller.tenant_id, actor, event_type, data) as (tx, report):
        return once.keep(tx, ok(shapes.test_report(report)))
