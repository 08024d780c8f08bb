"""A tenant reaches only its own rows: with both safeguards, and with either of them off."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, exc, text

from billing import keys, sessions, stripe_connect, tenants
from billing.audit import Choice as AuditChoice
from billing.audit import Row as AuditRow
from billing.errors import BillingError, NotFound, StateUnknown
from billing.idempotency import Claim, StoredAnswer
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage import driver
from billing.storage.driver import StorageError
from billing.storage.shelf import OF_TENANT, Shelf
from billing.storage.store import Store, TenantTx
from billing.storage.tables import metadata
from billing.stripe_connect import ACCOUNT_NAME, CHECK, Account, Connected, Connection, Grant, State
from billing.tasks import Task
from billing.tenants import Registered
from billing.tokens import Tokens
from billing.webhooks.delivery import Begun, Delivery, Settled
from billing.webhooks.endpoints import Endpoint
from billing.webhooks.replay import Choice
from billing.webhooks.signing import new_secret
from tests.conftest import TestDatabase

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
LATER = NOW + timedelta(days=1)
ANSWER = StoredAnswer(200, {}, "{}")
MUCH_LATER = NOW + timedelta(days=1000)
TABLES = sorted(metadata.tables)


class House:
    """Two tenants, and a store that may have lost a safeguard."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.tokens = Tokens(settings.jwt_keys, settings.public_base_url)
        self.digests = KeyDigests(settings.key_peppers)
        # First the attacker: if a missing filter let its setup change Acme's rows, no test would notice.
        self.globex, _, _ = self.connect(self.register("Globex"))
        self.acme, self.state, self.connection = self.connect(self.register("Acme"))
        self.arrived, self.pending = self.deliver(self.acme)
        self.claim, self.kept = self.claim_key(self.acme, b"claimed"), self.claim_key(self.acme, b"kept")
        with self.store.tenant(self.acme.tenant.id) as tx:
            assert tx.idempotency.keep(self.kept, ANSWER, until=LATER)
        with store.tenant(self.globex.tenant.id) as tx:
            self.head = tx.audit.head()
        # As the worker holds it while processing it.
        subject = self.connection.account.id
        self.task = Task(self.acme.tenant.id, CHECK, self.connection.id, subject, "general", NOW, 0, 0)

    def register(self, name: str) -> Registered:
        url = f"https://hooks.{name.lower()}.example/"
        details = {"company_name": name, "email": f"ada@{name}.example", "webhook_url": url}
        with self.store.tenant(new_id()) as tx:
            made = tenants.register(tx, details, password_hash="-", digests=self.digests, now=NOW)
            sessions.start(tx, made.owner, tokens=self.tokens, now=NOW)
            tx.webhooks.retire_secrets(NOW, expires_at=LATER)
            tx.webhooks.add_secret(new_secret(), NOW)
            return made

    def connect(self, made: Registered) -> tuple[Registered, State, Connection]:
        """A state, a connection, and the event and the task that result."""
        account = Account(f"acct_{made.tenant.slug}")
        grant = Grant(account.id, "read_write", livemode=False)
        with self.store.tenant(made.tenant.id) as tx:
            started = stripe_connect.start(
                tx,
                made.owner,
                stripe_connect.new_state(),
                flow="oauth",
                return_url=None,
                browser=None,
                now=NOW,
            )
            connected = stripe_connect.connect(tx, grant, account, livemode=False, now=NOW)
        assert isinstance(connected, Connected)
        return replace(made, tenant=connected.tenant), started, connected.connection

    def deliver(self, made: Registered) -> tuple[Delivery, Delivery]:
        """One delivery that has succeeded, and one that is pending."""
        with self.store.tenant(made.tenant.id) as tx:
            [begun] = tx.deliveries.begin(NOW, types=None, most=1)
            tx.deliveries.record_results([Settled(begun.id, 1, "delivered", None, 200, None, 1, NOW)])
            deliveries = {delivery.status: delivery for delivery in tx.deliveries.recent(100)}
        return deliveries["delivered"], deliveries["pending"]

    def claim_key(self, made: Registered, name: bytes) -> Claim:
        """The tenant's claim of an idempotency key."""
        claim = Claim(made.tenant.id, name, new_id(), NOW)
        with self.store.tenant(made.tenant.id) as tx:
            assert tx.idempotency.take(claim, "asked", until=LATER)
        return claim


