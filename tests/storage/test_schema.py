"""The schema: made by migrations as the queries expect it, and checked before the server starts."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from billing import tenants
from billing.clock import utc_now
from billing.encryption import Vault
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.sessions import Session
from billing.settings import Settings
from billing.storage import database, embedded, schema
from billing.storage.store import Store
from billing.storage.tables import metadata
from tests.conftest import TestDatabase, clone


@pytest.fixture
def spare(cluster: embedded.Cluster, worker_id: str) -> Iterator[TestDatabase]:
    """A database that a test may damage."""
    name = f"billing_spare_{worker_id}"
    clone(cluster, name)
    yield TestDatabase(
        database.url(cluster, database.APP, name),
        database.url(cluster, database.OWNER, name),
        cluster.url(name),
    )


def require_safe(url: str, settings: Settings) -> None:
    store = Store(Vault(settings.encryption_keys), connections=1)
    store.open(url)
    try:
        store.require_safe()
    finally:
        store.close()


def run(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_the_migrations_make_the_tables_that_the_queries_use(spare: TestDatabase) -> None:
    engine = create_engine(spare.owner_url)
    with engine.connect() as connection:
        # SQLAlchemy fails to reflect a constraint that is not valid.
        connection.execute(text(VALIDATE_ALL))
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


VALIDATE_ALL = """
DO $$
DECLARE found record;
BEGIN
    FOR found IN SELECT conrelid::regclass AS place, conname FROM pg_constraint WHERE NOT convalidated LOOP
        EXECUTE format('ALTER TABLE %s VALIDATE CONSTRAINT %I', found.place, found.conname);
    END LOOP;
