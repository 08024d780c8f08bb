"""`billing migrate` and `billing secrets`: what an installation needs before it serves."""

from __future__ import annotations

from contextlib import closing

import click

from billing.cli.console import done
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
    """What the database is brought to; raises `SettingsError` where its owner's address is not known."""
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
