"""Which PostgreSQL the store connects to: the one named in the settings, or an embedded one prepared here."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path

from psycopg2 import ProgrammingError
from psycopg2.extensions import make_dsn
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from billing.settings import Settings, SettingsError
from billing.storage import embedded, schema
from billing.storage.driver import connect_args

OWNER, APP = "billing_owner", "billing_app"
NAME = "billing"
DRIVER = "postgresql+psycopg2"
SEVERAL_HOSTS = re.compile(
    r"(?P<before>[^:/@]+://(?:[^@]*@)?)(?P<hosts>[^/?@]*,[^/?@]*)(?P<after>(?:[/?].*)?)"
)


@dataclass
class Database:
    """Where to connect as the application, and, where it is known, as the owner of the tables."""

    app_url: str = field(repr=False)
    owner_url: str | None = field(repr=False)
    server: embedded.Server | None = None
    replica_url: str | None = field(default=None, repr=False)

    @property
    def is_embedded(self) -> bool:
        return self.server is not None

    @property
    def place(self) -> str:
        """Host, port and name, for people to read: without user and password."""
        url = make_url(self.app_url)
        host = url.host or url.query.get("host", "localhost")
        port = f":{url.port}" if url.port else ""
        return f"{host if isinstance(host, str) else ','.join(host)}{port}/{url.database}"

    def require_owner_url(self) -> str:
        """Where to connect as the owner; raises `SettingsError` where that is not known."""
        if self.owner_url is None:
            raise SettingsError("MIGRATION_DATABASE_URL is missing: the database's address as billing_owner.")
        return self.owner_url

    def close(self) -> None:
        if self.server is not None:
            self.server.close()


def open_database(settings: Settings) -> Database:
    """Open the database of the settings. An embedded one is started and migrated where that is needed."""
    if settings.database_url is not None:
        owner, replica = settings.migration_database_url, settings.database_replica_url
        return Database(
            _with_driver("DATABASE_URL", settings.database_url),
            owner and _with_driver("MIGRATION_DATABASE_URL", owner),
            replica_url=replica and _with_driver("DATABASE_REPLICA_URL", replica, session="standby"),
        )
    return open_embedded(settings.state_dir, bin_dir=settings.postgres_bin)


def migrate(owner_url: str) -> str:
    """Bring the database at this address to this version; returns the revision.

    Raises `SettingsError`, `DatabaseUnavailable` and `schema.SchemaError`.
    """
    return schema.migrate(_with_driver("MIGRATION_DATABASE_URL", owner_url))


def open_embedded(
    state_dir: Path,
    *,
    name: str = NAME,
    bin_dir: Path | None = None,
    options: dict[str, str] | None = None,
) -> Database:
    """Start, prepare and open the database in this state directory; raises `embedded.EmbeddedPostgresError`."""
    server = embedded.start(state_dir, bin_dir=bin_dir, options=options or {})
    try:
        prepare(server.cluster, name)
    except BaseException:
        server.close()
        raise
    return Database(url(server.cluster, APP, name), url(server.cluster, OWNER, name), server)


def prepare(cluster: embedded.Cluster, name: str = NAME) -> None:
    """Make roles, database and tables where they are missing. Several processes may run it at once."""
    engine = create_engine(cluster.url("postgres"), isolation_level="AUTOCOMMIT", hide_parameters=True)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": schema.MIGRATION_LOCK})
            if not _has_database(connection, name):
                _bootstrap(connection, cluster)
                connection.exec_driver_sql(f'CREATE DATABASE "{name}" OWNER {OWNER}')
            _let_owner_create(cluster, name)
    finally:
        engine.dispose()
    schema.migrate(url(cluster, OWNER, name))


def url(cluster: embedded.Cluster, role: str, name: str) -> str:
    """The URL by which a role connects to a database of an embedded server."""
    return cluster.url(name, user=role, password=_password(cluster, role))


def _has_database(connection: Connection, name: str) -> bool:
    query = text("SELECT EXISTS (SELECT FROM pg_database WHERE datname = :name)")
    return bool(connection.scalar(query, {"name": name}))


def _bootstrap(connection: Connection, cluster: embedded.Cluster) -> None:
    connection.exec_driver_sql(schema.bootstrap_sql())
    for role in (OWNER, APP):
        connection.exec_driver_sql(f"ALTER ROLE {role} PASSWORD '{_password(cluster, role)}'")


def _let_owner_create(cluster: embedded.Cluster, name: str) -> None:
    # Since PostgreSQL 15 the database's owner has the schema by role membership, which a NOINHERIT role does not use.
    engine = create_engine(cluster.url(name), isolation_level="AUTOCOMMIT", hide_parameters=True)
    may = text("SELECT has_schema_privilege(:owner, 'public', 'CREATE')")
    with engine.connect() as connection:
        # Not a second time: another process's migration may be granting on the schema at this moment.
        if not connection.scalar(may, {"owner": OWNER}):
            connection.exec_driver_sql(f"GRANT CREATE ON SCHEMA public TO {OWNER}")
    engine.dispose()


def _password(cluster: embedded.Cluster, role: str) -> str:
    # Derived from the one secret that the server keeps, so that there is no second file to lose.
    return hmac.digest(cluster.password.encode(), role.encode(), hashlib.sha256).hex()


def _with_driver(setting: str, text: str, *, session: str = "read-write") -> str:
    try:
        url = _parsed(text, session)
    except (ArgumentError, ValueError):
        url = None  # The library's message could quote the password.
    # An @ in the host is one of the password that is not percent-encoded: what follows it would be printed.
    if url is None or url.drivername not in ("postgresql", "postgres", DRIVER) or "@" in (url.host or ""):
        raise SettingsError(f"{setting} must be like postgresql://user:password@host:5432/billing.")
    rendered = url.set(drivername=DRIVER).render_as_string(hide_password=False)
    try:
        make_dsn(**connect_args(rendered))
    except ProgrammingError:
        raise SettingsError(f"{setting} must have only parameters that libpq knows.") from None
    return rendered


def _parsed(text: str, session: str) -> URL:
    """Parse the URL; several hosts as libpq writes them, `one:5432,other:5432`, are turned into SQLAlchemy's form.

    Several hosts get this `target_session_attrs`, unless the URL has one.
    """
    several = SEVERAL_HOSTS.fullmatch(text)
    if several is None:
        return make_url(text)
    url = make_url(several["before"] + several["after"])
    url = url.update_query_pairs([("host", host) for host in several["hosts"].split(",")])
    return url.update_query_dict({"target_session_attrs": session, **url.query})
