"""`billing tenants`: list tenants, set their tier, disable and enable them."""

from __future__ import annotations

from typing import get_args

import click

from billing import tenants
from billing.cli.console import as_json, done, opened_as_owner, show, slug_argument, transaction_of
from billing.clock import utc_now
from billing.tenants import TenantSummary, Tier

COLUMNS = ("slug", "company_name", "email", "subscription_tier", "is_active", "created_at")


@click.group("tenants")
def tenants_group() -> None:
    """List tenants, set their tier, switch them off and on.

    \b
    Example:
      billing tenants list
    """


@tenants_group.command("list")
@as_json
def list_tenants(as_json: bool) -> None:
    """List every tenant, the oldest first.

    Unless the database is the embedded one, this needs MIGRATION_DATABASE_URL.

    \b
    Example:
      billing tenants list --json
    """
    with opened_as_owner() as store:
        rows = [shape(tenant) for tenant in store.all_tenants()]
    show(rows, COLUMNS, as_json=as_json)


def shape(tenant: TenantSummary) -> dict[str, object]:
    """The members under the names that the API gives them."""
    return {
        "id": tenant.id,
        "slug": tenant.slug,
        "company_name": tenant.company_name,
        "email": tenant.email,
        "subscription_tier": tenant.tier,
        "is_active": tenant.is_active,
        "stripe_connect_status": tenant.stripe_status,
        "created_at": tenant.created_at,
    }


@tenants_group.command("set-tier")
@slug_argument
@click.argument("tier", type=click.Choice(get_args(Tier)))
def set_tier(slug: str, tier: Tier) -> None:
    """Put a tenant into a tier.

    \b
    Example:
      billing tenants set-tier acme pro
    """
    with transaction_of(slug, exclusive=True) as tx:
        tenants.set_tier(tx, tier, now=utc_now())
    done(f"{slug} is in the tier {tier}.")


@tenants_group.command()
@slug_argument
def disable(slug: str) -> None:
    """Switch a tenant off: its users and keys are refused from now on.

    \b
    Example:
      billing tenants disable acme
    """
    with transaction_of(slug, exclusive=True) as tx:
        tenants.set_active(tx, is_active=False, now=utc_now())
    done(f"{slug} is disabled.")


@tenants_group.command()
@slug_argument
def enable(slug: str) -> None:
    """Switch a tenant on again: its users and keys work as before.

    \b
    Example:
      billing tenants enable acme
    """
    with transaction_of(slug, exclusive=True) as tx:
        tenants.set_active(tx, is_active=True, now=utc_now())
    done(f"{slug} is enabled.")
