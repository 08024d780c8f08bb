"""The questions asked before a tenant is known: whose key, whose login, whose session is this?

Each is one message of two statements, and so one transaction: the first finds the tenant (by an exact
name, through the one function that may look across tenants) and puts it into the transaction's setting;
the second reads under that tenant's row security.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row

from billing.keys import ApiKey
from billing.storage import api_keys, tenants, users
from billing.tenants import Account, Tenant
from billing.tokens import Claims
from billing.users import User


def _names(columns: Sequence[Any]) -> str:
    return ", ".join(str(column) for column in columns)


TENANT = _names(tenants.COLUMNS)
USER = _names(users.COLUMNS)
KEY = _names(api_keys.COLUMNS)
TENANT_ENDS = len(tenants.COLUMNS)

AS_WHOEVER_HAS = (
    "SELECT set_config('app.tenant_id', tenant_id::text, true) FROM app.find(%(kind)s, %(names)s); "
)
AS_TENANT = "SELECT set_config('app.tenant_id', %(tenant_id)s, true); "
FROM_TENANT = "FROM tenants LEFT JOIN webhook_endpoints ON webhook_endpoints.tenant_id = tenants.id "

FIND_KEY = (
    f"{AS_WHOEVER_HAS} SELECT {TENANT}, {KEY} {FROM_TENANT} "
    "JOIN api_keys ON api_keys.tenant_id = tenants.id WHERE api_keys.digest = ANY (%(names)s)"
)
FIND_ACCOUNT = (
    f"{AS_WHOEVER_HAS} SELECT {TENANT}, {USER}, users.password_hash {FROM_TENANT} "
    "JOIN users ON users.tenant_id = tenants.id WHERE users.id = "
    "(SELECT id FROM app.find(%(kind)s, %(names)s))"
)
FIND_USER = (
    f"{AS_TENANT} SELECT {TENANT}, {USER} {FROM_TENANT} "
    "JOIN users ON users.tenant_id = tenants.id "
    "JOIN sessions ON sessions.tenant_id = users.tenant_id AND sessions.user_id = users.id "
    "WHERE tenants.id = %(tenant_id)s AND users.id = %(user_id)s AND users.token_version = %(token_version)s "
    "AND users.is_active AND sessions.id = %(session_id)s AND sessions.ended_at IS NULL "
    "AND sessions.expires_at > %(now)s"
)
FIND_STATE = "SELECT tenant_id, id FROM app.find('connect_state', %(names)s)"
FIND_TENANT = f"{AS_WHOEVER_HAS} SELECT {TENANT} {FROM_TENANT} WHERE tenants.slug = ANY (%(names)s)"


class Platform:
    """Exact questions across tenants: each has one answer or none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def find_key(self, digests: Sequence[str]) -> tuple[Tenant, ApiKey] | None:
        """The key stored under one of these digests, and whose it is."""
        row = self._one(FIND_KEY, kind="api_key", names=list(digests))
        return (tenants.tenant_of(row[:TENANT_ENDS]), api_keys.key_of(row[TENANT_ENDS:])) if row else None

    def find_account(self, email: str) -> Account | None:
        """The account that logs in with this email, which is in its normal form."""
        row = self._one(FIND_ACCOUNT, kind="email", names=[email])
        if row is None:
            return None
        return Account(tenants.tenant_of(row[:TENANT_ENDS]), users.user_of(row[TENANT_ENDS:-1]), row[-1])

    def find_user(self, claims: Claims, now: datetime) -> tuple[Tenant, User] | None:
        """The user whom an access token names, while user, version and session hold."""
        row = self._one(
            FIND_USER,
            tenant_id=str(claims.tenant_id),
            user_id=str(claims.user_id),
            session_id=str(claims.session_id),
            token_version=claims.token_version,
            now=now,
        )
        return (tenants.tenant_of(row[:TENANT_ENDS]), users.user_of(row[TENANT_ENDS:])) if row else None

    def find_connect_state(self, digest: str) -> tuple[UUID, UUID] | None:
        """The tenant and the id of the connect state with this digest."""
        row = self._one(FIND_STATE, names=[digest])
        return (row.tenant_id, row.id) if row else None

    def find_tenant(self, slug: str) -> Tenant | None:
        """The tenant with this slug."""
        row = self._one(FIND_TENANT, kind="slug", names=[slug])
        return tenants.tenant_of(row) if row else None

    def _one(self, query: str, **parameters: object) -> Row[Any] | None:
        return self._connection.exec_driver_sql(query, parameters).one_or_none()
