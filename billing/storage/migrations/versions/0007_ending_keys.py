"""An index of the keys that may still work: those that ended are kept for good, and need not be read each time."""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute(ENDING)


# Where there are many keys it is made before, CONCURRENTLY: docs/operations.md.
ENDING = """
CREATE INDEX IF NOT EXISTS api_keys_ending ON api_keys (tenant_id, expires_at) WHERE revoked_at IS NULL
"""
