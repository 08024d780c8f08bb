"""`billing users`: the users of a tenant, whom the API does not manage."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from typing import Any, get_args

import click

from billing import users
from billing.actors import OPERATOR
from billing.assembly import passwords_for
from billing.cli.console import as_json, done, opened_store, show, tenant_called, transaction_of
from billing.clock import utc_now
from billing.errors import InvalidRequest, MalformedBody
from billing.handlers import shapes
from billing.http import document
from billing.http.validation import Rules, as_json_schema
from billing.passwords import require_strength
from billing.tenants import Tenant, words_of
from billing.users import Role

# 120 random bits.
GENERATED_PASSWORD_BYTES = 15

Command = Callable[..., Any]

tenant_option = click.option("--tenant", "slug", required=True, metavar="SLUG", help="The tenant.")
email_argument = click.argument("email")
role_choice = click.Choice(get_args(Role))


@click.group("users")
def users_group() -> None:
    """Add and list the users of a tenant, change their role, lock them out.

    \b
    Example:
      billing users list --tenant acme
    """


# A password ----------------------------------------------------------------------------------------


def with_password(command: Command) -> Command:
    """Add the options that choose where the password comes from."""
    generate = click.option(
        "--generate-password", "generate", is_flag=True, help="Make a password and print it, this once."
    )
    stdin = click.option(
        "--password-stdin", "stdin", is_flag=True, help="Read it from standard input, one line."
    )
    return generate(stdin(command))


def new_password(*, stdin: bool, generate: bool) -> str:
    """Return a password: generated, read from stdin, or prompted for twice without echo."""
    if stdin and generate:
        raise click.UsageError("--password-stdin and --generate-password exclude each other.")
    if generate:
        return secrets.token_urlsafe(GENERATED_PASSWORD_BYTES)
    if stdin:
        return sys.stdin.buffer.readline().decode(errors="surrogateescape").rstrip("\r\n")
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask at: use --password-stdin or --generate-password.")
    password: str = click.prompt("Password", hide_input=True, confirmation_prompt="Again", err=True)
    return password


def require_valid(tenant: Tenant, details: dict[str, str]) -> None:
    """Validate the details by the document, as if they came with a registration; raises `InvalidRequest`."""
    contract = document.load()
    register = next(o for o in document.operations(contract) if o.operation_id == "register_tenant")
    # The json module escapes what was not UTF-8, and the rules then refuse it.
    body = json.dumps({"company_name": tenant.company_name, **details}).encode()
    try:
        Rules(as_json_schema(contract["components"]), register).body(body)
    except MalformedBody:
        raise InvalidRequest("Email, names and password must be text in UTF-8, without NUL.") from None
    except InvalidRequest as error:
        names = sorted({fault.pointer.strip("/").replace("_", " ") for fault in error.faults})
        raise InvalidRequest(
            f"The API would refuse this {', '.join(names)}: see RegisterRequest in its document."
        ) from None


# Commands ------------------------------------------------------------------------------------------


@users_group.command("list")
@tenant_option
@as_json
def list_users(slug: str, as_json: bool) -> None:
    """List the users of a tenant, the oldest first.

    \b
    Example:
      billing users list --tenant acme
    """
    with transaction_of(slug) as tx:
        tenant = tx.tenants.get()
        rows = [shapes.user(user, tenant) for user in tx.users.all()]
    columns = ("email", "first_name", "last_name", "role", "is_active", "last_login", "created_at")
    show(rows, columns, as_json=as_json)


@users_group.command()
@tenant_option
@click.option("--email", required=True, help="What they log in with.")
@click.option("--role", required=True, type=role_choice)
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@with_password
def add(
    slug: str, email: str, role: Role, first_name: str, last_name: str, stdin: bool, generate: bool
) -> None:
    """Add a user to a tenant. Asks for the password unless an option says where it comes from.

    \b
    Example:
      billing users add --tenant acme --email bob@acme.example --role developer
    """
    with opened_store() as (settings, store):
        tenant = tenant_called(slug, store)
        password = new_password(stdin=stdin, generate=generate)
        details = {"email": email, "first_name": first_name, "last_name": last_name}
        user = users.new_user(tenant.id, details, role=role, now=utc_now())
        require_strength(password, words_of(user, tenant))
        require_valid(tenant, {**details, "password": password})
        password_hash = passwords_for(settings).hash(password)
        with store.tenant(tenant.id, OPERATOR) as tx:
            users.add(tx, user, password_hash=password_hash, now=utc_now())
    done(f"{user.email} is a user of {slug}, in the role {role}.")
    if generate:
        click.echo(password)


@users_group.command("reset-password")
@tenant_option
@email_argument
@with_password
def reset_password(slug: str, email: str, stdin: bool, generate: bool) -> None:
    """Give a user a new password and end their sessions. Asks for it unless an option says otherwise.

    \b
    Example:
      billing users reset-password --tenant acme bob@acme.example --generate-password
    """
    with opened_store() as (settings, store):
        tenant = tenant_called(slug, store)
        with store.tenant(tenant.id, OPERATOR) as tx:
            user = users.get(tx, email)
        password = new_password(stdin=stdin, generate=generate)
        require_strength(password, words_of(user, tenant))
        require_valid(tenant, {"email": user.email, "password": password})
        password_hash = passwords_for(settings).hash(password)
        with store.tenant(tenant.id, OPERATOR) as tx:
            users.reset_password(tx, user, password_hash, now=utc_now())
    done(f"{user.email} has a new password, and every session has ended.")
    if generate:
        click.echo(password)


@users_group.command("set-role")
@tenant_option
@email_argument
@click.argument("role", type=role_choice)
def set_role(slug: str, email: str, role: Role) -> None:
    """Give a user another role, from their next request on. A tenant keeps an active owner.

    \b
    Example:
      billing users set-role --tenant acme bob@acme.example admin
    """
    with transaction_of(slug, exclusive=True) as tx:
        users.set_role(tx, email, role, now=utc_now())
    done(f"{email} is in the role {role}.")


@users_group.command()
@tenant_option
@email_argument
def disable(slug: str, email: str) -> None:
    """Lock a user out and end their sessions. A tenant keeps an active owner.

    \b
    Example:
      billing users disable --tenant acme bob@acme.example
    """
    with transaction_of(slug, exclusive=True) as tx:
        users.disable(tx, email, now=utc_now())
    done(f"{email} is disabled, and every session has ended.")


@users_group.command()
@tenant_option
@email_argument
def enable(slug: str, email: str) -> None:
    """Let a disabled user log in again.

    \b
    Example:
      billing users enable --tenant acme bob@acme.example
    """
    with transaction_of(slug) as tx:
        users.enable(tx, email, now=utc_now())
    done(f"{email} is enabled.")
