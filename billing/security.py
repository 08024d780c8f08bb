"""Credentials → Caller, and roles: authentication, and authorisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from billing import keys, sessions
from billing.actors import Actor
from billing.clock import Clock
from billing.errors import InsufficientScope, KeyUnknown, SessionEnded, TenantDisabled
from billing.key_uses import KeyUses
from billing.keys import ApiKey, KeyDigests
from billing.storage.lookups import Lookups
from billing.storage.store import Store, TenantTx
from billing.tenants import Tenant
from billing.tokens import Tokens
from billing.users import User


@dataclass(frozen=True)
class Caller:
    """The owner of good credentials: a user of a tenant, or one of its API keys."""

    tenant: Tenant
    user: User | None = None
    key: ApiKey | None = None
    session_id: UUID | None = None
    # How far a replica must have replayed to show all that was committed when the request came.
    position: str | None = None

    @property
    def tenant_id(self) -> UUID:
        return self.tenant.id

    @property
    def sees_private_members(self) -> bool:
        """False for a publishable key, which anyone may read in a browser."""
        return self.key is None or not self.key.is_publishable

    def signed_in_user(self) -> User:
        """The user; raises `InsufficientScope` for an API key."""
        if self.user is None:
            raise InsufficientScope
        return self.user

    @contextmanager
    def changing(self, store: Store, actor: Actor) -> Iterator[TenantTx]:
        """A transaction of a user's that changes the tenant, with its lock held.

        Raises unless the user may still act, now that the lock is held; see `sessions.require_standing`.
        """
        if self.user is None or self.session_id is None:
            raise InsufficientScope
        with store.tenant(self.tenant_id, actor, exclusive=True) as tx:
            sessions.require_standing(tx, self.user, self.session_id)
            yield tx

    @property
    def id(self) -> UUID:
        """The id of the key, or of the user."""
        return self.signed_in_user().id if self.key is None else self.key.id

    def actor(self, address: str | None, request_id: str | None) -> Actor:
        """The caller as the audit log keeps them."""
        return Actor("user" if self.key is None else "api_key", self.id, address, request_id)


class Authenticator:
    """Finds the caller behind a credential: one query to the database, none for a malformed one."""

    def __init__(
        self, lookups: Lookups, tokens: Tokens, digests: KeyDigests, uses: KeyUses, clock: Clock
    ) -> None:
        self._lookups = lookups
        self._tokens = tokens
        self._digests = digests
        self._uses = uses
        self._clock = clock

    async def by_bearer(self, credential: str) -> Caller:
        """The caller behind an access token, or an API key sent as one; raises `Unauthenticated`."""
        is_key = keys.looks_like_key(credential)
        return await (self.by_key(credential) if is_key else self.by_token(credential))

    async def by_key(self, text: str) -> Caller:
        """The caller behind an API key; raises `KeyMalformed`, `KeyUnknown`, `KeyRevoked` or `KeyExpired`."""
        keys.parse(text)
        found = await self._lookups.find_key(self._digests.candidates(text))
        if found is None:
            raise KeyUnknown
        tenant, key, position = found
        now = self._clock()
        key.require_works_at(now)
        self._uses.note(key, now)
        return Caller(tenant, key=key, position=position)

    async def by_token(self, text: str) -> Caller:
        """The caller behind an access token; raises `TokenInvalid`, `TokenExpired` or `SessionEnded`."""
        now = self._clock()
        claims = self._tokens.read_access(text, now)
        found = await self._lookups.find_user(claims, now)
        if found is None:
            raise SessionEnded
        tenant, user, position = found
        return Caller(tenant, user=user, session_id=claims.session_id, position=position)


def require_allowed(caller: Caller, *, roles: Sequence[str], keys_allowed: bool) -> None:
    """Raises `TenantDisabled`, or `InsufficientScope` unless the document allows such a caller."""
    if not caller.tenant.is_active:
        raise TenantDisabled
    allowed = keys_allowed if caller.user is None else caller.user.role in roles
    if not allowed:
        raise InsufficientScope(f"This operation takes a user with the role {' or '.join(roles)}.")
