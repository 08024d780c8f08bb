"""Wiring: what is missing is found at startup; a handler receives exactly what it declares."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from connexion.context import _scope
from starlette.responses import Response
from starlette.types import Scope

from billing.actors import Actor
from billing.errors import MethodNotAllowed
from billing.http import wiring
from billing.http.document import Operation, load, operations
from billing.http.idempotency import HEADER, Idempotency
from billing.http.lanes import Lane, Lanes, runs_in
from billing.http.replies import Rendered, Reply, created, ok
from billing.http.wiring import WiringError, endpoints, handler_of
from billing.ids import new_id
from billing.keys import ApiKey
from billing.security import Caller
from tests.test_tenants import ACME, ADA

NOW = datetime(2026, 1, 15, 9, 30, 59, 999999, tzinfo=UTC)
KEY = ApiKey(ACME.id, new_id(), "live_secret", None, "abcd", NOW)
Handler = Callable[..., Reply]


def operation(operation_id: str, tag: str = "Test Things", **more: Any) -> Operation:
    base = Operation(operation_id, "GET", "/things/", (tag,), (), (), (), False, None, False)
    return replace(base, **more)


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the tag "Test Things"."""
    module = ModuleType("billing.handlers.test_things")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def wired(
    handlers: ModuleType,
    handler: Handler,
    *,
    query: tuple[str, ...] = (),
    headers: tuple[str, ...] = (),
    **services: object,
) -> Any:
    handlers.get_thing = handler  # type: ignore[attr-defined]
    query_parameters = tuple({"name": name} for name in query)
    header_parameters = tuple({"name": name} for name in headers)
    listed = [operation("get_thing", query=query_parameters, headers=header_parameters)]
    return endpoints(listed, services, Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: 1}))["get_thing"]


def ask(endpoint: Callable[..., Any], **state: Any) -> Response:
    async def scenario() -> Response:
        rendered: Rendered = await endpoint({"type": "http", "headers": [], "state": {"query": {}, **state}})
        return rendered.response()

    return asyncio.run(scenario())


# Startup -----------------------------------------------------------------------------------------


def test_every_operation_of_the_document_has_its_handler() -> None:
    for each in operations(load()):
        assert handler_of(each).__name__ == each.operation_id


@pytest.mark.parametrize(
    ("missing", "module"),
    [
        (operation("list_api_key", "API keys"), "billing.handlers.api_keys"),
        (operation("list_api_keys", "Invoices"), "billing.handlers.invoices"),
        (operation("list_api_keys", "Authentication"), "billing.handlers.authentication"),
    ],
)
def test_a_missing_handler_prevents_startup(missing: Operation, module: str) -> None:
    with pytest.raises(WiringError, match=f"{missing.operation_id} has no handler in {module}"):
        endpoints([missing], {}, Lanes({Lane.GENERAL: 1, Lane.PASSWORDS: 1}))


def test_an_unknown_handler_parameter_prevents_startup(handlers: ModuleType) -> None:
    def handler(*, caller: Caller, zebra: object, gateway: object) -> Reply:
        raise AssertionError

    with pytest.raises(WiringError, match="get_thing asks for: gateway, zebra"):
        wired(handlers, handler)
    wired(handlers, handler, gateway=1, query=("zebra",))


def test_handlers_declare_once_exactly_if_they_accept_an_idempotency_key(handlers: ModuleType) -> None:
    keeps = Idempotency(None, lambda: NOW)  # type: ignore[arg-type]

    def asks(*, once: object) -> Reply:
        raise AssertionError

    for handler, headers in ((asks, ()), (lambda: ok({}), (HEADER,))):
        with pytest.raises(WiringError, match="get_thing must ask for `once`"):
            wired(handlers, handler, headers=headers, idempotency=keeps)
    with pytest.raises(WiringError, match="Nobody keeps the answers"):
        wired(handlers, asks, headers=(HEADER,))
    wired(handlers, asks, headers=(HEADER,), idempotency=keeps)


# A request ---------------------------------------------------------------------------------------


