"""Stripe connections and the states that lead to them, events, and what a worker has to do."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

TENANT_TABLES = ("connect_states", "stripe_connections", "event_heads", "events", "tasks")


def upgrade() -> None:
    op.execute(TABLES)
    for table in TENANT_TABLES:
        isolate(table)
    op.execute(TAKE_TASKS)
    op.execute(GRANTS)


def isolate(table: str) -> None:
    """Let the application see and write the rows of the current tenant only; nobody owns an exception."""
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    # The sub-select makes it one call a query; a bare call is one a row.
    op.execute(
        f"CREATE POLICY tenant ON {table} TO billing_app "
        "USING (tenant_id = (SELECT app.current_tenant())) "
        "WITH CHECK (tenant_id = (SELECT app.current_tenant()))"
    )


TABLES = """
ALTER TABLE directory DROP CONSTRAINT directory_kind, ADD CONSTRAINT directory_kind
    CHECK (kind IN ('email', 'slug', 'api_key', 'connect_state', 'stripe_account'));

CREATE TABLE connect_states (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    digest text NOT NULL,
    flow text NOT NULL CONSTRAINT connect_states_flow CHECK (flow IN ('oauth', 'account_link')),
    return_url text,
    browser_digest bytea,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    consumed_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, user_id) REFERENCES users
);

CREATE TABLE stripe_connections (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    id uuid NOT NULL,
    flow text NOT NULL CONSTRAINT stripe_connections_flow CHECK (flow IN ('oauth', 'account_link')),
    livemode boolean NOT NULL,
    account jsonb NOT NULL,
    connected_at timestamptz NOT NULL,
    checked_at timestamptz,
    ended_at timestamptz
);

CREATE TABLE event_heads (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    sequence bigint NOT NULL
);

CREATE TABLE events (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    sequence bigint NOT NULL,
    type text NOT NULL,
    is_test boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX events_in_order ON events (tenant_id, sequence);
CREATE INDEX events_by_age ON events (tenant_id, created_at);

CREATE TABLE tasks (
    tenant_id uuid NOT NULL REFERENCES tenants,
    kind text NOT NULL,
    id uuid NOT NULL,
    subject text NOT NULL,
    queue text NOT NULL,
    created_at timestamptz NOT NULL,
    due_at timestamptz NOT NULL,
    leased_until timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    revision integer NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, kind, id)
);
CREATE INDEX tasks_due ON tasks (queue, due_at);
"""

# The one thing that may be asked across tenants: what is due. It tells whose, and nothing of theirs.
TAKE_TASKS = """
CREATE FUNCTION app.take_tasks(wanted text, at timestamptz, until timestamptz, most integer)
    RETURNS TABLE (
        tenant_id uuid, kind text, id uuid, subject text, queue text, created_at timestamptz,
        attempts integer, revision integer
    )
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        -- By row identifier, so that no plan reads the table. Who was served goes to the back of the queue.
        UPDATE public.tasks t SET leased_until = until, attempts = t.attempts + 1, due_at = at
        WHERE t.ctid = ANY (ARRAY(
            SELECT d.ctid FROM public.tasks d
            WHERE d.queue = wanted AND d.due_at <= at AND (d.leased_until IS NULL OR d.leased_until <= at)
            ORDER BY d.due_at LIMIT most FOR UPDATE SKIP LOCKED
        ))
        RETURNING t.tenant_id, t.kind, t.id, t.subject, t.queue, t.created_at, t.attempts, t.revision
    $$;

REVOKE ALL ON FUNCTION app.take_tasks FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.take_tasks TO billing_app;
GRANT CREATE ON SCHEMA app TO billing_lookup;
ALTER FUNCTION app.take_tasks OWNER TO billing_lookup;
REVOKE CREATE ON SCHEMA app FROM billing_lookup;
GRANT SELECT, UPDATE (leased_until, attempts, due_at) ON tasks TO billing_lookup;
CREATE POLICY worker ON tasks TO billing_lookup USING (true) WITH CHECK (true);
"""

GRANTS = """
GRANT SELECT, INSERT, UPDATE, DELETE ON connect_states, tasks TO billing_app;
GRANT SELECT, INSERT, UPDATE ON stripe_connections, event_heads TO billing_app;
GRANT SELECT, INSERT ON events TO billing_app;
GRANT DELETE ON directory TO billing_app;
"""
