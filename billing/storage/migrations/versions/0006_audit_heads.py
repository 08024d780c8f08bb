"""The ends of audit logs, which the server can no longer move but forwards; which servers this schema serves."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute(HEADS)
    op.execute(GRANTS)
    op.execute(SERVES)


# Nothing but a row that is in the log, the next one, becomes the head; and nobody else may write a head.
HEADS = """
CREATE FUNCTION app.lock_audit_head() RETURNS TABLE (sequence bigint, hash bytea)
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        INSERT INTO public.audit_heads (tenant_id, sequence, hash)
            VALUES (app.current_tenant(), 0, decode(repeat('00', 32), 'hex'))
            ON CONFLICT (tenant_id) DO NOTHING;
        SELECT h.sequence, h.hash FROM public.audit_heads h WHERE h.tenant_id = app.current_tenant() FOR UPDATE
    $$;

CREATE FUNCTION app.advance_audit_head() RETURNS bigint
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        -- A sum is not leakproof: but for the sub-select row security would have it read the tenant's whole log.
        UPDATE public.audit_heads h SET sequence = l.sequence, hash = l.hash FROM public.audit_log l
        WHERE h.tenant_id = app.current_tenant() AND l.tenant_id = h.tenant_id
            AND l.sequence = (SELECT n.sequence + 1 FROM public.audit_heads n WHERE n.tenant_id = app.current_tenant())
        RETURNING h.sequence
    $$;
"""

# Who revokes what a running server uses ends it. Releases before this one run on no schema but their own anyway.
GRANTS = """
REVOKE ALL ON FUNCTION app.lock_audit_head, app.advance_audit_head FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.lock_audit_head, app.advance_audit_head TO billing_app;
GRANT CREATE ON SCHEMA app TO billing_lookup;
ALTER FUNCTION app.lock_audit_head OWNER TO billing_lookup;
ALTER FUNCTION app.advance_audit_head OWNER TO billing_lookup;
REVOKE CREATE ON SCHEMA app FROM billing_lookup;
GRANT SELECT, INSERT, UPDATE (sequence, hash) ON audit_heads TO billing_lookup;
GRANT SELECT (tenant_id, sequence, hash) ON audit_log TO billing_lookup;
CREATE POLICY head ON audit_heads TO billing_lookup
    USING (tenant_id = (SELECT app.current_tenant())) WITH CHECK (tenant_id = (SELECT app.current_tenant()));
CREATE POLICY head ON audit_log FOR SELECT TO billing_lookup USING (tenant_id = (SELECT app.current_tenant()));
REVOKE INSERT, UPDATE ON audit_heads FROM billing_app;
"""

# The oldest schema whose server still runs on this one. A migration that takes something away puts its own name here.
SERVES = "CREATE FUNCTION app.oldest_server() RETURNS text LANGUAGE sql IMMUTABLE RETURN '0006'"
