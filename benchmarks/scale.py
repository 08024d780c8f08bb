"""`python -m benchmarks.scale`: the same requests with ever more tenants in the tables, then with more processes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import click
from sqlalchemy import Connection, create_engine, text

from benchmarks.installation import Installation, installed, megabytes
from benchmarks.requests.cases import BASE, Request
from benchmarks.requests.load import Counted, WrongAnswer, script_of, wrk
from benchmarks.requests.servers import Server, free_port, ours
from billing import keys, sessions
from billing.cli.console import table
from billing.clock import utc_now
from billing.keys import KeyDigests
from billing.passwords import Passwords
from billing.storage.database import NAME
from billing.tokens import TokenPair, Tokens

PASSWORD = "correct horse battery staple"
SIZES, WORKERS = (10, 10_000, 1_000_000), (1, 2, 4)
# Room for the rows that are read: PostgreSQL's default of 128 MB holds less than half of them.
POSTGRES = {"shared_buffers": "2GB"}
# Enough tenants, spread over all, that most rows are not in a processor's cache; and how many of them get sessions.
KNOWN, LOGGED_IN = 5_000, 1_500
ROUNDS = 3
# The nth tenant, its owner and its keys have ids in the order in which they were made, as ours have.
ID = "('01900000-0000-7000-8{}00-' || lpad(to_hex({}), 12, '0'))::uuid"
TENANT, USER, KEY = ID.format(0, "n"), ID.format(1, "n"), ID.format(2, "n * 4 + k")
EMAIL = "'ada-' || n || '@scale.example'"
DIGEST = "'scale:' || encode(sha256(int8send(n * 4 + k)), 'hex')"
TYPES = "(ARRAY['live_public', 'live_secret', 'test_public', 'test_secret'])[k + 1]"
NUMBERS = "generate_series(:above + 1, :size) n"
FOUR_KEYS = f"{NUMBERS}, generate_series(0, 3) k"
# Fills the tables in bulk, without checks; the rows are those that a registration leaves.
FILL = (
    f"""INSERT INTO tenants (id, company_name, slug, email, domain, stripe_status, tier, is_active,
            created_at, updated_at)
        SELECT {TENANT}, 'Acme Inc.', 'scale-' || n, {EMAIL}, 'acme.example', 'not_connected', 'enterprise', true,
            now(), now() FROM {NUMBERS}""",
    f"""INSERT INTO users (tenant_id, id, email, first_name, last_name, role, is_active, password_hash,
            token_version, created_at, updated_at)
        SELECT {TENANT}, {USER}, {EMAIL}, 'Ada', 'Example', 'owner', true, :password_hash, 1, now(), now()
        FROM {NUMBERS}""",
    f"""INSERT INTO webhook_endpoints (tenant_id, url, event_types, failed_events, updated_at)
        SELECT {TENANT}, 'https://hooks.acme.example/billing', ARRAY[]::text[], 0, now() FROM {NUMBERS}""",
    f"""INSERT INTO api_keys (tenant_id, id, type, digest, text, last4, created_at)
        SELECT {TENANT}, {KEY}, {TYPES}, {DIGEST},
            CASE WHEN k % 2 = 0 THEN 'pk' END, '0000', now() FROM {FOUR_KEYS}""",
    f"""INSERT INTO directory (kind, name, tenant_id, id)
        SELECT 'api_key', {DIGEST}, {TENANT}, {KEY} FROM {FOUR_KEYS}""",
    f"INSERT INTO directory (kind, name, tenant_id, id) SELECT 'email', {EMAIL}, {TENANT}, {USER} FROM {NUMBERS}",
    f"""INSERT INTO directory (kind, name, tenant_id, id)
        SELECT 'slug', 'scale-' || n, {TENANT}, {TENANT} FROM {NUMBERS}""",
)
# Gives a tenant's live secret key a text that we know.
LIVE_SECRET = f"tenant_id = {ID.format(0, ':n')} AND type = 'live_secret'"
RENAME = (
    f"""UPDATE directory SET name = :digest WHERE kind = 'api_key'
        AND name = (SELECT digest FROM api_keys WHERE {LIVE_SECRET})""",
    f"UPDATE api_keys SET digest = :digest WHERE {LIVE_SECRET}",
)
COLUMNS = ("tenants", "request", "clients", "cpu us", "postgresql cpu us", "requests/s", "p50 ms", "p99 ms")
WORKER_COLUMNS = ("workers", "requests/s", "p50 ms", "p99 ms", "cpu us", "MB a process (PSS)", "MB in all")


@dataclass(frozen=True)
class Known:
    """One of the tenants of which we know a key, and perhaps tokens."""

    number: int
    key: str
    pair: TokenPair | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of request, with so many clients at once."""

    name: str
    clients: int
    requests: Sequence[Request]
    # Its windows are this many times as long as those of others.
    longer: int = 1
    rounds: int = ROUNDS


@click.command()
@click.option(
    "--size", "sizes", multiple=True, type=click.IntRange(10), help="How many tenants. [default: 10, 10k, 1M]"
)
@click.option(
    "--workers", multiple=True, type=click.IntRange(1), help="How many processes. [default: 1, 2, 4]"
)
@click.option("--seconds", type=click.IntRange(1), default=3, show_default=True, help="How long a window is.")
def main(sizes: Sequence[int], workers: Sequence[int], seconds: int) -> None:
    """Measure requests with 10, 10,000 and a million tenants (four keys each), and 1, 2 and 4 processes."""
    port = free_port()
    with installed(POSTGRES, PORT=str(port), RATE_LIMITS="off") as installation:
        rows, above = [], 0
        for size in sorted(sizes or SIZES):
            fill(installation, above, size)
            known, above = made_known(installation, size), size
            with ours(installation, port) as server:
                rows += [
                    row
                    for kind in kinds(known)
                    for row in measured(installation, server, size, kind, seconds)
                ]
        verifying = next(iter(kinds(known)))
        processes = [
            of_workers(installation, port, count, verifying, seconds) for count in workers or WORKERS
        ]
    click.echo(f"{table(COLUMNS, rows)}\n\n{table(WORKER_COLUMNS, processes)}")


