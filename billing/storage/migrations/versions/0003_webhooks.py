"""Webhook endpoints with their health, and a delivery for each event that somebody listens to."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute(TABLES)
    op.execute("ALTER TABLE deliveries ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE deliveries FORCE ROW LEVEL SECURITY")
    # The sub-select makes it one call a query; a bare call is one a row.
    op.execute(
        "CREATE POLICY tenant ON deliveries TO billing_app "
        "USING (tenant_id = (SELECT app.current_tenant())) "
        "WITH CHECK (tenant_id = (SELECT app.current_tenant()))"
    )
    op.execute(HOUSEKEEPING)
    op.execute(GRANTS)


TABLES = """
ALTER TABLE webhook_endpoints
    ADD COLUMN event_types text[] NOT NULL DEFAULT '{}',
    ADD COLUMN disabled_reason text,
    ADD COLUMN failing_since timestamptz,
    ADD COLUMN failed_events integer NOT NULL DEFAULT 0;

CREATE TABLE deliveries (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    event_id uuid NOT NULL,
    event_type text NOT NULL,
    status text NOT NULL CONSTRAINT deliveries_status CHECK (status IN ('pending', 'delivered', 'failed')),
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    http_status integer,
    error text,
    duration_ms integer,
    created_at timestamptz NOT NULL,
    settled_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, event_id) REFERENCES events,
    CONSTRAINT deliveries_due_while_pending CHECK ((status = 'pending') = (next_attempt_at IS NOT NULL))
);
CREATE INDEX deliveries_due ON deliveries (tenant_id, next_attempt_at) WHERE status = 'pending';
CREATE INDEX deliveries_settled ON deliveries (tenant_id, settled_at) WHERE status <> 'pending';
CREATE INDEX deliveries_of_event ON deliveries (tenant_id, event_id);
"""

# Each tenant's rows are tidied once a day. As their owner we may write none of the tasks unless the force is lifted.
HOUSEKEEPING = """
ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY;
INSERT INTO tasks (tenant_id, kind, id, subject, queue, created_at, due_at)
    SELECT id, 'housekeeping', id, id::text, 'general', now(), now() + random() * interval '1 day' FROM tenants;
ALTER TABLE tasks FORCE ROW LEVEL SECURITY;
"""

GRANTS = """
GRANT SELECT, INSERT, UPDATE, DELETE ON deliveries TO billing_app;
GRANT DELETE ON events, sessions, webhook_secrets TO billing_app;
"""
