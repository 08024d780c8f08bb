"""Idempotency keys in storage: who may answer, who is too late, and what is forgotten."""

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


def taken(store: Store, request: Request, now: datetime = NOW) -> Claim | StoredAnswer:
    with store.tenant(request.scope) as tx:
        return take(tx, request, now=now)


def claimed(store: Store, request: Request, now: datetime = NOW) -> Claim:
    claim = taken(store, request, now)
    assert isinstance(claim, Claim)
    return claim


def kept(store: Store, claim: Claim, answer: StoredAnswer = ANSWER) -> None:
    with store.tenant(claim.scope) as tx:
        keep(tx, claim, answer)


def released(store: Store, claim: Claim) -> None:
    with store.tenant(claim.scope) as tx:
        tx.idempotency.release(claim)


# Names -------------------------------------------------------------------------------------------


def test_a_key_is_each_callers_own() -> None:
    ada, bob = new_id(), new_id()
    names = {name_of("one", ada), name_of("one", bob), name_of("two", ada), name_of("one", None)}
    assert len(names) == 4
    assert name_of("one", ada) == name_of("one", ada)


def test_what_belongs_to_an_address_can_be_no_tenants() -> None:
    scopes = {scope_of_address(address) for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", None)}
    assert len(scopes) == 4
    assert {scope.version for scope in scopes} == {5}
    assert new_id().version == 7


# Taking ------------------------------------------------------------------------------------------


def test_the_first_answers_and_the_others_get_that(store: Store, request_: Request) -> None:
    claim = claimed(store, request_)
    with pytest.raises(IdempotencyInProgress):
        taken(store, request_)
    kept(store, claim)
    assert taken(store, request_) == ANSWER


def test_another_request_has_no_use_for_it(store: Store, request_: Request) -> None:
    other = replace(request_, fingerprint="something else")
    claim = claimed(store, request_)
    with pytest.raises(IdempotencyKeyReused):
        taken(store, other)
    kept(store, claim)
    with pytest.raises(IdempotencyKeyReused):
        taken(store, other)


def test_who_is_let_go_of_makes_room(store: Store, request_: Request) -> None:
    released(store, claimed(store, request_))
    claimed(store, replace(request_, fingerprint="something else"))


def test_an_answer_is_not_let_go_of(store: Store, request_: Request) -> None:
    claim = claimed(store, request_)
    kept(store, claim)
    released(store, claim)
    assert taken(store, request_) == ANSWER


@pytest.mark.parametrize(("age", "is_free"), [(LEASE - MOMENT, False), (LEASE, True)])
def test_a_claim_runs_out(store: Store, request_: Request, age: timedelta, *, is_free: bool) -> None:
    claimed(store, request_)
    if is_free:
        claimed(store, request_, NOW + age)
    else:
        with pytest.raises(IdempotencyInProgress):
            taken(store, request_, NOW + age)


@pytest.mark.parametrize(("age", "is_free"), [(KEPT - MOMENT, False), (KEPT, True)])
def test_an_answer_counts_for_a_day(
    store: Store, request_: Request, age: timedelta, *, is_free: bool
) -> None:
    kept(store, claimed(store, request_))
    assert isinstance(taken(store, request_, NOW + age), Claim if is_free else StoredAnswer)


# The fence ---------------------------------------------------------------------------------------


def test_who_is_too_late_changes_nothing(
    store: Store, superuser: Engine, digests: KeyDigests, clock: TurnedClock
) -> None:
    acme = register(store, digests, clock, "Acme").tenant
    request = Request(acme.id, name_of("one", None), "asked")
    late = claimed(store, request)
    successor = claimed(store, request, NOW + LEASE)
    with pytest.raises(IdempotencyInProgress), store.tenant(acme.id) as tx:
        tx.tenants.set_tier("pro", NOW)
        keep(tx, late, ANSWER)
    with store.tenant(acme.id) as tx:
        assert tx.tenants.get().tier == "free"

    released(store, late)
    kept(store, successor, replace(ANSWER, status=200))
    answer = taken(store, request, NOW + LEASE)
    assert isinstance(answer, StoredAnswer)
    assert answer.status == 200


def test_an_answer_is_kept_once(store: Store, request_: Request) -> None:
    claim = claimed(store, request_)
    kept(store, claim)
    with pytest.raises(IdempotencyInProgress):
        kept(store, claim)


def test_without_the_change_there_is_no_answer(store: Store, request_: Request) -> None:
    claim = claimed(store, request_)
    with pytest.raises(ZeroDivisionError), store.tenant(claim.scope) as tx:
        keep(tx, claim, ANSWER)
        raise ZeroDivisionError
    with pytest.raises(IdempotencyInProgress):
        taken(store, request_)


# Anonymous callers -----------------------------------------------------------------------------


def test_an_anonymous_callers_answer_is_kept_in_the_transaction_of_their_tenant(store: Store) -> None:
    request = Request(ADDRESS, name_of("one", None), "asked")
    claim, tenant_id = claimed(store, request), new_id()
    with store.tenant(tenant_id) as tx:
        keep(tx, claim, ANSWER)
        assert current_tenant(tx.idempotency) == tenant_id
    assert taken(store, request) == ANSWER


def test_a_tenants_answer_is_not_kept_by_another(store: Store, request_: Request) -> None:
    claim = claimed(store, request_)
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


def test_a_handler_that_does_not_keep_its_answer_is_found_out_at_once(
    store: Store, superuser: Engine
) -> None:
    asked = Idempotency(store, lambda: NOW)
    for _ in range(2):
        with pytest.raises(NotKept):
            asked.answer(a_request(), lambda once: ok({}))
    assert names(superuser) == set()


def test_a_handler_need_not_keep_what_has_no_key(store: Store, superuser: Engine) -> None:
    scope = a_request()
    scope["state"]["headers"] = {}
    assert Idempotency(store, lambda: NOW).answer(scope, lambda once: ok({})).status == 200
    assert names(superuser) == set()


def test_who_is_too_late_is_told_that_another_answers(store: Store) -> None:
    asked = Idempotency(store, lambda: NOW)

    def slow(*, once: Once) -> Reply:
        later = Idempotency(store, lambda: NOW + LEASE)
        later.answer(a_request(), lambda once: kept_reply(once, "in time"))
        return kept_reply(once, "too late")

    def kept_reply(once: Once, message: str) -> Reply:
        with store.tenant(new_id()) as tx:
            return once.keep(tx, ok({"message": message}))

    with pytest.raises(IdempotencyInProgress):
        asked.answer(a_request(), slow)
    assert asked.answer(a_request(), slow).body == b'{"message":"in time"}'


# At rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["name = '\\x00'", "request = answer", "answer = request"])
def test_what_is_sealed_opens_in_its_place_alone(
    store: Store, superuser: Engine, request_: Request, move: str
) -> None:
    kept(store, claimed(store, request_))
    with superuser.begin() as connection:
        connection.exec_driver_sql(f"UPDATE idempotency_keys SET {move}")
    name = b"\0" if move.startswith("name") else request_.name
    with pytest.raises(Unreadable), store.tenant(request_.scope) as tx:
        tx.idempotency.find(name)


# Forgetting --------------------------------------------------------------------------------------


def names(superuser: Engine) -> set[bytes]:
    with superuser.connect() as connection:
        return {bytes(name) for name in connection.scalars(text("SELECT name FROM idempotency_keys"))}


def test_the_day_of_any_tenant_forgets_what_has_run_out(
    store: Store,
    superuser: Engine,
    digests: KeyDigests,
    clock: TurnedClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelf, "FORGOTTEN_AT_ONCE", 2)
    acme = register(store, digests, clock, "Acme").tenant
    for number in range(5):
        kept(store, claimed(store, Request(ADDRESS, b"%d" % number, "asked"), clock()))
    claimed(store, Request(acme.id, b"a claim", "asked"), clock())
    clock.now += KEPT - MOMENT
    kept(store, claimed(store, Request(new_id(), b"young", "asked"), clock()))
    clock.now += MOMENT
    tidy(store, clock)
    assert names(superuser) == {b"young"}


@pytest.mark.parametrize("statement", ["SELECT answer FROM idempotency_keys", "TABLE idempotency_keys"])
def test_without_a_tenant_nothing_is_seen(store: Store, request_: Request, statement: str) -> None:
    kept(store, claimed(store, request_))
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql(statement).all() == []
