"""The look-ups that authenticate requests, by API key and by access token, made from the event loop itself.

A thread and a pooled connection for each would cost more than the query. These have a few connections of their own, in
psycopg2's asynchronous mode, with statements prepared once per connection. All other queries go through the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from billing.keys import ApiKey
from billing.storage.async_pool import CONNECTIONS, AsyncPool
from billing.storage.platform import TENANT_ENDS
from billing.storage.questions import FIND_KEY, FIND_USER
from billing.tenants import Tenant
from billing.tokens import Claims
from billing.users import User


class Lookups:
    """Exact look-ups of one row or none. Every failure to reach the database is `DatabaseUnavailable`."""

    def __init__(self, connections: int = CONNECTIONS) -> None:
        self._pool = AsyncPool(connections)
        self._positioned = False

    def open(self, url: str, *, positioned: bool = False) -> None:
        """Set the database URL; connections are opened on demand, on this event loop.

        With `positioned` each answer includes the position of the database's log, for `Store.read`.
        """
        self._positioned = positioned
        self._pool.open(url)

    async def find_key(self, digests: Sequence[str]) -> tuple[Tenant, ApiKey, str | None] | None:
        """The tenant and the key stored under one of these digests, and the position."""
        # A digest is `pepper id:hex`, with no comma in it.
        row = await self._pool.ask(FIND_KEY, {"names": ",".join(digests), "positioned": self._positioned})
        if row is None:
            return None
        return Tenant(*row[:TENANT_ENDS]), ApiKey(*row[TENANT_ENDS:-1]), row[-1]

    async def find_user(self, claims: Claims, now: datetime) -> tuple[Tenant, User, str | None] | None:
        """The tenant and the user of an access token, if user, version and session are valid, and the position."""
        parameters = {
            "tenant_id": str(claims.tenant_id),
            "user_id": str(claims.user_id),
            "session_id": str(claims.session_id),
            "token_version": claims.token_version,
            "now": now.isoformat(),
            "positioned": self._positioned,
        }
        row = await self._pool.ask(FIND_USER, parameters)
        if row is None:
            return None
        return Tenant(*row[:TENANT_ENDS]), User(*row[TENANT_ENDS:-1]), row[-1]

    def close(self) -> None:
        """Close every connection; callers waiting for one get `DatabaseUnavailable`."""
        self._pool.close()