SAFEGUARDS = ["both", "filters off", "row security off"]
FILTER = re.compile(rf"\w+\.(tenant_id|id) = %\({OF_TENANT}\)s::UUID", re.IGNORECASE)


def take_filters_off(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send each statement without its filter by tenant."""
    defer = driver.Connection.defer

    @event.listens_for(store._engine, "before_cursor_execute", retval=True)
    def take_off(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> Any:
        return without_filters(statement), parameters

    def defer_without(connection: driver.Connection, statement: str, parameters: Any) -> None:
        defer(connection, without_filters(statement), parameters)

    monkeypatch.setattr(driver.Connection, "defer", defer_without)


def without_filters(statement: str) -> str:
    changed = FILTER.sub("true", statement)
    assert f"%({OF_TENANT})s" not in changed
    return changed


@pytest.fixture(params=SAFEGUARDS)
def house(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    store: Store,
    settings: Settings,
    test_database: TestDatabase,
) -> Iterator[House]:
    if request.param == "filters off":
        take_filters_off(store, monkeypatch)
    if request.param == "row security off":
        store.open(test_database.superuser_url)
    yield House(store, settings)


# Every method of a shelf, on a row of another tenant: what it returns, which must be nothing.
Attempt = Callable[[TenantTx, House], Any]
ATTEMPTS: dict[str, Attempt] = {
    "users.find": lambda tx, h: tx.users.find(h.acme.owner.id),
    "users.all": lambda tx, h: [u for u in tx.users.all() if u.tenant_id != tx.tenant_id],
    "users.password_hash": lambda tx, h: refused(lambda: tx.users.password_hash(h.acme.owner.id)),
    "users.note_login": lambda tx, h: tx.users.note_login(h.acme.owner, "stolen", NOW),
    "users.change_password": lambda tx, h: tx.users.change_password(h.acme.owner, "stolen", NOW),
    "users.find_by_email": lambda tx, h: tx.users.find_by_email(h.acme.owner.email),
    "users.set_role": lambda tx, h: tx.users.set_role(h.acme.owner.id, "developer", NOW),
    "users.enable": lambda tx, h: tx.users.enable(h.acme.owner.id, NOW),
    "users.disable": lambda tx, h: tx.users.disable(h.acme.owner.id, NOW),
    "users.reset_password": lambda tx, h: tx.users.reset_password(h.acme.owner.id, "stolen", NOW),
    "sessions.find": lambda tx, h: tx.sessions.find(session_of(tx, h)),
    "sessions.lock_standing": lambda tx, h: tx.sessions.lock_standing(h.acme.owner, session_of(tx, h)),
    "sessions.rotate": lambda tx, h: tx.sessions.rotate(session_of(tx, h), b"", b"", NOW),
    "sessions.end": lambda tx, h: tx.sessions.end(session_of(tx, h), NOW),
    "sessions.end_all": lambda tx, h: tx.sessions.end_all(h.acme.owner.id, NOW),
    "api_keys.living": lambda tx, h: foreign(tx, tx.api_keys.living(NOW, keys.TYPES)),
    "api_keys.worth_showing": lambda tx, h: foreign(tx, tx.api_keys.worth_showing(NOW)),
    "api_keys.expire": lambda tx, h: tx.api_keys.expire(h.acme.keys[0].key.ending(NOW)),
    "api_keys.note_use": lambda tx, h: tx.api_keys.note_use(h.acme.keys[0].key.id, NOW),
    "api_keys.revoke": lambda tx, h: foreign(tx, tx.api_keys.revoke(keys.TYPES, NOW)),
    "keys.regenerate": lambda tx, h: foreign(tx, regenerate(tx, h)),
    "tenants.set_active": lambda tx, h: tx.tenants.set_active(False, NOW),
    "tenants.set_tier": lambda tx, h: tx.tenants.set_tier("pro", NOW),
    "tenants.set_stripe": lambda tx, h: tx.tenants.set_stripe("acct_stolen", "active", NOW),
    "directory.claim": lambda tx, h: tx.directory.claim("email", h.acme.owner.email, new_id()) or None,
    "directory.owns": lambda tx, h: tx.directory.owns(ACCOUNT_NAME, h.connection.account.id) or None,
    "directory.release": lambda tx, h: tx.directory.release(ACCOUNT_NAME, h.connection.account.id),
    "stripe.find": lambda tx, h: [c for c in [tx.stripe.find()] if c is None or c.id == h.connection.id],
    "stripe.keep": lambda tx, h: tx.stripe.keep(replace(h.connection, ended_at=NOW)),
    "stripe.add_state": lambda tx, h: tx.stripe.add_state(replace(h.state, user_id=h.globex.owner.id)),
    "stripe.end_unused_states": lambda tx, h: tx.stripe.end_unused_states(),
    "stripe.end_states_of": lambda tx, h: tx.stripe.end_states_of(h.acme.owner.id),
    "stripe.forget_states": lambda tx, h: [
        digest for digest in tx.stripe.forget_states(LATER) if digest == h.state.digest
    ],
    "stripe.lock_state": lambda tx, h: refused(lambda: tx.stripe.lock_state(h.state.id)),
    "stripe.consume_state": lambda tx, h: tx.stripe.consume_state(h.state.id, NOW),
    "tenants.touch": lambda tx, h: tx.tenants.touch(LATER),
    "sessions.prune": lambda tx, h: tx.sessions.prune(MUCH_LATER) and None,
    "webhooks.find": lambda tx, h: [e for e in [tx.webhooks.find()] if e.url != url_of(h.globex)],
    "webhooks.keep": lambda tx, h: tx.webhooks.keep(Endpoint("https://stolen.example/"), LATER),
    "webhooks.add_secret": lambda tx, h: renew_secret(tx),
    "webhooks.retire_secrets": lambda tx, h: tx.webhooks.retire_secrets(NOW, expires_at=NOW),
    "webhooks.secrets": lambda tx, h: tx.webhooks.secrets(NOW)[2:],
    "webhooks.signing_secrets": lambda tx, h: [
        text for text in tx.webhooks.signing_secrets(NOW) if text == h.acme.webhook_secret
    ],
    "webhooks.tidy_secrets": lambda tx, h: tx.webhooks.tidy_secrets(MUCH_LATER),
    "deliveries.add": lambda tx, h: tx.deliveries.add(replace(h.pending, event_id=event_of(tx))),
    "deliveries.begin": lambda tx, h: [
        begun for begun in tx.deliveries.begin(NOW, types=None, most=100) if begun.id == h.pending.id
    ],
    "deliveries.uncount": lambda tx, h: tx.deliveries.uncount(
        [Begun(h.pending.id, h.pending.event_id, h.pending.event_type, 0, b"", None)]
    ),
    "deliveries.record_results": lambda tx, h: tx.deliveries.record_results(
        [Settled(h.pending.id, 0, "delivered", None, 200, None, 1, NOW)]
    ),
    "deliveries.next_due": lambda tx, h: (
        (tx.deliveries.cancel("stolen", NOW) and None) or tx.deliveries.next_due(types=None)
    ),
    "deliveries.drop_unwanted": lambda tx, h: tx.deliveries.drop_unwanted([], LATER),
    "deliveries.cancel": lambda tx, h: tx.deliveries.cancel("stolen", NOW) and None,
    "deliveries.replay": lambda tx, h: tx.deliveries.replay([h.arrived.event_id], NOW),
    "deliveries.recent": lambda tx, h: [
        delivery for delivery in tx.deliveries.recent(100) if delivery.id in (h.arrived.id, h.pending.id)
    ],
    "deliveries.stats": lambda tx, h: tx.deliveries.stats(NOW).delivered_24h or None,
    "deliveries.prune": lambda tx, h: tx.deliveries.prune(MUCH_LATER) and None,
    "events.record": lambda tx, h: tx.events.record("webhook.test", {}, now=NOW),
    "events.keep_test": lambda tx, h: tx.events.keep_test("webhook.test", {}, now=NOW) and None,
    "events.measure": lambda tx, h: tx.events.measure(chosen(h), wanted=()).events or None,
    "events.chosen": lambda tx, h: tx.events.chosen(chosen(h), wanted=(), after=0, last=100, most=100),
    "tasks.add": lambda tx, h: tx.tasks.add(CHECK, h.task.id, subject="stolen", due_at=NOW, now=NOW),
    "tasks.drop": lambda tx, h: tx.tasks.drop(CHECK, subject=h.task.subject),
    "tasks.finish": lambda tx, h: tx.tasks.finish(h.task) or None,
    "tasks.postpone": lambda tx, h: tx.tasks.postpone(h.task, NOW),
    "idempotency.take": lambda tx, h: (
        tx.idempotency.take(replace(h.claim, at=MUCH_LATER), "stolen", until=MUCH_LATER) and None
    ),
    "idempotency.find": lambda tx, h: tx.idempotency.find(h.kept.name),
    "idempotency.keep": lambda tx, h: tx.idempotency.keep(h.claim, ANSWER, until=LATER) or None,
    "idempotency.release": lambda tx, h: tx.idempotency.release(h.claim),
    "audit.head": lambda tx, h: [head for head in [tx.audit.head()] if head != h.head],
    "audit.after": lambda tx, h: foreign_rows(tx, tx.audit.after(None, most=100)),
    "audit.beyond_head": lambda tx, h: tx.audit.beyond_head(),
    "audit.recent": lambda tx, h: foreign_rows(tx, tx.audit.recent(AuditChoice(), most=100)),
    "keyring_uses.counts": lambda tx, h: [c for c in tx.keyring_uses.counts(NOW) if c[2] > 4],
    "users.add": lambda tx, h: tx.users.add(replace(h.acme.owner, id=new_id()), password_hash="-"),
}


def url_of(made: Registered) -> str | None:
    return made.tenant.webhook_url


def renew_secret(tx: TenantTx) -> None:
    tx.webhooks.retire_secrets(NOW, expires_at=LATER)
    tx.webhooks.add_secret("stolen", NOW)


def event_of(tx: TenantTx) -> Any:
    """The id of one of the tenant's own events."""
    return tx.deliveries.recent(1)[0].event_id


def chosen(house: House) -> Choice:
    """Acme's event, by an id that Globex cannot know."""
    return Choice(event_ids=(house.arrived.event_id,))


def refused(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except (NotFound, StateUnknown):
        return None


def session_of(tx: TenantTx, house: House) -> Any:
    """The id of Acme's session, which Globex cannot know and is given here."""
    with house.store.tenant(house.acme.tenant.id) as theirs:
        query = text("SELECT id FROM sessions WHERE tenant_id = :id")
        return theirs.sessions._connection.scalars(query, {"id": house.acme.tenant.id}).one()


def foreign(tx: TenantTx, found: list[keys.ApiKey]) -> list[keys.ApiKey]:
    return [key for key in found if key.tenant_id != tx.tenant_id]


def foreign_rows(tx: TenantTx, found: list[AuditRow]) -> list[AuditRow]:
    return [row for row in found if row.tenant_id != tx.tenant_id]


def regenerate(tx: TenantTx, house: House) -> list[keys.ApiKey]:
    return list(keys.regenerate(tx, "all", grace=timedelta(), digests=house.digests, now=NOW).previous)


def rows_of(superuser: Engine, tenant_id: object) -> dict[str, Any]:
    column = {table: "id" if table == "tenants" else "tenant_id" for table in TABLES}
    with superuser.connect() as connection:
        return {
            table: sorted(connection.scalars(text(query), {"id": tenant_id}))
            for table in TABLES
            for query in [f"SELECT to_jsonb(t)::text FROM {table} t WHERE {column[table]} = :id"]
        }


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_another_tenants_rows_are_neither_seen_nor_changed(
    house: House, superuser: Engine, attempt: str
) -> None:
    before = rows_of(superuser, house.acme.tenant.id)
    with house.store.tenant(house.globex.tenant.id) as tx:
        assert ATTEMPTS[attempt](tx, house) in (None, [])
        assert tx.tenants.get().id == house.globex.tenant.id
    assert rows_of(superuser, house.acme.tenant.id) == before


def test_a_use_of_a_key_is_recorded_only_for_its_own_tenant(house: House, superuser: Engine) -> None:
    before = rows_of(superuser, house.acme.tenant.id)
    another = house.register("Initech")
    theirs, stolen = another.keys[0].key, house.acme.keys[0].key
    house.store.note_uses({another.tenant.id: (theirs.id, NOW), house.globex.tenant.id: (stolen.id, NOW)})
    assert rows_of(superuser, house.acme.tenant.id) == before
    with house.store.tenant(another.tenant.id) as tx:
        used = [key.id for key in tx.api_keys.living(NOW, keys.TYPES) if key.last_used_at]
    assert used == [theirs.id]


def test_platform_lookups_find_the_right_tenant(house: House) -> None:
    acme, globex = house.acme, house.globex
    with house.store.platform() as platform:
        for made in (acme, globex):
            account = platform.find_account(made.owner.email)
            assert account is not None
            assert (account.tenant.id, account.user.id) == (made.tenant.id, made.owner.id)
            assert platform.find_tenant(made.tenant.slug) == made.tenant


def test_adding_another_tenants_name_rolls_the_transaction_back(house: House, superuser: Engine) -> None:
    acme, globex = house.acme.tenant.id, house.globex.tenant.id
    before = rows_of(superuser, acme), rows_of(superuser, globex)
    with pytest.raises(StorageError, match="UniqueViolation"), house.store.tenant(globex) as tx:
        tx.tenants.touch(LATER)
        tx.directory.add("email", house.acme.owner.email, new_id())
    assert (rows_of(superuser, acme), rows_of(superuser, globex)) == before


def test_every_method_of_every_shelf_is_attempted() -> None:
    own_rows_only = {
        "tenants.get",
        "tenants.add",
        "api_keys.add",
        "directory.add",
        "sessions.add",
        "webhooks.open",
    }
    shelves = vars(TenantTx(None, new_id(), None, None))  # type: ignore[arg-type]
    methods = {
        f"{noun}.{name}"
        for noun, shelf in shelves.items()
        if isinstance(shelf, Shelf)
        for name in vars(type(shelf))
        if not name.startswith("_")
    }
    assert methods - own_rows_only - ATTEMPTS.keys() == {"audit.record"}


def test_attempts_succeed_with_both_safeguards_off(
    store: Store,
    settings: Settings,
    test_database: TestDatabase,
    superuser: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = House(store, settings)
    store.open(test_database.superuser_url)
    take_filters_off(store, monkeypatch)
    with store.tenant(house.globex.tenant.id) as tx:
        assert tx.users.find(house.acme.owner.id) is not None
        assert foreign(tx, tx.api_keys.revoke(keys.TYPES, NOW))
        assert tx.directory.owns(ACCOUNT_NAME, house.connection.account.id)
        assert tx.stripe.lock_state(house.state.id) == house.state
        assert len(tx.webhooks.secrets(NOW)) > 2
        assert tx.deliveries.stats(NOW).delivered_24h
        tx.tasks.finish(house.task)
        tx.api_keys.note_use(house.acme.keys[0].key.id, MUCH_LATER)
    rows = rows_of(superuser, house.acme.tenant.id)
    assert not any(CHECK in task for task in rows["tasks"])
    assert any(f"{MUCH_LATER:%Y-%m-%d}" in key for key in rows["api_keys"])


# Privileges of the application's role ------------------------------------------------------------


@pytest.fixture
def app(test_database: TestDatabase) -> Iterator[Engine]:
    engine = create_engine(test_database.app_url)
    yield engine
    engine.dispose()


@pytest.fixture
def two(store: Store, settings: Settings) -> House:
    return House(store, settings)


@pytest.mark.parametrize("table", TABLES)
def test_without_a_tenant_every_table_is_empty(two: House, app: Engine, table: str) -> None:
    with app.connect() as connection:
        assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0


@pytest.mark.parametrize("table", TABLES)
def test_with_a_tenant_a_table_shows_only_its_rows(two: House, app: Engine, table: str) -> None:
    column = "id" if table == "tenants" else "tenant_id"
    with app.connect() as connection:
        become(connection, two.acme.tenant.id)
        assert connection.scalars(text(f"SELECT DISTINCT {column} FROM {table}")).all() == [
            two.acme.tenant.id
        ]


def become(connection: Any, tenant_id: object) -> None:
    connection.execute(text("SELECT set_config('app.tenant_id', :id, true)"), {"id": str(tenant_id)})


def test_a_row_cannot_be_written_for_another_tenant(two: House, app: Engine) -> None:
    claim = "INSERT INTO directory VALUES ('slug', 'stolen', :id, :id)"
    move = "UPDATE users SET tenant_id = :id"
    for statement in (claim, move):
        with app.connect() as connection:
            become(connection, two.globex.tenant.id)
            with pytest.raises(exc.ProgrammingError, match="row-level security"):
                connection.execute(text(statement), {"id": two.acme.tenant.id})


def test_a_key_cannot_refer_to_another_tenants_user(two: House, superuser: Engine) -> None:
    with superuser.connect() as connection, pytest.raises(exc.IntegrityError, match="foreign key"):
        connection.execute(
            text("UPDATE sessions SET user_id = :user WHERE tenant_id = :tenant"),
            {"user": two.acme.owner.id, "tenant": two.globex.tenant.id},
        )


@pytest.mark.parametrize(
    "statement",
    [
        "SET ROLE billing_lookup",
        "SET ROLE billing_owner",
        "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tenant ON users",
        "DELETE FROM users",
        "TRUNCATE users",
        "UPDATE audit_log SET action = 'nothing'",
        "DELETE FROM audit_log",
        "UPDATE directory SET name = 'x'",
        "UPDATE events SET body = ''",
        "DELETE FROM event_heads",
        "DELETE FROM stripe_connections",
        "CREATE TABLE mine (id int)",
        "CREATE FUNCTION app.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_the_applications_role_may_not_execute(two: House, app: Engine, statement: str) -> None:
    with app.connect() as connection:
        become(connection, two.acme.tenant.id)
        with pytest.raises(exc.ProgrammingError, match="denied|must be owner"):
            connection.execute(text(statement))


def test_the_lookup_finds_only_exact_names(two: House, app: Engine) -> None:
    find = text("SELECT id FROM app.find(:kind, :names)")
    with app.connect() as connection:
        assert connection.scalars(find, {"kind": "slug", "names": ["acme"]}).all() == [two.acme.tenant.id]
        for pattern in ("%", "", "acm", "acme%", "ACME"):
            assert connection.scalars(find, {"kind": "slug", "names": [pattern]}).all() == []


def test_a_pooled_connection_forgets_its_tenant(two: House) -> None:
    with two.store._engine.connect() as connection:
        assert connection.scalar(text("SELECT app.current_tenant()")) is None


def test_a_failed_transaction_changes_nothing(two: House, superuser: Engine) -> None:
    before = rows_of(superuser, two.acme.tenant.id)
    with pytest.raises(BillingError), two.store.tenant(two.acme.tenant.id) as tx:
        keys.revoke(tx, "all", reason=None, now=NOW)
        raise NotFound
    assert rows_of(superuser, two.acme.tenant.id) == before
