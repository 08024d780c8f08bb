"""`billing migrate` and `billing secrets`: prepare an installation, and rotate its keys."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import click

from billing.cli.console import as_json, done, opened_as_owner, opened_store, show
from billing.clock import utc_now
from billing.settings import Settings, migration_database_url, new_secrets
from billing.storage import database, schema


@click.command()
@click.option(
    "--bootstrap-sql", is_flag=True, help="Print what a DBA runs once: the roles. Needs no settings."
)
def migrate(bootstrap_sql: bool) -> None:
    """Bring the database to this version and print its revision.

    MIGRATION_DATABASE_URL says where, and is all it needs. Without that the embedded database is started.

    \b
    Example:
      billing migrate --bootstrap-sql | psql postgres
      billing migrate
    """
    click.echo(schema.bootstrap_sql() if bootstrap_sql else revision())


def revision() -> str:
    """Migrate the database and return its revision; raises `SettingsError` if the owner's URL is not known."""
    owner_url = migration_database_url()
    if owner_url is not None:
        return database.migrate(owner_url)
    with closing(database.open_database(Settings.load())) as opened:
        return database.migrate(opened.require_owner_url())


@click.group()
def secrets() -> None:
    """The secrets of an installation.

    \b
    Example:
      billing secrets generate
    """


@secrets.command()
def generate() -> None:
    """Print a new set of keyrings for production, as lines of a .env file.

    \b
    Example:
      (umask 077; billing secrets generate >> .env)
    """
    done("These are secrets: keep them where only the server can read them, and keep a copy.")
    click.echo("\n".join(f"{name}={value}" for name, value in new_secrets().items()))


@secrets.command()
@as_json
def status(as_json: bool) -> None:
    """Count what is kept under each key of the rings: one that nothing needs any more can be taken out.

    Unless the database is the embedded one, this needs MIGRATION_DATABASE_URL.

    \b
    Example:
      billing secrets status
    """
    with opened_as_owner() as owner:
        tenants = owner.all_tenants()
    needed: Counter[tuple[str, str]] = Counter()
    with opened_store() as (settings, store):
        for tenant in tenants:
            with store.tenant(tenant.id) as tx:
                counts = tx.keyring_uses.counts(utc_now())
            needed.update({(ring, kid): rows for ring, kid, rows in counts})
    show(ring_rows(settings, needed), ("ring", "key", "needed_by", "is"), as_json=as_json)


def ring_rows(settings: Settings, needed: Counter[tuple[str, str]]) -> list[dict[str, object]]:
    """A row for each key of the rings on which stored data depend, and for each that is needed but missing."""
    rings = {
        "ENCRYPTION_KEYS": settings.encryption_keys,
        "KEY_PEPPERS": settings.key_peppers,
        "PASSWORD_PEPPERS": settings.password_peppers,
    }
    held = {(name, kid): "kept" for name, ring in rings.items() for kid, _ in ring}
    held |= {(name, ring.first[0]): "first" for name, ring in rings.items()}
    return [
        {"ring": name, "key": kid, "needed_by": needed[name, kid], "is": held.get((name, kid), "MISSING")}
        for name, kid in sorted(held.keys() | needed.keys())
    ]
