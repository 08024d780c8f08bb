"""The shelf of idempotency keys, and the deletion of expired ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, and_, bindparam, delete, select, update
from sqlalchemy.dialects.postgresql import insert

from billing.encryption import Vault
from billing.idempotency import Claim, Found, StoredAnswer
from billing.storage.shelf import SET_TENANT, Shelf, of_tenant
from billing.storage.tables import idempotency_keys

FORGET = "SELECT app.forget_answers(%(now)s, %(most)s)"
FORGOTTEN_AT_ONCE = 1000

NEW = insert(idempotency_keys)
TAKE = NEW.on_conflict_do_update(
    index_elements=[idempotency_keys.c.tenant_id, idempotency_keys.c.name],
    set_={column: NEW.excluded[column] for column in ("claim", "request", "answer", "expires_at")},
    where=idempotency_keys.c.expires_at <= bindparam("now"),
)
FIND = select(idempotency_keys.c.request, idempotency_keys.c.answer).where(
    of_tenant(idempotency_keys), idempotency_keys.c.name == bindparam("key")
)
IS_HELD = and_(
    of_tenant(idempotency_keys),
    idempotency_keys.c.name == bindparam("key"),
    idempotency_keys.c.claim == bindparam("held"),
    idempotency_keys.c.answer.is_(None),
)
KEEP = update(idempotency_keys).where(IS_HELD)
RELEASE = delete(idempotency_keys).where(IS_HELD)


class IdempotencyKeys(Shelf):
    """The keys of one tenant's callers, or of one client address; fingerprint and answer are sealed to their row."""

    def __init__(self, connection: Connection, tenant_id: UUID, vault: Vault) -> None:
        super().__init__(connection, tenant_id)
        self._vault = vault

    def take(self, claim: Claim, fingerprint: str, *, until: datetime) -> bool:
        """Store the claim, unless there is a claim or an answer that has not expired; returns whether it did."""
        taken = self.run(
            TAKE,
            tenant_id=self._tenant_id,
            name=claim.name,
            claim=claim.id,
            request=self._vault.seal(fingerprint, place=self._place("request", claim.name)),
            answer=None,
            expires_at=until,
            now=claim.at,
        )
        return taken.rowcount == 1

    def find(self, name: bytes) -> Found | None:
        """What is stored under the name."""
        row = self.run(FIND, key=name).one_or_none()
        if row is None:
            return None
        fingerprint = self._vault.open(row.request, place=self._place("request", name))
        if row.answer is None:
            return Found(fingerprint, None)
        answer = json.loads(self._vault.open(row.answer, place=self._place("answer", name)))
        return Found(fingerprint, StoredAnswer(**answer))

    def keep(self, claim: Claim, answer: StoredAnswer, *, until: datetime) -> bool:
        """Store the answer with the claim; False if the claim is no longer ours.

        A registration runs in the new tenant's transaction, but its key belongs to the client's address: for this one
        statement the transaction is scoped to the address.
        """
        if claim.is_anonymous and claim.scope != self._tenant_id:
            with self._at(claim.scope) as shelf:
                return shelf.keep(claim, answer, until=until)
        sealed = self._vault.seal(json.dumps(asdict(answer)), place=self._place("answer", claim.name))
        kept = self.run(KEEP, key=claim.name, held=claim.id, answer=sealed, expires_at=until)
        return kept.rowcount == 1

    @contextmanager
    def _at(self, address: UUID) -> Iterator[IdempotencyKeys]:
        self._connection.exec_driver_sql(SET_TENANT, (str(address),))
        yield IdempotencyKeys(self._connection, address, self._vault)
        self._connection.exec_driver_sql(SET_TENANT, (str(self._tenant_id),))

    def release(self, claim: Claim) -> None:
        """Delete the claim, so that a repeated request may be processed; an answer is not deleted."""
        self.run(RELEASE, key=claim.name, held=claim.id)

    def _place(self, column: str, name: bytes) -> str:
        return f"idempotency_keys/{self._tenant_id}/{name.hex()}/{column}"


def forget_answers(connection: Connection, now: datetime) -> bool:
    """Delete some expired claims and answers, of any tenant or address; returns whether there may be more."""
    parameters = {"now": now, "most": FORGOTTEN_AT_ONCE}
    return bool(connection.exec_driver_sql(FORGET, parameters).scalar_one() == FORGOTTEN_AT_ONCE)
