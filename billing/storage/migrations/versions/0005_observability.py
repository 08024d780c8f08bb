"""What waits, counted over all tenants; and the request that an event came of."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("ALTER TABLE events ADD COLUMN request_id text")
    op.execute(BACKLOG)


# The application sees one tenant's rows. This tells it how many there are, and since when, and nothing of whose.
BACKLOG = """
CREATE FUNCTION app.backlog(at timestamptz, queues text[])
    RETURNS TABLE (kind text, name text, number bigint, oldest timestamptz)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        SELECT 'queue', q.name, t.number, t.oldest
        FROM unnest(queues) AS q (name)
        CROSS JOIN LATERAL (
            SELECT count(*) AS number, min(due_at) AS oldest FROM public.tasks
            WHERE queue = q.name AND due_at <= at AND (leased_until IS NULL OR leased_until <= at)
        ) AS t
        UNION ALL
        SELECT 'outbox', s.state, coalesce(sum(o.number), 0)::bigint, min(o.oldest)
        FROM unnest(ARRAY['working', 'failing', 'disabled']) AS s (state)
        LEFT JOIN (
            SELECT d.number, d.oldest, CASE
                WHEN e.url IS NULL OR e.disabled_reason IS NOT NULL THEN 'disabled'
                WHEN e.failing_since IS NOT NULL THEN 'failing'
                ELSE 'working'
            END AS state
            FROM (
                SELECT tenant_id, count(*) AS number,
                    min(next_attempt_at) FILTER (WHERE next_attempt_at <= at) AS oldest
                FROM public.deliveries WHERE status = 'pending' GROUP BY tenant_id
            ) AS d
            LEFT JOIN public.webhook_endpoints e USING (tenant_id)
        ) AS o USING (state)
        GROUP BY s.state
    $$;

REVOKE ALL ON FUNCTION app.backlog FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.backlog TO billing_app;
GRANT CREATE ON SCHEMA app TO billing_lookup;
ALTER FUNCTION app.backlog OWNER TO billing_lookup;
REVOKE CREATE ON SCHEMA app FROM billing_lookup;
GRANT SELECT (tenant_id, status, next_attempt_at) ON deliveries TO billing_lookup;
GRANT SELECT (tenant_id, url, disabled_reason, failing_since) ON webhook_endpoints TO billing_lookup;
CREATE POLICY backlog ON deliveries FOR SELECT TO billing_lookup USING (true);
CREATE POLICY backlog ON webhook_endpoints FOR SELECT TO billing_lookup USING (true);
"""
