"""`billing audit`: what was done in a tenant's name, and whether its log is still complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import get_args
from uuid import UUID

import click

from billing.actors import Kind
from billing.audit import Broken, Chain, Choice, Head, Row
from billing.cli.console import (
    Moment,
    cell,
    opened_as_owner,
    opened_store,
    progress,
    slug_argument,
    table,
    tenant_called,
    transaction_of,
)
from billing.storage.store import Store, TenantTx
from billing.users import get

COLUMNS = ("row", "at", "action", "actor", "subject", "reason", "address", "request_id")
# How many rows are read in one transaction, and held in memory.
CHUNK = 2000


class HeadType(click.ParamType[Head]):
    """A head as `billing audit verify` prints it."""

    name = "sequence:hash"

    def convert(self, value: str | Head, param: click.Parameter | None, ctx: click.Context | None) -> Head:
        head = value if isinstance(value, Head) else Head.parse(value)
        if head is None:
            self.fail(
                "must be as `billing audit verify` prints it: a number, a colon, 64 digits.", param, ctx
            )
        return head


@click.group()
def audit() -> None:
    """Show what was done in a tenant's name, export it, and verify that nothing of it is gone.

    \b
    Example:
      billing audit list acme
    """


# What there is -------------------------------------------------------------------------------------


@audit.command("list")
@slug_argument
@click.option("--action", help="This action alone, such as api_key.revoked.")
@click.option("--actor", help="A user's email, the id of a user or key, or a kind, such as operator.")
@click.option("--since", type=Moment(), help="Since then, such as 2026-01-15T09:30:00Z, 2h or 3d.")
@click.option("--until", type=Moment(), help="Before then.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each, for programs.")
def list_rows(
    slug: str,
    action: str | None,
    actor: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show the last rows of a tenant's audit log, the newest first.

    \b
    Example:
      billing audit list acme --action user.login_failed --since 24h
    """
    with transaction_of(slug) as tx:
        choice = Choice(action, None if actor is None else actor_called(tx, actor), since, until)
        rows = tx.audit.recent(choice, most=limit)
    if as_json:
        print_lines(rows)
    else:
        click.echo(table(COLUMNS, [[cell(value) for value in shown(row)] for row in rows]))


def actor_called(tx: TenantTx, name: str) -> str | UUID:
    """The kind of that name, the id, or the id of the user with that email; raises `NotFound`."""
    if name in get_args(Kind):
        return name
    try:
        return UUID(name)
    except ValueError:
        return get(tx, name).id


def shown(row: Row) -> tuple[object, ...]:
    """The cells of a row in the table, in the order of `COLUMNS`."""
    actor = f"{row.actor_kind} {row.actor_id or ''}".rstrip()
    cells = (row.sequence, row.at, row.action, actor, row.subject, row.reason)
    return (*cells, row.address, row.request_id)


@audit.command()
@slug_argument
@click.option(
    "--after", type=click.IntRange(0), default=0, help="Begin behind this row, to go on from there."
)
def export(slug: str, after: int) -> None:
    """Print a tenant's whole audit log, a line of JSON for each row, the oldest first.

    \b
    Example:
      billing audit export acme > acme.ndjson
      billing audit export acme --after 1042 >> acme.ndjson
    """
    with opened_store() as (_, store):
        for chunk in chunks(store, tenant_called(slug, store).id, after=after):
            print_lines(chunk)


def chunks(
    store: Store, tenant_id: UUID, *, after: int | None = None, upto: int | None = None
) -> Iterator[list[Row]]:
    """The rows in chunks, each read in a transaction of its own."""
    while True:
        with store.tenant(tenant_id) as tx:
            rows = tx.audit.after(after, upto=upto, most=CHUNK)
        if not rows:
            return
        yield rows
        after = rows[-1].sequence


def print_lines(rows: Iterable[Row]) -> None:
    click.echo(b"".join(row.line() for row in rows), nl=False)


# Whether it is whole -------------------------------------------------------------------------------


@audit.command()
@click.argument("slug", required=False)
@click.option("--all", "every", is_flag=True, help="Every tenant's. Needs MIGRATION_DATABASE_URL.")
@click.option("--expect", type=HeadType(), help="A head that was noted: the log must still go through it.")
def verify(slug: str | None, every: bool, expect: Head | None) -> None:
    """Recompute every hash of a tenant's audit log, and print its head: note that somewhere else.

    Names the first row that was changed, removed, moved or inserted, and ends with 1.

    \b
    Example:
      billing audit verify acme
      billing audit verify --all
    """
    if (slug is None) != every or (every and expect is not None):
        raise click.UsageError("Say whose log: SLUG, perhaps with --expect, or --all.")
    broken = 0
    with opened_store() as (_, store):
        logs = every_tenant() if slug is None else [(slug, tenant_called(slug, store).id)]
        if not logs:
            click.echo("There are no tenants.")
        for name, tenant_id in logs:
            try:
                click.echo(f"{cell(name)}: whole, {verified(store, name, tenant_id, expect)}")
            except Broken as finding:
                click.echo(f"{cell(name)}: broken. {finding}")
                broken += 1
    if broken:
        raise click.ClickException("An audit log is broken." if broken == 1 else f"{broken} logs are broken.")


def every_tenant() -> list[tuple[str, UUID]]:
    with opened_as_owner() as store:
        return [(tenant.slug, tenant.id) for tenant in store.all_tenants()]


def verified(store: Store, name: str, tenant_id: UUID, noted: Head | None) -> Head:
    """Verify a log up to its head at the beginning, and return that head; raises `Broken`."""
    with store.tenant(tenant_id) as tx:
        head = tx.audit.head()
    if head is None:
        raise Broken("Its head is missing.")
    chain = Chain([head, noted] if noted else [head])
    with progress(cell(name), head.sequence, at_once=CHUNK) as bar:
        for rows in chunks(store, tenant_id, upto=head.sequence):
            for row in rows:
                chain.add(row)
            bar.update(len(rows))
    chain.finish()
    with store.tenant(tenant_id) as tx:
        if beyond := tx.audit.beyond_head():
            raise Broken(f"Row {beyond} was inserted: the head stands before it.")
    return head
