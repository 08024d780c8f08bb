"""Idempotency keys: who is answering a request, or what was answered."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute(TABLE)
    op.execute("ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY")
    # The sub-select makes it one call a query; a bare call is one a row.
    op.execute(
        "CREATE POLICY tenant ON idempotency_keys TO billing_app "
        "USING (tenant_id = (SELECT app.current_tenant())) "
        "WITH CHECK (tenant_id = (SELECT app.current_tenant()))"
    )
    op.execute(FORGET)
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_keys TO billing_app")


# No foreign key to tenants: whoever registers has none yet, and their rows belong to their address.
TABLE = """
CREATE TABLE idempotency_keys (
    tenant_id uuid NOT NULL,
    name bytea NOT NULL,
    claim uuid NOT NULL,
    request text NOT NULL,
    answer text,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, name)
);
CREATE INDEX idempotency_keys_by_end ON idempotency_keys (expires_at);
"""

# The rows of addresses are no tenant's, who could tidy them. It tells nothing but how many there were.
FORGET = """
CREATE FUNCTION app.forget_answers(at timestamptz, most integer) RETURNS bigint
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        WITH over AS MATERIALIZED (
            SELECT d.tenant_id, d.name FROM public.idempotency_keys d WHERE d.expires_at <= at
            ORDER BY d.expires_at LIMIT most FOR UPDATE SKIP LOCKED
        ), forgotten AS (
            DELETE FROM public.idempotency_keys k USING over
            WHERE k.tenant_id = over.tenant_id AND k.name = over.name RETURNING 1
        )
        SELECT count(*) FROM forgotten
    $$;

REVOKE ALL ON FUNCTION app.forget_answers FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.forget_answers TO billing_app;
GRANT CREATE ON SCHEMA app TO billing_lookup;
ALTER FUNCTION app.forget_answers OWNER TO billing_lookup;
REVOKE CREATE ON SCHEMA app FROM billing_lookup;
GRANT SELECT (tenant_id, name, expires_at), UPDATE (expires_at), DELETE ON idempotency_keys TO billing_lookup;
CREATE POLICY forget ON idempotency_keys TO billing_lookup USING (true) WITH CHECK (false);
"""
