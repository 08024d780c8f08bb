"""The tables, as the queries need them; the migrations make them, and a test compares the two.

`tenant_id` leads every other table's key, so that the tables can be sharded by tenant. What must be unique or
be found across tenants (emails, slugs, key digests) is in `directory`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData()


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("company_name", Text, nullable=False),
    Column("slug", Text, nullable=False),
    Column("email", Text, nullable=False),
    Column("domain", Text),
    Column("stripe_account_id", Text),
    Column("stripe_status", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("is_active", Boolean, nullable=False),
    _time("created_at"),
    _time("updated_at"),
    CheckConstraint("tier IN ('free', 'pro', 'enterprise')", name="tenants_tier"),
)

users = Table(
    "users",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("email", Text, nullable=False),
    Column("first_name", Text, nullable=False),
    Column("last_name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("password_hash", Text, nullable=False),
    # Tokens carry it: raising it ends them all.
    Column("token_version", Integer, nullable=False),
    _time("last_login", nullable=True),
    _time("created_at"),
    _time("updated_at"),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint("role IN ('owner', 'admin', 'developer')", name="users_role"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("user_id", Uuid, nullable=False),
    # SHA-256 of the `jti` of the refresh token that is good now, and of the one before it.
    Column("current_jti", LargeBinary, nullable=False),
    Column("previous_jti", LargeBinary),
    _time("created_at"),
    _time("rotated_at"),
    _time("expires_at"),
    _time("ended_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
    CheckConstraint(
        "octet_length(current_jti) = 32 AND (previous_jti IS NULL OR octet_length(previous_jti) = 32) "
        "AND expires_at > created_at",
        name="sessions_form",
    ),
    Index("sessions_of_user", "tenant_id", "user_id", postgresql_where=text("ended_at IS NULL")),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    Column("digest", Text, nullable=False),
    # A publishable key may be shown again, a secret one never.
    Column("text", Text),
    Column("last4", Text, nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
    _time("last_used_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint(
        "type IN ('live_public', 'live_secret', 'test_public', 'test_secret')", name="api_keys_type"
    ),
    CheckConstraint("(text IS NULL) = (type IN ('live_secret', 'test_secret'))", name="api_keys_no_secret"),
    Index("api_keys_digest", "tenant_id", "digest", unique=True),
    Index("api_keys_by_age", "tenant_id", "type", text("id DESC")),
    Index("api_keys_ending", "tenant_id", "expires_at", postgresql_where=text("revoked_at IS NULL")),
    Index(
        "api_keys_one_current",
        "tenant_id",
        "type",
        unique=True,
        postgresql_where=text("expires_at IS NULL AND revoked_at IS NULL"),
    ),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("url", Text),
    # The types that are sent; an empty array means all.
    Column("event_types", ARRAY(Text), nullable=False),
    Column("disabled_reason", Text),
    _time("failing_since", nullable=True),
    Column("failed_events", Integer, nullable=False),
    _time("updated_at"),
    PrimaryKeyConstraint("tenant_id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint(
        "array_position(event_types, NULL) IS NULL AND failed_events >= 0", name="webhook_endpoints_form"
    ),
)

webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("sealed", Text, nullable=False),
    Column("last4", Text, nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index(
        "webhook_secrets_one_current",
        "tenant_id",
        unique=True,
        postgresql_where=text("expires_at IS NULL"),
    ),
)

# No foreign key to tenants: sharded by name, a row may be on another shard than its tenant.
directory = Table(
    "directory",
    metadata,
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    PrimaryKeyConstraint("kind", "name"),
    CheckConstraint(
        "kind IN ('email', 'slug', 'api_key', 'connect_state', 'stripe_account')", name="directory_kind"
    ),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    _time("at"),
    Column("action", Text, nullable=False),
    Column("actor_kind", Text, nullable=False),
    Column("actor_id", Uuid),
    Column("subject", Text),
    Column("reason", Text),
    Column("details", JSONB, nullable=False),
    Column("address", Text),
    Column("request_id", Text),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id", "sequence"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint("octet_length(hash) = 32 AND jsonb_typeof(details) = 'object'", name="audit_log_form"),
)

connect_states = Table(
    "connect_states",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("user_id", Uuid, nullable=False),
    # The name by which the directory knows it: the hexadecimal SHA-256 of the state.
    Column("digest", Text, nullable=False),
    Column("flow", Text, nullable=False),
    Column("return_url", Text),
    Column("browser_digest", LargeBinary),
    _time("created_at"),
    _time("expires_at"),
    _time("consumed_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
    CheckConstraint("flow IN ('oauth', 'account_link')", name="connect_states_flow"),
)

# One per tenant: the current connection, or the last one if it has ended.
stripe_connections = Table(
    "stripe_connections",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("flow", Text, nullable=False),
    Column("livemode", Boolean, nullable=False),
    Column("account", JSONB, nullable=False),
    _time("connected_at"),
    _time("checked_at", nullable=True),
    _time("ended_at", nullable=True),
    PrimaryKeyConstraint("tenant_id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint("flow IN ('oauth', 'account_link')", name="stripe_connections_flow"),
)

event_heads = Table(
    "event_heads",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
)

events = Table(
    "events",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("is_test", Boolean, nullable=False),
    _time("created_at"),
    # The bytes that are signed, and sent on every attempt; empty for a test, which is sent only once.
    Column("body", LargeBinary, nullable=False),
    # The request in which it happened, for the logs; NULL if it happened in the worker.
    Column("request_id", Text),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    Index("events_in_order", "tenant_id", "sequence", unique=True),
    Index("events_by_age", "tenant_id", "created_at"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    _time("next_attempt_at", nullable=True),
    Column("http_status", Integer),
    Column("error", Text),
    Column("duration_ms", Integer),
    _time("created_at"),
    _time("settled_at", nullable=True),
    PrimaryKeyConstraint("tenant_id", "id"),
    ForeignKeyConstraint(["tenant_id", "event_id"], ["events.tenant_id", "events.id"]),
    CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="deliveries_status"),
    CheckConstraint(
        "(status = 'pending') = (next_attempt_at IS NOT NULL)", name="deliveries_due_while_pending"
    ),
    CheckConstraint("(status = 'pending') = (settled_at IS NULL)", name="deliveries_settled_when_ended"),
    CheckConstraint("attempts >= 0", name="deliveries_attempts"),
    Index("deliveries_due", "tenant_id", "next_attempt_at", postgresql_where=text("status = 'pending'")),
    Index("deliveries_settled", "tenant_id", "settled_at", postgresql_where=text("status <> 'pending'")),
    Index("deliveries_of_event", "tenant_id", "event_id"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("subject", Text, nullable=False),
    # Which of the worker's pools of threads runs it.
    Column("queue", Text, nullable=False),
    _time("created_at"),
    _time("due_at"),
    _time("leased_until", nullable=True),
    # Raised when a worker takes the task: one that has lost its lease can then change nothing.
    Column("attempts", Integer, nullable=False),
    # Raised when the task is added again: a worker that is running it must not take it for done.
    Column("revision", Integer, nullable=False),
    PrimaryKeyConstraint("tenant_id", "kind", "id"),
    ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
    CheckConstraint("queue IN ('general', 'checks', 'webhooks', 'slow_webhooks')", name="tasks_queue"),
    Index("tasks_due", "queue", "due_at"),
)

# Before the answer there is a claim, which is valid until `expires_at` like the answer itself.
# No foreign key to tenants: the key of a registration belongs to the client's address.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    # SHA-256 of the caller and their key.
    Column("name", LargeBinary, nullable=False),
    Column("claim", Uuid, nullable=False),
    # Both sealed: a password may be in what the fingerprint is made of, and a secret in the answer.
    Column("request", Text, nullable=False),
    Column("answer", Text),
    _time("expires_at"),
    PrimaryKeyConstraint("tenant_id", "name"),
    Index("idempotency_keys_by_end", "expires_at"),
)
