"""The queries made before the tenant is known: whose email, connect state or slug is this?

Each is one message, and so one transaction. A first statement finds the tenant (by an exact name, through
the one function that may look across tenants) and puts it into the transaction's setting; a second reads
under that tenant's row security. For a connect state the function's answer is enough.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row

from billing.storage import tenants, users
from billing.storage.shelf import listed
from billing.tenants import Account, Tenant
from billing.users import User

TENANT = listed(tenants.COLUMNS)
USER = listed(users.COLUMNS)
TENANT_ENDS = len(tenants.COLUMNS)

AS_WHOEVER_HAS = (
    "SELECT set_config('app.tenant_id', tenant_id::text, true) FROM app.find(%(kind)s, %(names)s); "
)
FROM_TENANT = "FROM tenants LEFT JOIN webhook_endpoints ON webhook_endpoints.tenant_id = tenants.id "

FIND_ACCOUNT = (
    f"{AS_WHOEVER_HAS} SELECT {TENANT}, {USER}, users.password_hash {FROM_TENANT} "
    "JOIN users ON users.tenant_id = tenants.id WHERE users.id = "
    "(SELECT id FROM app.find(%(kind)s, %(names)s))"
)
FIND_STATE = "SELECT tenant_id, id FROM app.find('connect_state', %(names)s)"
FIND_TENANT = f"{AS_WHOEVER_HAS} SELECT {TENANT} {FROM_TENANT} WHERE tenants.slug = ANY (%(names)s)"


class Platform:
    """Exact look-ups across tenants: each finds one row or none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def find_account(self, email: str) -> Account | None:
        """The account that logs in with this email, which is in its normal form."""
        row = self._one(FIND_ACCOUNT, kind="email", names=[email])
        if row is None:
            return None
        return Account(Tenant(*row[:TENANT_ENDS]), User(*row[TENANT_ENDS:-1]), row[-1])

    def find_connect_state(self, digest: str) -> tuple[UUID, UUID] | None:
        """The tenant and the id of the connect state with this digest."""
        row = self._one(FIND_STATE, names=[digest])
        return (row.tenant_id, row.id) if row else None

    def find_tenant(self, slug: str) -> Tenant | None:
        """The tenant with this slug."""
        row = self._one(FIND_TENANT, kind="slug", names=[slug])
        return Tenant(*row) if row else None

    def _one(self, query: str, **parameters: object) -> Row[*tuple[Any, ...]] | None:
        return self._connection.exec_driver_sql(query, parameters).one_or_none()
