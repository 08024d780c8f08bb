"""What every command shares: opening the database, reporting errors, and printing tables."""

from __future__ import annotations

import errno
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import orjson

from billing.actors import OPERATOR
from billing.assembly import new_store
from billing.clock import utc_now
from billing.errors import BillingError, DatabaseUnavailable, NotFound
from billing.logs import redact
from billing.settings import Settings, SettingsError
from billing.storage.database import Database, open_database
from billing.storage.embedded import EmbeddedPostgresError
from billing.storage.schema import SchemaError
from billing.storage.store import Store, TenantTx
from billing.tenants import Tenant

# Errors --------------------------------------------------------------------------------------------


class Commands(click.Group):
    """A group whose commands report expected errors in one sentence, with exit code 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Python reads bytes that are not UTF-8 as lone surrogates, which no database or terminal takes.
        if not all(is_text(argument) for argument in args):
            raise click.UsageError("Arguments must be text in UTF-8.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DatabaseUnavailable as error:
            raise click.ClickException(unreachable(error)) from error
        except BillingError as error:
            raise click.ClickException(error.detail) from error
        except (SettingsError, EmbeddedPostgresError, SchemaError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise click.ClickException(f"Cannot write: {error.strerror}.") from error


def is_text(argument: str) -> bool:
    """Whether it can be encoded in UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def unreachable(error: DatabaseUnavailable) -> str:
    """The driver's first line, which names host and port, redacted; the error's title if there is none."""
    reason = str(getattr(error.__cause__, "orig", "")).strip().partition("\n")[0]
    return f"The database cannot be reached: {redact(reason)}." if reason else error.title()


# The process ---------------------------------------------------------------------------------------

# Of a worker each endpoint may have 16 connections, and each attempt in flight has two descriptors of its socket.
DESCRIPTORS = 4096


def allow_descriptors() -> None:
    """Raise our limit of file descriptors to what connections need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# The database --------------------------------------------------------------------------------------


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """The database of the settings, checked to have this version's schema and to be safe to use."""
    with closing(open_database(settings)) as database:
        with _store_on(database, settings, replica_url=database.replica_url):
            pass
        yield database


@contextmanager
def opened_store(*, connections: int = 1) -> Iterator[tuple[Settings, Store]]:
    """The settings and a store on their database; all of it is closed at the end."""
    settings = Settings.load()
    with (
        closing(open_database(settings)) as database,
        _store_on(database, settings, connections=connections) as store,
    ):
        yield settings, store


@contextmanager
def opened_as_owner() -> Iterator[Store]:
    """A store that sees every tenant; raises `SettingsError` if the owner's URL is not known."""
    settings = Settings.load()
    with closing(open_database(settings)) as database, closing(new_store(settings)) as store:
        store.open(database.require_owner_url())
        store.require_ready()
        yield store


@contextmanager
def _store_on(
    database: Database, settings: Settings, *, connections: int = 1, replica_url: str | None = None
) -> Iterator[Store]:
    with closing(new_store(settings, connections=connections)) as store:
        store.open(database.app_url, replica_url=replica_url)
        store.require_ready()
        store.require_safe()
        yield store


@contextmanager
def transaction_of(slug: str, *, exclusive: bool = False) -> Iterator[TenantTx]:
    """A transaction of this tenant, in the operator's name; an exclusive one holds the tenant's lock."""
    with opened_store() as (_, store):
        tenant_id = tenant_called(slug, store).id
        with store.tenant(tenant_id, OPERATOR, exclusive=exclusive) as tx:
            yield tx


def tenant_called(slug: str, store: Store) -> Tenant:
    """Raises `NotFound`."""
    with store.platform() as platform:
        found = platform.find_tenant(slug)
    if found is None:
        raise NotFound("There is no tenant with this slug: `billing tenants list` shows them all.")
    return found


# Arguments -----------------------------------------------------------------------------------------

slug_argument = click.argument("slug")


# No more digits than a timedelta takes.
AGO = re.compile(r"([0-9]{1,5})([mhd])", re.ASCII)
UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}


class Moment(click.ParamType[datetime]):
    """A time as RFC 3339 writes it, or how long ago it was."""

    name = "time"

    def convert(
        self, value: str | datetime, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        if isinstance(value, datetime):
            return value
        if ago := AGO.fullmatch(value):
            return utc_now() - int(ago[1]) * UNITS[ago[2]]
        moment = time_of(value)
        if moment is None:
            self.fail("must be like 2026-01-15T09:30:00Z, or 90m, 2h, 3d for so long ago.", param, ctx)
        return moment


def time_of(text: str) -> datetime | None:
    """The time in UTC; None if the text is not a time with an offset."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


# What is printed -----------------------------------------------------------------------------------

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def show(rows: Sequence[Mapping[str, object]], columns: Sequence[str], *, as_json: bool) -> None:
    """Print rows: some of their members as a table, or all of them as JSON."""
    if as_json:
        say_json(rows)
    else:
        click.echo(table(columns, [[cell(row[column]) for column in columns] for row in rows]))


def say_json(value: object) -> None:
    """Print JSON for a program."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, each as wide as its widest cell."""
    lines = [[column.upper().replace("_", " ") for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cell(value: object) -> str:
    """The value as text without control characters, which a terminal would obey: tenants choose their names."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M}Z"
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value)
    )


def progress(label: str, length: int, *, at_once: int) -> AbstractContextManager[Any]:
    """A progress bar on stderr, if that is a terminal and the work takes more than one chunk."""
    hidden = length <= at_once or not sys.stderr.isatty()
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=hidden)


def done(sentence: str) -> None:
    """Report on stderr what was done: stdout is only for requested output."""
    click.echo(sentence, err=True)
