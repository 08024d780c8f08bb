"""The Idempotency-Key header: a handler runs once per key, and keeps its answer together with its changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress

import orjson
from starlette.types import Scope

from billing import idempotency
from billing.clock import Clock
from billing.errors import BillingError, Conflict, DatabaseUnavailable, IdempotencyInProgress, Refused
from billing.http import problems
from billing.http.replies import Rendered, Reply
from billing.idempotency import Claim, Request, StoredAnswer
from billing.security import Caller
from billing.storage.store import Store, TenantTx

HEADER = "Idempotency-Key"
REPLAYED = (b"idempotent-replayed", b"true")


class NotKept(Exception):
    """A handler whose operation takes the header has answered without keeping its answer."""


class Once:
    """What a handler keeps its answer with; where the request has no key, nothing is kept."""

    def __init__(self, claim: Claim | None = None) -> None:
        self._claim = claim
        self._is_kept = claim is None

    def keep(self, tx: TenantTx, reply: Reply) -> Reply:
        """Keep the reply in the transaction of its changes, and return it."""
        if self._claim is not None:
            idempotency.keep(tx, self._claim, answer_of(reply.rendered()))
            self._is_kept = True
        return reply

    def require_kept(self) -> None:
        """Raises `NotKept` unless the answer was kept, where it should be."""
        if not self._is_kept:
            raise NotKept


class Idempotency:
    """Answers the requests of operations that take the header; called in the handler's thread."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def answer(self, scope: Scope, handle: Callable[..., Reply]) -> Rendered:
        """What the handler answers, or answered before; raises `Conflict` or `Refused` about the key."""
        request = request_of(scope)
        if request is None:
            return handle(once=Once()).rendered()
        with self._store.tenant(request.scope) as tx:
            taken = idempotency.take(tx, request, now=self._clock())
        if isinstance(taken, StoredAnswer):
            return replay_of(taken)
        return self._first(taken, handle, scope)

    def _first(self, claim: Claim, handle: Callable[..., Reply], scope: Scope) -> Rendered:
        once = Once(claim)
        try:
            reply = handle(once=once)
            once.require_kept()
            return reply.rendered()
        except IdempotencyInProgress:
            raise  # The claim expired, and is a later attempt's by now: that one's answer counts.
        except (Conflict, Refused) as refusal:
            return self._refused(claim, refusal, scope)
        except BaseException:
            # Credentials, limits and failures may differ at the next attempt.
            self._release(claim)
            raise

    def _refused(self, claim: Claim, refusal: BillingError, scope: Scope) -> Rendered:
        """Keep a 409 or a 422, in a transaction of its own, as the handler changed nothing."""
        rendered = problems.answer_to(refusal, scope)
        with suppress(DatabaseUnavailable), self._store.tenant(claim.scope) as tx:
            tx.idempotency.keep(claim, answer_of(rendered), until=claim.at + idempotency.KEPT)
        return rendered

    def _release(self, claim: Claim) -> None:
        # If that fails too, the claim expires.
        with suppress(DatabaseUnavailable), self._store.tenant(claim.scope) as tx:
            tx.idempotency.release(claim)


def request_of(scope: Scope) -> Request | None:
    """The request as its key identifies it, None where it has no key."""
    state = scope["state"]
    value: str | None = state["headers"].get(HEADER)
    if value is None:
        return None
    caller: Caller | None = state.get("caller")
    key = value.strip('"')
    if caller is None:
        whose = idempotency.scope_of_address(state.get("client_address"))
        return Request(whose, idempotency.name_of(key, None), fingerprint_of(scope))
    name = idempotency.name_of(key, caller.id)
    return Request(caller.tenant_id, name, fingerprint_of(scope))


def fingerprint_of(scope: Scope) -> str:
    """A digest of operation, query and body: equal for equal JSON, however it is formatted."""
    state = scope["state"]
    content = [state["operation_id"], state["query"], state.get("body")]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def answer_of(rendered: Rendered) -> StoredAnswer:
    """What is kept of an answer; the edge adds to a replay what every answer has."""
    headers = {name.decode(): value.decode("latin-1") for name, value in rendered.headers}
    return StoredAnswer(rendered.status, headers, rendered.body.decode())


def replay_of(answer: StoredAnswer) -> Rendered:
    """The stored answer again, byte for byte."""
    headers = [(name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
    body = answer.body.encode()
    problem = orjson.loads(body)["code"] if answer.status >= 400 else None
    return Rendered(answer.status, [*headers, REPLAYED], body, problem)
