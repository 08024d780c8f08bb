"""The command line: `billing serve`, and the operator's commands."""

from __future__ import annotations

import click

from billing.cli.audit import audit
from billing.cli.check import check
from billing.cli.console import Commands
from billing.cli.installation import migrate, secrets
from billing.cli.serve import serve
from billing.cli.tenants import tenants_group
from billing.cli.users import users_group
from billing.cli.webhooks import webhooks
from billing.cli.worker import worker


@click.group("billing", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="billing-control-plane", prog_name="billing")
def main() -> None:
    """The billing platform: its server, and what its operator does.

    Settings come from the environment and from `.env` in the current directory.

    \b
    Example:
      billing serve
    """


for command in (serve, worker, migrate, tenants_group, users_group, webhooks, audit, secrets, check):
    main.add_command(command)
