"""Our guard, errors, security, validation and pages around Connexion's routing, and a way past it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import connexion
import structlog
from connexion.exceptions import ProblemException
from connexion.lifecycle import ConnexionRequest, ConnexionResponse
from connexion.middleware import ConnexionMiddleware, MiddlewarePosition
from connexion.middleware.server_error import ServerErrorMiddleware
from connexion.options import SwaggerUIOptions
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from billing import crashes, errors
from billing.errors import BillingError
from billing.http import problems
from billing.http.access import Access, AuthorizationMiddleware, LimitMiddleware, security_map
from billing.http.cors import Cors
from billing.http.deadlines import Deadline
from billing.http.document import Operation, operations
from billing.http.edge import Edge
from billing.http.guard import Guard
from billing.http.lanes import Lanes
from billing.http.limits import Limits
from billing.http.operations import Operations, compile_all
from billing.http.pages import beside
from billing.http.validation import Rules, as_json_schema, validator_map
from billing.http.wiring import ByOperationId, endpoints
from billing.security import Authenticator
from billing.settings import Network

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")

# Without ServerErrorMiddleware, which answers in text/plain when an error handler fails: the edge does that.
MIDDLEWARES = [m for m in ConnexionMiddleware.default_middlewares if m is not ServerErrorMiddleware]

# Our errors for those that Connexion and Starlette raise: their messages repeat what the client sent.
BY_STATUS: dict[int, type[BillingError]] = {
    400: errors.InvalidRequest,
    401: errors.CredentialsMissing,
    403: errors.InsufficientScope,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    413: errors.PayloadTooLarge,
    415: errors.UnsupportedMediaType,
}


def build(
    document: dict[str, Any],
    *,
    services: Mapping[str, object],
    authenticator: Authenticator,
    routes: list[Route],
    lifespan: Callable[..., Any],
    lanes: Lanes,
    allowed_origins: Collection[str],
    trusted_proxies: Sequence[Network],
    timeout_seconds: float,
    limits: Limits,
    https_only: bool,
    compiled: bool = True,
) -> Edge:
    """Build the whole ASGI application; raises at once for a fault in the document or a handler."""
    listed = operations(document)
    by_id = {o.operation_id: o for o in listed}
    components = as_json_schema(document.get("components", {}))
    rules = {o.operation_id: Rules(components, o) for o in listed}
    handling = endpoints(listed, services, lanes)
    counted = {o.operation_id: limits.excusing_repeats(o, handling[o.operation_id]) for o in listed}
    answering = {o.operation_id: limits.throttled(o, counted[o.operation_id]) for o in listed}
    access = Access(authenticator, limits)
    app = connexion.AsyncApp(
        "billing",
        lifespan=lifespan,
        middlewares=[*MIDDLEWARES],  # Connexion adds ours to the list itself.
        swagger_ui_options=SwaggerUIOptions(swagger_ui=False, serve_spec=False),
        resolver=ByOperationId(listed, answering),
        validator_map=validator_map(rules),
        security_map=security_map(access),
    )
    app.add_middleware(Guard, position=MiddlewarePosition.BEFORE_SWAGGER)
    app.add_middleware(beside, position=MiddlewarePosition.BEFORE_ROUTING, routes=routes)
    for kind, position in (
        (LimitMiddleware, MiddlewarePosition.BEFORE_SECURITY),
        (AuthorizationMiddleware, MiddlewarePosition.BEFORE_VALIDATION),
    ):
        app.add_middleware(kind, position=position, operations=by_id, limits=limits)
    for error in (BillingError, ProblemException, HTTPException, Exception):
        app.add_error_handler(error, answer_with(allowed_methods(listed)))
    app.add_api(document)
    start(app)
    runs = (
        compile_all(listed, access=access, limits=limits, rules=rules, endpoints=answering)
        if compiled
        else {}
    )
    in_time = Deadline(Operations(app, runs), seconds=timeout_seconds)
    return Edge(Cors(in_time, allowed_origins), trusted_proxies=trusted_proxies, https_only=https_only)


def start(app: connexion.AsyncApp) -> None:
    """Build the middleware stack now, so that a broken document stops the start and not the first request."""
    build_stack = app.middleware._build_middleware_stack  # noqa: SLF001  # what its first request would call
    app.middleware.app, app.middleware.middleware_stack = build_stack()
    for layer in app.middleware.middleware_stack:
        keep_slashes(getattr(layer, "router", None))


def keep_slashes(router: object) -> None:
    """Disable redirects for a missing slash: their Location is made from the Host header."""
    if isinstance(router, Router):
        router.redirect_slashes = False
        for route in router.routes:
            keep_slashes(getattr(route, "app", None))


def allowed_methods(listed: Sequence[Operation]) -> dict[str, str]:
    """The value of `Allow` by path; GET implies HEAD, except where the document excludes it."""
    by_path: dict[str, set[str]] = {}
    for operation in listed:
        has_head = operation.method == "GET" and not operation.no_head
        methods = {operation.method, "HEAD"} if has_head else {operation.method}
        by_path.setdefault(operation.path, set()).update(methods)
    return {path: ", ".join(sorted(methods)) for path, methods in by_path.items()}


def answer_with(allow: Mapping[str, str]) -> Callable[..., Any]:
    """Make the handler of every error."""

    async def answer(request: ConnexionRequest, error: Exception) -> ConnexionResponse:
        ours = as_billing_error(error)
        rendered = problems.answer_to(ours, request.scope)
        headers = {name.decode(): value.decode() for name, value in rendered.headers}
        if isinstance(ours, errors.MethodNotAllowed):
            headers["allow"] = allow.get(request.scope["path"]) or allow_of(error)
        return ConnexionResponse(
            rendered.status, body=rendered.body, headers=headers, mimetype=problems.MEDIA_TYPE
        )

    return answer


def allow_of(error: Exception) -> str:
    """The methods allowed by the router that refused this one: the pages' own."""
    headers = getattr(error, "headers", None) or {}
    return str(headers.get("Allow", "GET, HEAD"))


def as_billing_error(error: Exception) -> BillingError:
    """The error as one of ours; an unexpected one is logged and reported, and becomes an internal error."""
    if isinstance(error, BillingError):
        return error
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    if isinstance(error, ProblemException | HTTPException) and status in BY_STATUS:
        return BY_STATUS[status]()
    log.error("unexpected error", exc_info=error)
    crashes.report(error)
    return errors.InternalError()
