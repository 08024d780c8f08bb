"""Idempotency keys in storage: claims, stored answers, claims that were taken over, and deletion."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from starlette.types import Scope

from billing.encryption import Unreadable
from billing.errors import IdempotencyInProgress, IdempotencyKeyReused
from billing.http.idempotency import HEADER, Idempotency, NotKept, Once
from billing.http.replies import Reply, ok
from billing.idempotency import (
    KEPT,
    LEASE,
    Claim,
    Request,
    StoredAnswer,
    keep,
    name_of,
    scope_of_address,
    take,
)
from billing.ids import new_id
from billing.keys import KeyDigests
from billing.storage import idempotency as shelf
from billing.storage.store import Store
from tests.clock import TurnedClock
from tests.test_housekeeping import clock, digests, register, tidy

__all__ = ["clock", "digests"]

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
MOMENT = timedelta(milliseconds=1)
ANSWER = StoredAnswer(201, {"content-type": "application/json", "set-cookie": "a=b"}, '{"text": "caf\u00e9"}')
ADDRESS = scope_of_address("192.0.2.1")


@pytest.fixture
def request_() -> Request:
    return Request(new_id(), name_of("one", new_id()), "asked")


def take_key(store: Store, request: Request, now: datetime = NOW) -> Claim | StoredAnswer:
    with store.tenant(request.scope) as tx:
        return take(tx, request, now=now)


def take_claim(store: Store, request: Request, now: datetime = NOW) -> Claim:
    claim = take_key(store, request, now)
    assert isinstance(claim, Claim)
    return claim


def keep_answer(store: Store, claim: Claim, answer: StoredAnswer = ANSWER) -> None:
    with store.tenant(claim.scope) as tx:
        keep(tx, claim, answer)


def release_claim(store: Store, claim: Claim) -> None:
    with store.tenant(claim.scope) as tx:
        tx.idempotency.release(claim)


# Names -------------------------------------------------------------------------------------------


def test_callers_do_not_share_keys() -> None:
    ada, bob = new_id(), new_id()
    names = {name_of("one", ada), name_of("one", bob), name_of("two", ada), name_of("one", None)}
    assert len(names) == 4
    assert name_of("one", ada) == name_of("one", ada)


def test_the_scope_of_an_address_is_never_a_tenant_id() -> None:
    scopes = {scope_of_address(address) for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", None)}
    assert len(scopes) == 4
    assert {scope.version for scope in scopes} == {5}
    assert new_id().version == 7


# Claims ------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_first_answer(store: Store, request_: Request) -> None:
    claim = take_claim(store, request_)
    with pytest.raises(IdempotencyInProgress):
        take_key(store, request_)
    keep_answer(store, claim)
    assert take_key(store, request_) == ANSWER


def test_another_request_cannot_reuse_a_key(store: Store, request_: Request) -> None:
    other = replace(request_, fingerprint="something else")
    claim = take_claim(store, request_)
    with pytest.raises(IdempotencyKeyReused):
        take_key(store, other)
    keep_answer(store, claim)
    with pytest.raises(IdempotencyKeyReused):
        take_key(store, other)


def test_a_released_key_can_be_claimed_again(store: Store, request_: Request) -> None:
    release_claim(store, take_claim(store, request_))
    take_claim(store, replace(request_, fingerprint="something else"))


def test_releasing_a_claim_does_not_delete_its_answer(store: Store, request_: Request) -> None:
    claim = take_claim(store, request_)
    keep_answer(store, claim)
    release_claim(store, claim)
    assert take_key(store, request_) == ANSWER


@pytest.mark.parametrize(("age", "is_free"), [(LEASE - MOMENT, False), (LEASE, True)])
def test_a_claim_expires_with_its_lease(
    store: Store, request_: Request, age: timedelta, *, is_free: bool
) -> None:
    take_claim(store, request_)
    if is_free:
        take_claim(store, request_, NOW + age)
    else:
        with pytest.raises(IdempotencyInProgress):
            take_key(store, request_, NOW + age)


@pytest.mark.parametrize(("age", "is_free"), [(KEPT - MOMENT, False), (KEPT, True)])
def test_an_answer_is_kept_for_a_day(
    store: Store, request_: Request, age: timedelta, *, is_free: bool
) -> None:
    keep_answer(store, take_claim(store, request_))
    assert isinstance(take_key(store, request_, NOW + age), Claim if is_free else StoredAnswer)


# Lost claims -------------------------------------------------------------------------------------


def test_a_claim_that_was_taken_over_changes_nothing(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock
) -> None:
    acme = register(store, digests, clock, "Acme").tenant
    request = Request(acme.id, name_of("one", None), "asked")
    late = take_claim(store, request)
    successor = take_claim(store, request, NOW + LEASE)
    with pytest.raises(IdempotencyInProgress), store.tenant(acme.id) as tx:
        tx.tenants.set_tier("pro", NOW)
        keep(tx, late, ANSWER)
    with store.tenant(acme.id) as tx:
        assert tx.tenants.get().tier == "free"

    release_claim(store, late)
    keep_answer(store, successor, replace(ANSWER, status=200))
    answer = take_key(store, request, NOW + LEASE)
    assert isinstance(answer, StoredAnswer)
    assert answer.status == 200


def test_an_answer_is_kept_once(store: Store, request_: Request) -> None:
    claim = take_claim(store, request_)
    keep_answer(store, claim)
    with pytest.raises(IdempotencyInProgress):
        keep_answer(store, claim)


def test_an_answer_is_rolled_back_with_its_change(store: Store, request_: Request) -> None:
    claim = take_claim(store, request_)
    with pytest.raises(ZeroDivisionError), store.tenant(claim.scope) as tx:
        keep(tx, claim, ANSWER)
        raise ZeroDivisionError
    with pytest.raises(IdempotencyInProgress):
        take_key(store, request_)


# Anonymous callers -------------------------------------------------------------------------------


def test_an_anonymous_answer_is_kept_in_the_transaction_of_the_new_tenant(store: Store) -> None:
    request = Request(ADDRESS, name_of("one", None), "asked")
    claim, tenant_id = take_claim(store, request), new_id()
    with store.tenant(tenant_id) as tx:
        keep(tx, claim, ANSWER)
        assert current_tenant(tx.idempotency) == tenant_id
    assert take_key(store, request) == ANSWER


def test_an_answer_is_not_kept_in_another_tenants_transaction(store: Store, request_: Request) -> None:
    claim = take_claim(store, request_)
    with pytest.raises(IdempotencyInProgress), store.tenant(new_id()) as tx:
        keep(tx, claim, ANSWER)


def current_tenant(rows: shelf.IdempotencyKeys) -> UUID:
    found: UUID = rows._connection.execute(text("SELECT app.current_tenant()")).scalar_one()
    return found


# A handler ---------------------------------------------------------------------------------------


def a_request() -> Scope:
    state = {
        "headers": {HEADER: "one"},
        "query": {},
        "body": None,
        "operation_id": "regenerate_api_keys",
        "request_id": "request-1",
        "client_address": "192.0.2.1",
    }
    return {"type": "http", "state": state}


def test_a_handler_that_does_not_keep_its_answer_fails(store: Store, superuser: Engine) -> None:
    idempotency = Idempotency(store, lambda: NOW)
    for _ in range(2):
        with pytest.raises(NotKept):
            idempotency.answer(a_request(), lambda once: ok({}))
    assert stored_names(superuser) == set()


def test_a_handler_need_not_keep_an_answer_without_a_key(store: Store, superuser: Engine) -> None:
    scope = a_request()
    scope["state"]["headers"] = {}
    assert Idempotency(store, lambda: NOW).answer(scope, lambda once: ok({})).status == 200
    assert stored_names(superuser) == set()


def test_a_handler_whose_claim_was_taken_over_raises_in_progress(store: Store) -> None:
    idempotency = Idempotency(store, lambda: NOW)

    def slow(*, once: Once) -> Reply:
        later = Idempotency(store, lambda: NOW + LEASE)
        later.answer(a_request(), lambda once: kept_reply(once, "in time"))
        return kept_reply(once, "too late")

    def kept_reply(once: Once, message: str) -> Reply:
        with store.tenant(new_id()) as tx:
            return once.keep(tx, ok({"message": message}))

    with pytest.raises(IdempotencyInProgress):
        idempotency.answer(a_request(), slow)
    assert idempotency.answer(a_request(), slow).body == b'{"message":"in time"}'


# At rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["name = '\\x00'", "request = answer", "answer = request"])
def test_a_sealed_answer_moved_elsewhere_is_unreadable(
    store: Store, superuser: Engine, request_: Request, move: str
) -> None:
    keep_answer(store, take_claim(store, request_))
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"UPDATE idempotency_keys SET {move}")
    name = b"\0" if move.startswith("name") else request_.name
    with pytest.raises(Unreadable), store.tenant(request_.scope) as tx:
        tx.idempotency.find(name)


# Deletion ----------------------------------------------------------------------------------------


def stored_names(superuser: Engine) -> set[bytes]:
    with superuser.connect() as connection:
        return {bytes(name) for name in connection.scalars(text("SELECT name FROM idempotency_keys"))}


def test_tidying_any_tenant_deletes_all_expired_keys(
    store: Store,
    superuser: Engine,
    digests: KeyDigests,
    clock: TurnedClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelf, "FORGOTTEN_AT_ONCE", 2)
    acme = register(store, digests, clock, "Acme").tenant
    for number in range(5):
        keep_answer(store, take_claim(store, Request(ADDRESS, b"%d" % number, "asked"), clock()))
    take_claim(store, Request(acme.id, b"a claim", "asked"), clock())
    clock.now += KEPT - MOMENT
    keep_answer(store, take_claim(store, Request(new_id(), b"young", "asked"), clock()))
    clock.now += MOMENT
    tidy(store, clock)
    assert stored_names(superuser) == {b"young"}


@pytest.mark.parametrize("statement", ["SELECT answer FROM idempotency_keys", "TABLE idempotency_keys"])
def test_no_rows_are_visible_without_a_tenant(store: Store, request_: Request, statement: str) -> None:
    keep_answer(store, take_claim(store, request_))
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql(statement).all() == []
