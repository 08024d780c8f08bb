"""API keys: list, replace, revoke."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from billing import keys
from billing.actors import Actor
from billing.clock import Clock
from billing.handlers import shapes
from billing.http.idempotency import Once
from billing.http.replies import Reply, ok
from billing.keys import KeyDigests
from billing.security import Caller
from billing.storage.store import Store

SHOWN_ONCE = "Store the new keys now: the secret ones are not shown again."
MASKED = "Secret keys are shown once, when they are made. Regenerate the keys if one is lost."
ENDED = "Revoked keys never work again. Regenerate to get new ones."


def list_api_keys(*, caller: Caller, store: Store, clock: Clock) -> Reply:
    now = clock()
    found = store.read(caller.tenant_id, lambda tx: tx.api_keys.worth_showing(now), since=caller.position)
    return ok({"keys": [shapes.listed_key(key, now) for key in keys.to_show(found, now)], "warning": MASKED})


def regenerate_api_keys(
    body: dict[str, Any],
    *,
    caller: Caller,
    actor: Actor,
    store: Store,
    clock: Clock,
    digests: KeyDigests,
    once: Once,
) -> Reply:
    grace = timedelta(seconds=body.get("grace_period_seconds", 0))
    with caller.changing(store, actor) as tx:
        renewal = keys.regenerate(tx, body["key_type"], grace=grace, digests=digests, now=clock())
        reply = ok(
            {
                "message": "New keys are made.",
                "keys": shapes.new_keys(renewal.new),
                "warning": SHOWN_ONCE,
                "previous": [keys.ending_members(key) for key in renewal.previous],
            }
        )
        return once.keep(tx, reply)


def revoke_api_keys(
    body: dict[str, Any], *, caller: Caller, actor: Actor, store: Store, clock: Clock, once: Once
) -> Reply:
    reason = body.get("reason")
    with caller.changing(store, actor) as tx:
        revoked = keys.revoke(tx, body["key_type"], reason=reason, now=clock())
        reply = ok(
            {
                "message": "The keys are revoked." if revoked else "There was no key left to revoke.",
                "revoked_keys": revoked,
                "reason": reason,
                "warning": ENDED,
            }
        )
        return once.keep(tx, reply)
