"""The database schema: roles, migrations, and the checks without which the server will not start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from sqlalchemy import Connection, create_engine, exc, text

from billing.errors import DatabaseUnavailable
from billing.storage.tables import metadata

MIGRATIONS = Path(__file__).parent / "migrations"
# Any number will do that no other program locks: "billing" in ASCII.
MIGRATION_LOCK = 0x62696C6C696E67
INSUFFICIENT_PRIVILEGE = "42501"
LOCK_NOT_AVAILABLE = "55P03"
# How long to wait for other migrations, and then for a table: statements that come later queue behind that wait.
TURN_PATIENCE = "60s"
PATIENCE = "3s"


class SchemaError(Exception):
    """The database is not one that this version may work with; the message says what to do."""


def bootstrap_sql() -> str:
    """The SQL that a DBA runs once, which makes the roles."""
    return (MIGRATIONS / "bootstrap.sql").read_text()


def migrate(owner_url: str) -> str:
    """Bring the schema to this version, in one transaction; returns the revision.

    Any number of processes may run it at once: each takes the lock before it reads the revision. Raises
    `DatabaseUnavailable`, and `SchemaError` if the revision is a newer version's, if the role may not migrate, or
    if another session holds the lock or a table for too long.
    """
    engine = create_engine(owner_url, hide_parameters=True)
    try:
        with _translated_errors(), engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{TURN_PATIENCE}'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            connection.execute(text(f"SET LOCAL lock_timeout = '{PATIENCE}'"))
            if _present(connection) != _head():
                _upgrade(connection)
    finally:
        engine.dispose()
    return _head()


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except exc.OperationalError as error:
        if getattr(error.orig, "pgcode", None) != LOCK_NOT_AVAILABLE:
            raise DatabaseUnavailable from error
        raise SchemaError(
            "Somebody holds a table that is to be changed, as a backup does, or is migrating too, and nothing was "
            "changed: run it again later."
        ) from error
    except exc.ProgrammingError as error:
        if getattr(error.orig, "pgcode", None) != INSUFFICIENT_PRIVILEGE:
            raise
        raise SchemaError(
            "This role may not migrate: connect as billing_owner, who owns the database."
        ) from error


def _upgrade(connection: Connection) -> None:
    # Imported here, as a server and its worker mostly have nothing to migrate, and need no Alembic.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaError(f"The database is at a migration that this version lacks: {error}.") from error


def require_current(connection: Connection) -> None:
    """Raises `SchemaError` unless the tables are of this version, or of a newer one that this version may run on."""
    present = _present(connection)
    if present == _head() or _is_newer_and_serves_us(connection, present):
        return
    raise SchemaError(
        f"The database is at migration {present or 'none'}, this version needs {_head()}: run `billing migrate`."
    )


def _present(connection: Connection) -> str | None:
    """The migration that the database is at, None before the first."""
    has_versions = connection.dialect.has_table(connection, "alembic_version")
    return connection.scalar(text("SELECT version_num FROM alembic_version")) if has_versions else None


def _is_newer_and_serves_us(connection: Connection, present: str | None) -> bool:
    # A newer schema's revision is unknown to us. The schema names the oldest revision whose server it supports.
    names_it = "SELECT to_regprocedure('app.oldest_server()') IS NOT NULL"
    if present is None or present in _known() or not connection.scalar(text(names_it)):
        return False
    return connection.scalar(text("SELECT app.oldest_server()")) in _known()


def require_safe(connection: Connection) -> None:
    """Raises `SchemaError` unless row security binds the role that we are."""
    role = connection.execute(
        text("SELECT rolname, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
    )
    name, is_super, bypasses = role.one()
    if is_super or bypasses:
        raise SchemaError(f"The role {name} passes over row-level security: connect as billing_app.")
    if others := connection.scalars(text(MIGHTY), {"tables": list(metadata.tables)}).all():
        raise SchemaError(
            f"The role {name} is a member of {', '.join(others)}, and so passes over row-level security: "
            "connect as billing_app, a member of nothing."
        )
    if open_tables := connection.scalars(text(UNPROTECTED), {"tables": list(metadata.tables)}).all():
        raise SchemaError(
            f"Row-level security is not in force, or is ours to lift, on: {', '.join(open_tables)}."
        )


# Roles that we could become, or whose policies count for us.
MIGHTY = """
SELECT rolname FROM pg_roles
WHERE rolname <> current_user AND pg_has_role(current_user, oid, 'MEMBER')
    AND (
        rolsuper OR rolbypassrls
        OR EXISTS (
            SELECT FROM pg_policy JOIN pg_class ON pg_class.oid = polrelid
            WHERE relnamespace = 'public'::regnamespace AND relname = ANY (:tables)
                AND pg_roles.oid = ANY (polroles) AND polname <> 'tenant'
        )
    )
ORDER BY rolname
"""
# A further permissive policy, for PUBLIC or for us, lets through rows that the policy `tenant` does not.
UNPROTECTED = """
SELECT relname FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND relname = ANY (:tables) AND (
    NOT relrowsecurity OR NOT relforcerowsecurity OR pg_has_role(relowner, 'MEMBER')
    OR NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = pg_class.oid)
    OR EXISTS (
        SELECT FROM pg_policy
        WHERE polrelid = pg_class.oid AND polpermissive AND polname <> 'tenant'
            AND polroles && ARRAY(SELECT oid FROM pg_roles WHERE rolname = current_user UNION SELECT 0)
    )
) ORDER BY relname
"""


@cache
def _known() -> frozenset[str]:
    """The migrations that this version has: their files' names begin with their numbers."""
    return frozenset(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def _head() -> str:
    if not _known():
        raise SchemaError("This installation has no migrations.")
    return max(_known())
