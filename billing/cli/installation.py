"""`billing migrate` and `billing secrets`: what an installation needs before it serves."""

from __future__ import annotations

import click

from billing.cli.console import done
from billing.settings import Settings, new_secrets
from billing.storage import database, schema


@click.command()
@click.option(
    "--bootstrap-sql", is_flag=True, help="Print what a DBA runs once: the roles. Needs no settings."
)
def migrate(bootstrap_sql: bool) -> None:
    """Bring the database to this version and print its revision.

    An embedded database is started for it; any other is reached by MIGRATION_DATABASE_URL.

    \b
    Example:
      billing migrate --bootstrap-sql | psql postgres
      billing migrate
    """
    click.echo(schema.bootstrap_sql() if bootstrap_sql else database.migrate(Settings.load()))


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
