"""Tenants, users, sessions, API keys, webhook secrets, the directory and the audit log."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

TENANT_TABLES = (
    "users",
    "sessions",
    "api_keys",
    "webhook_endpoints",
    "webhook_secrets",
    "audit_heads",
    "audit_log",
)


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(LOOKUPS)
    isolate("tenants", "id")
    isolate("directory", "tenant_id")
    for table in TENANT_TABLES:
        isolate(table, "tenant_id")
    op.execute(GRANTS)


def isolate(table: str, column: str) -> None:
    """Let the application see and write the rows of the current tenant only; nobody owns an exception."""
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    # The sub-select makes it one call a query; a bare call is one a row.
    op.execute(
        f"CREATE POLICY tenant ON {table} TO billing_app "
        f"USING ({column} = (SELECT app.current_tenant())) "
        f"WITH CHECK ({column} = (SELECT app.current_tenant()))"
    )


TABLES = """
CREATE TABLE tenants (
    id uuid PRIMARY KEY,
    company_name text NOT NULL,
    slug text NOT NULL,
    email text NOT NULL,
    domain text,
    stripe_account_id text,
    stripe_status text NOT NULL DEFAULT 'not_connected',
    tier text NOT NULL DEFAULT 'free' CONSTRAINT tenants_tier CHECK (tier IN ('free', 'pro', 'enterprise')),
    is_active boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL
);

CREATE TABLE users (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    email text NOT NULL,
    first_name text NOT NULL,
    last_name text NOT NULL,
    role text NOT NULL CONSTRAINT users_role CHECK (role IN ('owner', 'admin', 'developer')),
    is_active boolean NOT NULL DEFAULT true,
    password_hash text NOT NULL,
    token_version integer NOT NULL DEFAULT 1,
    last_login timestamptz,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, id)
);

CREATE TABLE sessions (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    current_jti bytea NOT NULL,
    previous_jti bytea,
    created_at timestamptz NOT NULL,
    rotated_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    ended_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, user_id) REFERENCES users
);
CREATE INDEX sessions_of_user ON sessions (tenant_id, user_id) WHERE ended_at IS NULL;

CREATE TABLE api_keys (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    type text NOT NULL CONSTRAINT api_keys_type
        CHECK (type IN ('live_public', 'live_secret', 'test_public', 'test_secret')),
    digest text NOT NULL,
    text text,
    last4 text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    CONSTRAINT api_keys_no_secret CHECK ((text IS NULL) = (type IN ('live_secret', 'test_secret')))
);
CREATE UNIQUE INDEX api_keys_digest ON api_keys (tenant_id, digest);
CREATE INDEX api_keys_by_age ON api_keys (tenant_id, type, id DESC);
CREATE UNIQUE INDEX api_keys_one_current ON api_keys (tenant_id, type)
    WHERE expires_at IS NULL AND revoked_at IS NULL;

CREATE TABLE webhook_endpoints (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    url text,
    updated_at timestamptz NOT NULL
);

CREATE TABLE webhook_secrets (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    sealed text NOT NULL,
    last4 text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX webhook_secrets_one_current ON webhook_secrets (tenant_id) WHERE expires_at IS NULL;

CREATE TABLE directory (
    kind text NOT NULL CONSTRAINT directory_kind CHECK (kind IN ('email', 'slug', 'api_key')),
    name text NOT NULL,
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    PRIMARY KEY (kind, name)
);

CREATE TABLE audit_heads (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    sequence bigint NOT NULL,
    hash bytea NOT NULL
);

CREATE TABLE audit_log (
    tenant_id uuid NOT NULL REFERENCES tenants,
    sequence bigint NOT NULL,
    at timestamptz NOT NULL,
    action text NOT NULL,
    actor_kind text NOT NULL,
    actor_id uuid,
    subject text,
    reason text,
    details jsonb NOT NULL,
    address text,
    request_id text,
    hash bytea NOT NULL,
    PRIMARY KEY (tenant_id, sequence)
);
"""

# `find` answers exact hits only, so it cannot be used to list anything.
LOOKUPS = """
CREATE SCHEMA app;

CREATE FUNCTION app.current_tenant() RETURNS uuid
    LANGUAGE sql STABLE
    -- After a transaction-local setting the value is '', not NULL.
    RETURN nullif(pg_catalog.current_setting('app.tenant_id', true), '')::uuid;

CREATE FUNCTION app.find(wanted_kind text, wanted_names text[]) RETURNS TABLE (tenant_id uuid, id uuid)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
        SELECT d.tenant_id, d.id FROM public.directory d
        WHERE d.kind = wanted_kind AND d.name = ANY (wanted_names)
    $$;

REVOKE ALL ON FUNCTION app.find FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.find TO billing_app;
GRANT USAGE, CREATE ON SCHEMA app TO billing_lookup;
ALTER FUNCTION app.find OWNER TO billing_lookup;
REVOKE CREATE ON SCHEMA app FROM billing_lookup;
GRANT SELECT ON directory TO billing_lookup;
CREATE POLICY lookup ON directory FOR SELECT TO billing_lookup USING (true);
"""

# Rows of the audit log are added, and read, and no more. `operator` is `billing tenants list`.
GRANTS = """
GRANT USAGE ON SCHEMA app, public TO billing_app;
GRANT SELECT ON alembic_version TO billing_app;
GRANT SELECT, INSERT, UPDATE ON tenants, users, sessions, api_keys, audit_heads TO billing_app;
GRANT SELECT, INSERT, UPDATE ON webhook_endpoints, webhook_secrets TO billing_app;
GRANT SELECT, INSERT ON directory, audit_log TO billing_app;
DO $$ BEGIN EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database()); END $$;
CREATE POLICY operator ON tenants FOR SELECT TO billing_owner USING (true);
"""
