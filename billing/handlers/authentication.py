"""Authentication: register, log in, refresh tokens, change a password, and identify the caller."""

from __future__ import annotations

from functools import partial

from billing import sessions, tenants
from billing.actors import Actor
from billing.clock import Clock
from billing.errors import settled
from billing.failed_logins import FailedLogins
from billing.handlers import shapes
from billing.http.idempotency import Once
from billing.http.lanes import Lane, runs_in
from billing.http.replies import Reply, created, ok
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.passwords import Passwords, require_strength
from billing.security import Caller
from billing.storage.store import Store
from billing.tenants import own_words
from billing.tokens import Tokens
from billing.users import normalise_email
from billing.webhooks.endpoints import UrlPolicy


@runs_in(Lane.PASSWORDS)
def register_tenant(
    body: dict[str, str],
    *,
    actor: Actor,
    store: Store,
    clock: Clock,
    passwords: Passwords,
    tokens: Tokens,
    digests: KeyDigests,
    url_policy: UrlPolicy,
    once: Once,
) -> Reply:
    url_policy.check_optional(body.get("webhook_url"))
    require_strength(body["password"], own_words(body))
    password_hash = passwords.hash(body["password"])
    with store.tenant(new_id(), actor) as tx:
        now = clock()
        made = tenants.register(tx, body, password_hash=password_hash, digests=digests, now=now)
        pair = sessions.start(tx, made.owner, tokens=tokens, now=now)
        reply = created(
            {
                "message": "Registered. Store the secret keys and the webhook secret: they are not shown again.",
                "tenant": shapes.registered_tenant(made),
                "user": shapes.user(made.owner, made.tenant),
                "tokens": shapes.tokens(pair),
            }
        )
        return once.keep(tx, reply)


@runs_in(Lane.PASSWORDS)
def log_in(
    body: dict[str, str],
    *,
    actor: Actor,
    store: Store,
    clock: Clock,
    passwords: Passwords,
    tokens: Tokens,
    failed_logins: FailedLogins,
) -> Reply:
    with store.platform() as platform:
        found = platform.find_account(normalise_email(body["email"]))
    failed = partial(failed_logins.note, "user.login_failed", actor)
    account = sessions.authenticate(found, body["password"], passwords, failed)
    renewed = passwords.renewed(body["password"], account.password_hash)
    with store.tenant(account.tenant.id, actor) as tx:
        user, pair = sessions.log_in(tx, account, renewed_hash=renewed, tokens=tokens, now=clock())
        return ok(
            {
                "message": "Logged in.",
                "user": shapes.user(user, account.tenant),
                "tenant": shapes.tenant(account.tenant),
                "tokens": shapes.tokens(pair),
            }
        )


def refresh_tokens(
    body: dict[str, str], *, actor: Actor, store: Store, clock: Clock, tokens: Tokens
) -> Reply:
    now = clock()
    claims = tokens.read_refresh(body["refresh"], now)
    with store.tenant(claims.tenant_id, actor) as tx:
        outcome = sessions.refresh(tx, claims, tokens=tokens, now=now)
    return ok(shapes.tokens(settled(outcome)))


def get_current_user(*, caller: Caller) -> Reply:
    user = caller.signed_in_user()
    return ok({"user": shapes.user(user, caller.tenant), "tenant": shapes.tenant(caller.tenant)})


@runs_in(Lane.PASSWORDS)
def change_password(
    body: dict[str, str],
    *,
    caller: Caller,
    actor: Actor,
    store: Store,
    clock: Clock,
    passwords: Passwords,
    tokens: Tokens,
    once: Once,
    failed_logins: FailedLogins,
) -> Reply:
    user = caller.signed_in_user()
    with store.tenant(caller.tenant_id, actor) as tx:
        stored = tx.users.password_hash(user.id)
    failed = partial(failed_logins.note, "user.password_change_failed", actor)
    sessions.require_password(user, body["old_password"], stored, passwords, failed)
    require_strength(body["new_password"], tenants.words_of(user, caller.tenant))
    password_hash = passwords.hash(body["new_password"])
    with store.tenant(caller.tenant_id, actor) as tx:
        pair = sessions.change_password(tx, user, password_hash, tokens=tokens, now=clock())
        message = "Password changed. Every other session has ended."
        return once.keep(tx, ok({"message": message, "tokens": shapes.tokens(pair)}))


def verify_api_key(*, caller: Caller) -> Reply:
    answer = {"valid": True, "tenant": shapes.tenant_for(caller)}
    if caller.key is not None:
        answer |= {"mode": caller.key.mode, "key": shapes.verified_key(caller.key)}
    return ok(answer)


def get_tenant_details(*, caller: Caller) -> Reply:
    answer = {"tenant": shapes.tenant_for(caller)}
    return ok(answer | {"mode": caller.key.mode} if caller.key else answer)
