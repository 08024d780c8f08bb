"""From the document to handlers: each operationId names a function, called with what its signature names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import connexion
from connexion.resolver import Resolution, Resolver
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from billing.actors import Actor
from billing.errors import MethodNotAllowed
from billing.http.browsers import browser_of
from billing.http.document import Operation
from billing.http.idempotency import HEADER, Idempotency
from billing.http.lanes import Lanes, lane_of
from billing.http.replies import Rendered, Reply
from billing.security import Caller

HANDLERS = "billing.handlers"
# The parameter of the handlers whose operations take an Idempotency-Key by the document, and of no others.
ONCE = "once"

Endpoint = Callable[[Scope], Awaitable[Rendered]]


class WiringError(Exception):
    """An operation has no handler, or its handler has a parameter that nothing provides."""


def endpoints(
    operations: Sequence[Operation], services: Mapping[str, object], lanes: Lanes
) -> dict[str, Endpoint]:
    """The endpoint of each operation; raises `WiringError` at start rather than at the first request."""
    return {o.operation_id: _endpoint(o, handler_of(o), services, lanes) for o in operations}


def handler_of(operation: Operation) -> Callable[..., Reply]:
    """The function named after the operation, in the module named after its first tag."""
    name = f"{HANDLERS}.{operation.tags[0].lower().replace(' ', '_')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # The module exists, but one that it imports does not.
        module = None
    handler: Callable[..., Reply] | None = getattr(module, operation.operation_id, None)
    if handler is None:
        raise WiringError(f"The operation {operation.operation_id} has no handler in {name}.")
    return handler


def _endpoint(
    operation: Operation, handler: Callable[..., Reply], services: Mapping[str, object], lanes: Lanes
) -> Endpoint:
    wanted = inspect.signature(handler).parameters.keys()
    from_services = {name: services[name] for name in wanted & services.keys()}
    from_request = wanted - services.keys() - {ONCE}
    from_query = {parameter["name"] for parameter in operation.query}
    if missing := from_request - OF_THE_REQUEST.keys() - from_query:
        raise WiringError(f"Nobody has what {operation.operation_id} asks for: {', '.join(sorted(missing))}.")
    if takes_key(operation) != (ONCE in wanted):
        raise WiringError(f"{operation.operation_id} must ask for `once` if, and only if, it takes {HEADER}.")
    handled = _idempotency_of(services).answer if ONCE in wanted else _answer
    lane = lane_of(handler, waits=bool(from_services))
    parts = [(name, OF_THE_REQUEST.get(name) or in_query(name)) for name in from_request]

    async def endpoint(scope: Scope) -> Rendered:
        given = {name: part(scope) for name, part in parts}
        call = partial(handled, scope, partial(handler, **from_services, **given))
        # A handler that takes no service never blocks, and needs no thread.
        answer = (
            call() if lane is None else await lanes.run(lane, call, whose=scope["state"].get("tenant_id"))
        )
        if answer.problem is not None:
            scope["state"]["problem"] = answer.problem
        return answer

    return endpoint


def _answer(scope: Scope, handle: Callable[..., Reply]) -> Rendered:
    return _with_key_expiry(handle(), caller_of(scope)).rendered()


def _idempotency_of(services: Mapping[str, object]) -> Idempotency:
    found = services.get("idempotency")
    if not isinstance(found, Idempotency):
        raise WiringError(f"Nobody keeps the answers of operations that take {HEADER}.")
    return found


def takes_key(operation: Operation) -> bool:
    """Whether the document says that the operation takes an Idempotency-Key."""
    return any(parameter["name"] == HEADER for parameter in operation.headers)


def in_query(name: str) -> Callable[[Scope], object]:
    """A function that reads this query parameter from a request."""
    return lambda scope: scope["state"]["query"].get(name)


def caller_of(scope: Scope) -> Caller | None:
    """The authenticated caller, None where the operation is public."""
    caller: Caller | None = scope["state"].get("caller")
    return caller


def actor_of(scope: Scope) -> Actor:
    """Who acts in this request, as the audit log keeps them."""
    state = scope["state"]
    address, request_id = state.get("client_address"), state.get("request_id")
    caller = caller_of(scope)
    return caller.actor(address, request_id) if caller else Actor("anonymous", None, address, request_id)


# Parameters that a handler may have beside services and query, and what reads each from a request.
OF_THE_REQUEST: Mapping[str, Callable[[Scope], object]] = {
    "body": lambda scope: scope["state"].get("body"),
    "caller": caller_of,
    "actor": actor_of,
    "browser": lambda scope: browser_of(Headers(scope=scope)),
}


def _with_key_expiry(reply: Reply, caller: Caller | None) -> Reply:
    # Every answer to a key in its grace period says so: its holder may not read the list of keys.
    if caller is None or caller.key is None or caller.key.expires_at is None:
        return reply
    return reply.with_header("x-key-expires-at", caller.key.expires_at.strftime("%Y-%m-%dT%H:%M:%SZ"))


class ByOperationId(Resolver):  # type: ignore[misc]  # Connexion has no types
    """Gives Connexion our endpoints, so that the document names no Python path."""

    def __init__(self, operations: Sequence[Operation], endpoints: Mapping[str, Endpoint]) -> None:
        super().__init__()
        self._functions = {o.operation_id: _for_connexion(o, endpoints[o.operation_id]) for o in operations}

    def resolve(self, operation: Any) -> Resolution:
        return Resolution(self._functions[operation.operation_id], operation.operation_id)


def _for_connexion(operation: Operation, endpoint: Endpoint) -> Callable[[], Awaitable[Response]]:
    async def function() -> Response:
        scope = connexion.context.scope
        if operation.no_head and scope["method"] == "HEAD":
            raise MethodNotAllowed
        return (await endpoint(scope)).response()

    return function