# Tenants ------------------------------------------------------------------------------------------


def fill(installation: Installation, above: int, size: int) -> None:
    """Insert the rows of the tenants after number `above`, up to number `size`."""
    settings = installation.settings
    hashed = Passwords(settings.password_peppers, settings.password_cost).hash(PASSWORD)
    engine = create_engine(installation.cluster.url(NAME))
    with engine.begin() as connection:
        connection.execute(
            text("SET LOCAL session_replication_role = replica")
        )  # Foreign keys are not checked.
        for statement in FILL:
            values = {"above": above, "size": size, "password_hash": hashed}
            connection.execute(
                text(statement), {name: value for name, value in values.items() if f":{name}" in statement}
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))
    engine.dispose()


def made_known(installation: Installation, size: int) -> list[Known]:
    """Give a random sample of the tenants a key of a known text, and some of them tokens."""
    chosen = random.Random(size).sample(range(1, size + 1), min(size, KNOWN))
    engine = create_engine(installation.cluster.url(NAME))
    digests = KeyDigests(installation.settings.key_peppers)
    with engine.begin() as connection:
        named = [(number, renamed(connection, number, digests)) for number in chosen]
    engine.dispose()
    return [
        Known(number, key, with_session(installation, number) if order < LOGGED_IN else None)
        for order, (number, key) in enumerate(named)
    ]


def renamed(connection: Connection, number: int, digests: KeyDigests) -> str:
    key = keys.mint("live_secret")
    for statement in RENAME:
        connection.execute(text(statement), {"n": number, "digest": digests.of(key)})
    return key


def with_session(installation: Installation, number: int) -> TokenPair:
    settings = installation.settings
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with installation.store.tenant(id_of(number, 0)) as tx:
        user = tx.users.find(id_of(number, 1))
        assert user is not None
        return sessions.start(tx, user, tokens=tokens, now=utc_now())


def id_of(number: int, kind: int) -> UUID:
    return UUID(f"01900000-0000-7000-8{kind}00-{number:012x}")


# Requests -----------------------------------------------------------------------------------------


def kinds(known: Sequence[Known]) -> Iterator[Kind]:
    """The kinds of requests. Logins are few per second, so get longer; refresh tokens work once, so get one round."""
    pairs = [each.pair for each in known if each.pair is not None]
    yield Kind("verify", 16, [Request("GET", f"{BASE}/verify/", {"X-API-Key": each.key}) for each in known])
    wanted = {"key_type": "test", "confirm": True}
    bearers = [{"Authorization": f"Bearer {pair.access}"} for pair in pairs]
    renewals = [Request("POST", f"{BASE}/api-keys/regenerate/", bearer, wanted) for bearer in bearers]
    yield Kind("regenerate", 4, renewals)
    tokens = [{"refresh": pair.refresh} for pair in pairs]
    yield Kind(
        "refresh", 4, [Request("POST", f"{BASE}/token/refresh/", {}, each) for each in tokens], rounds=1
    )
    accounts = [{"email": f"ada-{each.number}@scale.example", "password": PASSWORD} for each in known]
    yield Kind("login", 2, [Request("POST", f"{BASE}/login/", {}, each) for each in accounts], longer=4)


def measured(
    installation: Installation, server: Server, size: int, kind: Kind, seconds: int
) -> Iterator[list[str]]:
    script = script_of(Path(installation.environ["BILLING_STATE_DIR"], "scale.lua"), kind.requests)
    if kind.rounds > 1:
        wrk(server, script, clients=kind.clients, seconds=seconds)
    for _ in range(kind.rounds):
        before = server.cpu_seconds(), installation.postgres_seconds()
        counted = right(wrk(server, script, clients=kind.clients, seconds=kind.longer * seconds), kind)
        after = server.cpu_seconds(), installation.postgres_seconds()
        cpu = [
            f"{1e6 * (end - begin) / counted.requests:.0f}" for begin, end in zip(before, after, strict=True)
        ]
        yield [f"{size:,}", kind.name, str(kind.clients), *cpu, *rates(counted)]


def right(counted: Counted, kind: Kind) -> Counted:
    if counted.broken or counted.refused or not counted.requests:
        raise WrongAnswer(f"{kind.name}: {counted}")
    return counted


def rates(counted: Counted) -> list[str]:
    return [f"{counted.a_second:.0f}", f"{counted.p50:.2f}", f"{counted.p99:.2f}"]


# Processes ----------------------------------------------------------------------------------------


def of_workers(installation: Installation, port: int, count: int, kind: Kind, seconds: int) -> list[str]:
    """The throughput of `count` processes, and the memory of each, in which shared pages count in proportion."""
    script = script_of(Path(installation.environ["BILLING_STATE_DIR"], "scale.lua"), kind.requests)
    with ours(installation, port, "--workers", str(count)) as server:
        wrk(server, script, clients=64, seconds=2)
        before = server.cpu_seconds()
        counted = right(wrk(server, script, clients=64, seconds=2 * seconds), kind)
        micros = 1e6 * (server.cpu_seconds() - before) / counted.requests
        memory = [megabytes(pid) for pid in server.pids]
    each = sorted(memory, reverse=True)[:count]
    return [str(count), *rates(counted), f"{micros:.0f}", f"{sum(each) / count:.0f}", f"{sum(memory):.0f}"]


if __name__ == "__main__":
    main()
