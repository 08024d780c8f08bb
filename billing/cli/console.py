"""What every command shares: the database it works on, how it says what went wrong, and its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import click

from billing.encryption import Vault
from billing.errors import BillingError, DatabaseUnavailable
from billing.http.logs import redact
from billing.settings import Settings, SettingsError
from billing.storage.database import Database, open_database
from billing.storage.embedded import EmbeddedPostgresError
from billing.storage.schema import SchemaError
from billing.storage.store import Store

# Errors --------------------------------------------------------------------------------------------


class Commands(click.Group):
    """A group whose commands end with one sentence, and exit code 1, for whatever can be expected."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DatabaseUnavailable as error:
            raise click.ClickException(unreachable(error)) from error
        except BillingError as error:
            raise click.ClickException(error.detail) from error
        except (SettingsError, EmbeddedPostgresError, SchemaError) as error:
            raise click.ClickException(str(error)) from error


def unreachable(error: DatabaseUnavailable) -> str:
    """The title and the driver's first line, which names host and port and reads better than ours would."""
    reason = str(getattr(error.__cause__, "orig", "")).strip().partition("\n")[0]
    return f"The database cannot be reached: {redact(reason)}." if reason else error.title()


# The database --------------------------------------------------------------------------------------


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """The database of the settings, found to be of this version and safe to work with."""
    with closing(open_database(settings)) as database:
        with _store_on(database, settings):
            pass
        yield database


@contextmanager
def opened_store() -> Iterator[tuple[Settings, Store]]:
    """The settings and a store on their database; all of it is closed at the end."""
    settings = Settings.load()
    with closing(open_database(settings)) as database, _store_on(database, settings) as store:
        yield settings, store


@contextmanager
def _store_on(database: Database, settings: Settings) -> Iterator[Store]:
    with closing(Store(Vault(settings.encryption_keys), connections=1)) as store:
        store.open(database.app_url)
        store.require_ready()
        store.require_safe()
        yield store