def test_a_handler_receives_exactly_the_parameters_it_declares(handlers: ModuleType) -> None:
    got: dict[str, object] = {}

    def handler(body: Any, *, caller: Any, actor: Any, code: Any, state: Any, store: Any) -> Reply:
        got.update(locals())
        return ok({})

    caller = Caller(ACME, user=ADA)
    endpoint = wired(handlers, handler, query=("code", "state", "unused"), store="a store", clock="a clock")
    ask(
        endpoint,
        body={"a": 1},
        caller=caller,
        query={"code": "x", "unused": "y"},
        client_address="192.0.2.1",
        request_id="request-1",
    )
    del got["got"]
    assert got == {
        "body": {"a": 1},
        "caller": caller,
        "actor": Actor("user", ADA.id, "192.0.2.1", "request-1"),
        "code": "x",
        "state": None,
        "store": "a store",
    }


@pytest.mark.parametrize(
    ("caller", "kind", "id"),
    [
        (None, "anonymous", None),
        (Caller(ACME, user=ADA), "user", ADA.id),
        (Caller(ACME, key=KEY), "api_key", KEY.id),
    ],
)
def test_the_actor_is_derived_from_the_caller(
    handlers: ModuleType, caller: Caller | None, kind: str, id: object
) -> None:
    actors: list[Actor] = []
    endpoint = wired(handlers, lambda actor: actors.append(actor) or ok({}))
    ask(endpoint, caller=caller)
    assert [(actor.kind, actor.id) for actor in actors] == [(kind, id)]


def test_the_caller_of_a_public_operation_is_none(handlers: ModuleType) -> None:
    callers: list[object] = []
    ask(wired(handlers, lambda caller, body: callers.extend([caller, body]) or ok({})))
    assert callers == [None, None]


def test_a_reply_becomes_a_json_response_with_no_store(handlers: ModuleType) -> None:
    at = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
    response = ask(wired(handlers, lambda: created({"id": ACME.id, "at": at}).with_header("x-a", "b")))
    assert response.status_code == 201
    assert response.body == f'{{"id":"{ACME.id}","at":"2026-01-15T09:30:00Z"}}'.encode()
    assert response.headers["content-type"] == "application/json"
    assert (response.headers["cache-control"], response.headers["x-a"]) == ("no-store", "b")


def test_a_handler_runs_in_its_lane(handlers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[Lane] = []
    real = Lanes.run

    def run(self: Lanes, lane: Lane, call: Any, **whose: Any) -> Any:
        lanes.append(lane)
        return real(self, lane, call, **whose)

    monkeypatch.setattr(Lanes, "run", run)
    ask(wired(handlers, lambda store: ok({}), store="a store"))
    ask(wired(handlers, runs_in(Lane.PASSWORDS)(lambda: ok({}))))
    assert lanes == [Lane.GENERAL, Lane.PASSWORDS]


def test_a_handler_without_services_runs_on_the_event_loop(handlers: ModuleType) -> None:
    threads: list[threading.Thread] = []
    ask(wired(handlers, lambda: threads.append(threading.current_thread()) or ok({})))
    assert threads == [threading.current_thread()]


# X-Key-Expires-At --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (None, None),
        (Caller(ACME, user=ADA), None),
        (Caller(ACME, key=KEY), None),
        (Caller(ACME, key=replace(KEY, expires_at=NOW)), "2026-01-15T09:30:59Z"),
        (Caller(ACME, key=replace(KEY, expires_at=NOW + timedelta(days=7))), "2026-01-22T09:30:59Z"),
    ],
)
def test_a_key_in_its_grace_period_reports_its_expiry(
    handlers: ModuleType, caller: Caller | None, expected: str | None
) -> None:
    response = ask(wired(handlers, lambda: ok({})), caller=caller)
    assert response.headers.get("x-key-expires-at") == expected


def test_connexion_resolves_operations_to_our_endpoints(handlers: ModuleType) -> None:
    listed = [operation("get_thing", no_head=True)]

    async def endpoint(_: Scope) -> Rendered:
        return ok({}).rendered()

    resolution = wiring.ByOperationId(listed, {"get_thing": endpoint}).resolve(listed[0])

    async def ask_by(method: str) -> Response:
        _scope.set({"type": "http", "method": method})
        response: Response = await resolution.function()
        return response

    assert asyncio.run(ask_by("GET")).body == b"{}"
    with pytest.raises(MethodNotAllowed):
        asyncio.run(ask_by("HEAD"))
