"""The shelf of the tenant itself."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select, update

from billing.errors import NotFound
from billing.storage.shelf import Shelf, columns_of, of_tenant, values_of
from billing.storage.tables import tenants, webhook_endpoints
from billing.tenants import Tenant, TenantSummary

COLUMNS = columns_of(Tenant, tenants, webhook_url=webhook_endpoints.c.url)
WITH_ENDPOINT = tenants.outerjoin(webhook_endpoints, webhook_endpoints.c.tenant_id == tenants.c.id)
GET = select(*COLUMNS).select_from(WITH_ENDPOINT).where(of_tenant(tenants))
UPDATE = update(tenants).where(of_tenant(tenants))
FIND_ALL = select(*columns_of(TenantSummary, tenants)).order_by(tenants.c.id)


class Tenants(Shelf):
    """The one tenant whose transaction this is."""

    def get(self) -> Tenant:
        """Raises `NotFound`."""
        row = self.run(GET).one_or_none()
        if row is None:
            raise NotFound
        return Tenant(*row)

    def add(self, tenant: Tenant) -> None:
        self.insert(tenants, values_of(tenant, tenants))

    def set_tier(self, tier: str, now: datetime) -> None:
        self._update(tier=tier, updated_at=now)

    def set_active(self, is_active: bool, now: datetime) -> None:
        self._update(is_active=is_active, updated_at=now)

    def touch(self, now: datetime) -> None:
        """Set `updated_at`: something shown with the tenant, but stored in another table, has changed."""
        self._update(updated_at=now)

    def set_stripe(self, account_id: str | None, status: str, now: datetime) -> None:
        self._update(stripe_account_id=account_id, stripe_status=status, updated_at=now)

    def _update(self, **values: object) -> None:
        self.defer(UPDATE, **values)


def all_tenants(connection: Connection) -> list[TenantSummary]:
    """Every tenant, the oldest first. Row security lets only the owner of the tables see more than one."""
    return [TenantSummary(*row) for row in connection.execute(FIND_ALL)]
