"""What must hold when all clients are idle: the database and the receiver agree with the clients' ledgers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2

from tests.faults.cluster.clients import Account
from tests.faults.cluster.postgres import Cluster
from tests.receivers import Received

# The audit log's names for what a ledger counts, and the events of it.
ACTIONS = {
    "register": "tenant.registered",
    "change_password": "user.password_changed",
    "regenerate": "api_key.regenerated",
    "revoke": "api_key.revoked",
    "configure": "webhook.configured",
}
EVENTS = {
    "register": "tenant.registered",
    "change_password": "user.password_changed",
    "regenerate": "api_key.regenerated",
    "revoke something": "api_key.revoked",
}
TENANTS = "SELECT id::text, email, company_name FROM tenants"
AUDIT = "SELECT tenant_id::text, action, count(*) FROM audit_log GROUP BY 1, 2"
HISTORY = "SELECT tenant_id::text, count(*), max(sequence) FROM {} GROUP BY 1"
EVENTS_BY_TYPE = "SELECT tenant_id::text, type, count(*) FROM events GROUP BY 1, 2"
EVENT_IDS = "SELECT id::text, tenant_id::text FROM events"
CURRENT_KEYS = """
SELECT tenant_id::text, type, last4 FROM api_keys WHERE expires_at IS NULL AND revoked_at IS NULL
"""
URLS = "SELECT tenant_id::text, url FROM webhook_endpoints"
PENDING = "SELECT count(*) FROM deliveries WHERE status = 'pending'"
NOT_DELIVERED = "SELECT count(*) FROM deliveries WHERE status = 'failed'"


@dataclass(frozen=True)
class Stored:
    """What the database has of all tenants."""

    tenants: dict[str, tuple[str, str]]
    actions: dict[str, Counter[str]]
    events: dict[str, Counter[str]]
    gaps: list[str]
    keys: dict[str, dict[str, str]]
    urls: dict[str, str]
    event_ids: dict[str, str]


@contextmanager
def superuser_cursor(cluster: Cluster) -> Iterator[Any]:
    """A superuser's cursor at the current primary."""
    url = cluster.url("postgres")
    connection = psycopg2.connect(url, target_session_attrs="read-write", connect_timeout=3)
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def stored(cluster: Cluster) -> Stored:
    with superuser_cursor(cluster) as cursor:

        def rows(query: str) -> list[tuple[Any, ...]]:
            cursor.execute(query)
            return list(cursor.fetchall())

        gaps = [
            f"{table} of {tenant} has {number} rows up to {last}"
            for table in ("events", "audit_log")
            for tenant, number, last in rows(HISTORY.format(table))
            if number != last
        ]
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        for tenant, key_type, last4 in rows(CURRENT_KEYS):
            keys[tenant][key_type] = last4
        return Stored(
            tenants={tenant: (email, company) for tenant, email, company in rows(TENANTS)},
            actions=_counters(rows(AUDIT)),
            events=_counters(rows(EVENTS_BY_TYPE)),
            gaps=gaps,
            keys=keys,
            urls=dict(rows(URLS)),
            event_ids=dict(rows(EVENT_IDS)),
        )


def pending(cluster: Cluster) -> int:
    """How many deliveries have not ended."""
    with superuser_cursor(cluster) as cursor:
        cursor.execute(PENDING)
        return int(cursor.fetchone()[0])


def storage_problems(accounts: Sequence[Account], found: Stored, *, keyed: bool) -> Iterator[str]:
    """Every acknowledged write is there exactly once.

    Without Idempotency-Keys an unanswered attempt may have been carried out besides.
    """
    yield from found.gaps
    emails = Counter(email for email, _ in found.tenants.values())
    yield from (f"{email} has {number} tenants" for email, number in emails.items() if number > 1)
    if unknown := set(emails) - {account.email for account in accounts}:
        yield f"nobody was told of {unknown}"
    for account in accounts:
        for problem in account_problems(account, found, keyed=keyed):
            yield f"{account.email}: {problem}"


def account_problems(account: Account, found: Stored, *, keyed: bool) -> Iterator[str]:
    tenant = account.tenant_id or ""
    if found.tenants.get(tenant) != (account.email, account.company):
        yield f"the tenant is {found.tenants.get(tenant)}"
        return
    for names, counts, what in ((ACTIONS, found.actions, "rows"), (EVENTS, found.events, "events")):
        for kind, name in names.items():
            least = account.done[kind]
            most = least if keyed else least + account.unsure[kind]
            if not least <= counts[tenant][name] <= most:
                yield f"{least} × {kind} acknowledged, {counts[tenant][name]} {what} {name}"
    last4 = {kind: key[-4:] for kind, key in account.keys.items()}
    has = found.keys.get(tenant, {})
    # Without Idempotency-Keys a client may have missed the only answer that showed a key.
    if has != last4 if keyed else any(has.get(kind) != text for kind, text in last4.items()):
        yield f"keys {last4} acknowledged, {has} stored"
    if found.urls.get(tenant) != account.url:
        yield f"{account.url} acknowledged, {found.urls.get(tenant)} stored"


def delivery_problems(
    received: Collection[Received], accounts: Sequence[Account], found: Stored
) -> Iterator[str]:
    """Every event came at least once, the same each time, to its own tenant."""
    owners = {str(account.number): account.tenant_id for account in accounts}
    bodies: dict[str, bytes] = {}
    for one in received:
        if len(one.body) < int(one.headers["content-length"]):
            continue  # A killed worker may have sent part of a request.
        event_id = one.headers["webhook-id"]
        if bodies.setdefault(event_id, one.body) != one.body:
            yield f"event {event_id} came with another body"
        owner = owners.get(one.path.strip("/").split("-")[0])
        if owner is not None and json.loads(one.body)["tenant_id"] != owner:
            yield f"event {event_id} came to the tenant {owner}"
    missing = [event_id for event_id in found.event_ids if event_id not in bodies]
    if missing:
        yield f"{len(missing)} events never came, such as {missing[:3]}"
    if invented := set(bodies) - set(found.event_ids):
        yield f"{len(invented)} deliveries tell of what was never kept"


def duplicates(received: Collection[Received]) -> int:
    """How many deliveries were repetitions."""
    ids = Counter(one.headers["webhook-id"] for one in received)
    return sum(ids.values()) - len(ids)


def _counters(rows: Sequence[tuple[str, str, int]]) -> dict[str, Counter[str]]:
    counters: dict[str, Counter[str]] = defaultdict(Counter)
    for tenant, name, number in rows:
        counters[tenant][name] = number
    return counters
