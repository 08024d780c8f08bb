"""The callers: tenants with keys and tokens; and the role and the indexes that the peers get."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import jwt
from sqlalchemy import create_engine

from benchmarks.installation import Installation
from billing import sessions, tenants
from billing.clock import utc_now
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.settings import Settings
from billing.storage.database import NAME
from billing.storage.store import Store
from billing.tokens import Holder, Tokens

# Enough that no tenant reaches its limits, and that look-ups are not always of the same row.
TENANTS = 100
PEER = "peer"
# Peers have no directory: a key is found by an index of its own, a user by its id alone.
FOR_PEERS = f"""
    CREATE ROLE {PEER} LOGIN BYPASSRLS PASSWORD '{PEER}';
    GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA public TO {PEER};
    CREATE UNIQUE INDEX api_keys_for_peers ON api_keys (digest);
    CREATE UNIQUE INDEX users_for_peers ON users (id);
"""


@dataclass(frozen=True)
class Member:
    """One tenant, its live secret key, and its owner with a session."""

    tenant_id: UUID
    user_id: UUID
    session_id: UUID
    email: str
    key: str


class Population:
    """The tenants of a benchmark, with credentials for our server and for the peers."""

    def __init__(self, installation: Installation) -> None:
        self.jwt_secret = secrets.token_hex(32)
        self._tokens = Tokens(installation.settings.jwt_keys, installation.settings.public_base_url)
        self.members = [_registered(installation.store, installation.settings) for _ in range(TENANTS)]

    def our_tokens(self) -> list[str]:
        """An access token for each tenant, good for 15 minutes."""
        now = utc_now()
        return [self._tokens.access(_holder(member), now) for member in self.members]

    def peers_tokens(self) -> list[str]:
        """Such tokens as Django's simplejwt makes, with the tenant's id added for the other peers."""
        return [self._peers_token(member) for member in self.members]

    def _peers_token(self, member: Member) -> str:
        claims = {
            "token_type": "access",
            "jti": str(new_id()),
            "tenant_id": str(member.tenant_id),
            "user_id": str(member.user_id),
            "iat": datetime.now(UTC),
            "exp": datetime.now(UTC) + timedelta(minutes=15),
        }
        return jwt.encode(claims, self.jwt_secret, algorithm="HS256")


def _registered(store: Store, settings: Settings) -> Member:
    tenant_id, now = new_id(), utc_now()
    details = {
        "company_name": "Acme Inc.",
        "email": f"ada@{tenant_id}.example",
        "first_name": "Ada",
        "last_name": "Example",
        "domain": "acme.example",
        "webhook_url": "https://hooks.acme.example/billing",
    }
    tokens = Tokens(settings.jwt_keys, settings.public_base_url)
    with store.tenant(tenant_id) as tx:
        made = tenants.register(
            tx, details, password_hash="-", digests=KeyDigests(settings.key_peppers), now=now
        )
        tenants.set_tier(tx, "enterprise", now=now)
        pair = sessions.start(tx, made.owner, tokens=tokens, now=now)
    key = next(new.text for new in made.keys if new.key.type == "live_secret")
    return Member(
        tenant_id, made.owner.id, tokens.read_access(pair.access, now).session_id, made.owner.email, key
    )


def _holder(member: Member) -> Holder:
    return Holder(member.tenant_id, member.user_id, member.session_id, token_version=1, role="owner")


def admit_peers(installation: Installation) -> None:
    """Make the peers' role, which row security does not bind, and the indexes for their look-ups."""
    engine = create_engine(installation.cluster.url(NAME))
    with engine.begin() as connection:
        connection.exec_driver_sql(FOR_PEERS)
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()