END
$$;
"""


def test_migrations_are_known_by_their_file_names() -> None:
    scripts = ScriptDirectory(str(schema.MIGRATIONS))
    assert schema._known() == {script.revision for script in scripts.walk_revisions()}
    assert schema._head() == scripts.get_current_head()


def test_every_table_is_known_and_isolated(spare: TestDatabase, settings: Settings) -> None:
    engine = create_engine(spare.superuser_url)
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')"
    with engine.connect() as connection:
        assert set(connection.scalars(text(query))) == {*metadata.tables, "alembic_version"}
    engine.dispose()
    require_safe(spare.app_url, settings)


@pytest.mark.parametrize("role", ["superuser_url", "owner_url"])
def test_the_server_refuses_a_role_above_row_security(
    spare: TestDatabase, settings: Settings, role: str
) -> None:
    with pytest.raises(schema.SchemaError, match="billing_app|ours to lift"):
        require_safe(getattr(spare, role), settings)


@pytest.mark.parametrize(
    "spoil",
    [
        "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE users NO FORCE ROW LEVEL SECURITY",
        "DROP POLICY tenant ON users",
        "CREATE POLICY open ON users USING (true)",
        "CREATE POLICY open ON users TO billing_app USING (true)",
    ],
)
def test_the_server_refuses_a_table_without_isolation(
    spare: TestDatabase, settings: Settings, spoil: str
) -> None:
    run(spare.superuser_url, spoil)
    with pytest.raises(schema.SchemaError, match="users"):
        require_safe(spare.app_url, settings)


@pytest.mark.parametrize("grant", ["GRANT billing_lookup TO {us}", "ALTER ROLE {group} BYPASSRLS"])
def test_the_server_refuses_membership_in_a_role_above_row_security(
    spare: TestDatabase, settings: Settings, grant: str
) -> None:
    # Roles belong to the whole cluster, and others use ours: make new ones. A cloud's may have any name.
    us, group, password = (f"{kind}_{secrets.token_hex(4)}" for kind in ("Us at.acme", "group", "password"))
    url = (
        make_url(spare.superuser_url)
        .set(username=us, password=password)
        .render_as_string(hide_password=False)
    )
    run(spare.superuser_url, f"CREATE ROLE \"{us}\" LOGIN PASSWORD '{password}' IN ROLE billing_app")
    harmless = "CREATE SCHEMA other; CREATE TABLE other.t (); CREATE ROLE {group}; GRANT {group} TO {us}; "
    harmless += "CREATE POLICY open ON other.t TO {group} USING (true)"
    try:
        run(spare.superuser_url, harmless.format(us=f'"{us}"', group=group))
        require_safe(url, settings)
        run(spare.superuser_url, grant.format(us=f'"{us}"', group=group))
        with pytest.raises(schema.SchemaError, match=f"{us} is a member of "):
            require_safe(url, settings)
    finally:
        run(spare.superuser_url, f'DROP SCHEMA other CASCADE; DROP ROLE "{us}"; DROP ROLE IF EXISTS {group}')


def test_the_server_refuses_a_schema_of_another_version(spare: TestDatabase, settings: Settings) -> None:
    store = Store(Vault(settings.encryption_keys), connections=1)
    store.open(spare.app_url)
    store.require_ready()
    run(spare.superuser_url, "UPDATE alembic_version SET version_num = '0000'")
    run(spare.superuser_url, "DROP FUNCTION app.oldest_server")
    with pytest.raises(schema.SchemaError, match="billing migrate"):
        store.require_ready()
    store.close()


@pytest.mark.parametrize(
    ("oldest", "serves"), [("0005", True), ("0001", True), ("9998", False), ("9999", False)]
)
def test_the_server_runs_on_a_newer_schema_that_supports_it(
    spare: TestDatabase, settings: Settings, oldest: str, serves: bool
) -> None:
    store = Store(Vault(settings.encryption_keys), connections=1)
    store.open(spare.app_url)
    run(spare.superuser_url, "UPDATE alembic_version SET version_num = '9999'")
    newer = f"CREATE OR REPLACE FUNCTION app.oldest_server() RETURNS text LANGUAGE sql RETURN '{oldest}'"
    run(spare.superuser_url, newer)
    try:
        if serves:
            store.require_ready()
        else:
            with pytest.raises(schema.SchemaError, match="9999"):
                store.require_ready()
    finally:
        store.close()


def test_migrating_a_current_schema_does_not_import_alembic(spare: TestDatabase) -> None:
    code = "import sys; from billing.storage import schema; schema.migrate(sys.argv[1]); print(*sys.modules)"
    ran = [sys.executable, "-c", code, spare.owner_url]
    imported = subprocess.run(ran, capture_output=True, text=True, check=True).stdout.split()
    assert "billing.storage.schema" in imported
    assert "alembic" not in imported


def test_a_newer_schema_is_not_migrated(spare: TestDatabase) -> None:
    run(spare.superuser_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(schema.SchemaError, match="lacks.*'9999'"):
        schema.migrate(spare.owner_url)


def test_an_older_schema_is_refused_whatever_its_oldest_server(
    spare: TestDatabase, settings: Settings
) -> None:
    store = Store(Vault(settings.encryption_keys), connections=1)
    store.open(spare.app_url)
    run(spare.superuser_url, "UPDATE alembic_version SET version_num = '0003'")
    with pytest.raises(schema.SchemaError, match="billing migrate"):
        store.require_ready()
    store.close()


@pytest.fixture
def new_name(cluster: embedded.Cluster, worker_id: str) -> str:
    """The name of a database that does not exist."""
    name = f"billing_empty_{worker_id}"
    run_outside(cluster, f'DROP DATABASE IF EXISTS "{name}"')
    return name


def run_outside(cluster: embedded.Cluster, statement: str) -> None:
    """Run a statement that no transaction may contain."""
    engine = create_engine(cluster.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def test_six_simultaneous_migrations_all_succeed(cluster: embedded.Cluster, new_name: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: database.prepare(cluster, new_name), range(6)))
    engine = create_engine(database.url(cluster, database.OWNER, new_name))
    with engine.connect() as connection:
        schema.require_current(connection)
    engine.dispose()


def test_a_migration_does_not_wait_for_a_backup(cluster: embedded.Cluster, new_name: str) -> None:
    """Every query queued behind it would wait too."""
    at_revision(cluster, new_name, "0005")
    engine = create_engine(database.url(cluster, database.OWNER, new_name))
    with engine.connect() as backup:
        backup.execute(text("LOCK TABLE audit_log IN ACCESS SHARE MODE"))
        with pytest.raises(schema.SchemaError, match="run it again later"):
            database.prepare(cluster, new_name)
    engine.dispose()
    database.prepare(cluster, new_name)


def at_revision(cluster: embedded.Cluster, name: str, revision: str) -> None:
    """Make a database as an earlier release would have left it."""
    run_outside(cluster, f'CREATE DATABASE "{name}" OWNER {database.OWNER}')
    run(cluster.url(name), f"GRANT CREATE ON SCHEMA public TO {database.OWNER}")
    engine = create_engine(database.url(cluster, database.OWNER, name))
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        command.upgrade(config, revision)
    engine.dispose()


def test_the_bootstraps_roles_are_not_above_row_security(cluster: embedded.Cluster) -> None:
    engine = create_engine(cluster.url("postgres"))
    with engine.connect() as connection:
        roles = connection.execute(
            text(
                "SELECT rolname, rolsuper, rolbypassrls, rolcanlogin FROM pg_roles WHERE rolname LIKE 'billing%'"
            )
        ).all()
    engine.dispose()
    assert sorted(tuple(role) for role in roles) == [
        ("billing_app", False, False, True),
        ("billing_lookup", False, False, False),
        ("billing_owner", False, False, True),
    ]


def test_the_applications_statements_are_not_in_postgresqls_log(cluster: embedded.Cluster) -> None:
    engine = create_engine(cluster.url("postgres"))
    with engine.connect() as connection:
        query = text("SELECT rolconfig FROM pg_roles WHERE rolname = 'billing_app'")
        found = connection.scalars(query).one()
    engine.dispose()
    assert {*found} >= {
        "log_min_error_statement=panic",
        "log_min_duration_statement=-1",
        "log_statement=none",
        "log_error_verbosity=terse",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        "INSERT INTO tasks VALUES (:tenant, 'housekeeping', :id, '', 'nobodys', now(), now(), NULL, 0, 0)",
        "UPDATE deliveries SET status = 'delivered', next_attempt_at = NULL",
        "UPDATE deliveries SET attempts = -1",
        "UPDATE sessions SET current_jti = '\\x00'",
        "UPDATE sessions SET expires_at = '-infinity'",
        "UPDATE webhook_endpoints SET event_types = '{NULL}'",
        "INSERT INTO audit_log VALUES (:tenant, 99, now(), 'a', 'system', NULL, NULL, NULL, '{}', NULL, NULL, '\\x00')",
    ],
)
def test_the_database_refuses_invalid_rows(
    store: Store, superuser: Engine, settings: Settings, wrong: str
) -> None:
    tenant_id, now = new_id(), utc_now()
    details = {
        "company_name": "Acme",
        "email": "ada@acme.example",
        "webhook_url": "https://hooks.acme.example/",
    }
    with store.tenant(tenant_id) as tx:
        made = tenants.register(
            tx, details, password_hash="-", digests=KeyDigests(settings.key_peppers), now=now
        )
        ends_at = now + timedelta(days=1)
        tx.sessions.add(Session(tenant_id, new_id(), made.owner.id, bytes(32), None, now, now, ends_at))
    with pytest.raises(IntegrityError), superuser.begin() as connection:
        changed = connection.execute(text(wrong), {"tenant": tenant_id, "id": new_id()})
        assert changed.rowcount, "there was no such row"


def test_an_index_left_invalid_is_rebuilt(cluster: embedded.Cluster, new_name: str) -> None:
    at_revision(cluster, new_name, "0007")
    broken = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'api_keys_ending'::regclass"
    run(cluster.url(new_name), broken)
    database.prepare(cluster, new_name)
    engine = create_engine(cluster.url(new_name))
    with engine.connect() as connection:
        query = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'api_keys_ending'::regclass"
        assert connection.scalars(text(query)).one()
    engine.dispose()


def test_a_migration_does_not_wait_indefinitely_for_its_turn(
    spare: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TURN_PATIENCE", "50ms")
    engine = create_engine(spare.app_url)
    with engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": schema.MIGRATION_LOCK})
        with pytest.raises(schema.SchemaError, match="or is migrating too"):
            schema.migrate(spare.owner_url)
    engine.dispose()
