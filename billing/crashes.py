"""Unexpected errors, reported to Sentry without any client's data; its library is imported only with a DSN.

Sent are the type of each error in the chain and where in the code it was raised. No message: a driver's
quotes rows, ours may quote anything. No local variable, no request, no header, no breadcrumb, no user.
"""

from __future__ import annotations

import atexit
from importlib.metadata import version
from typing import Any

import structlog

from billing.logs import redact

# A worker that ends because of an error still reports it.
SHUTDOWN_SECONDS = 2.0
# All that an event may contain: anything else is not sent, whatever the library comes to collect.
KEPT = frozenset(
    {"event_id", "timestamp", "platform", "level", "release", "environment", "exception", "tags", "sdk"}
)
TAGS = frozenset({"request_id", "operation_id", "tenant_id", "task", "task_id"})
FRAME = frozenset({"filename", "function", "module", "lineno", "in_app"})

_IS_ON = False


def begin(dsn: str, environment: str) -> None:
    """From now on send what `report` is given to this DSN; once in a process."""
    global _IS_ON
    if is_on():
        return
    import sentry_sdk

    atexit.register(sentry_sdk.flush, timeout=SHUTDOWN_SECONDS)
    sentry_sdk.init(
        dsn=dsn,
        environment=environment,
        release=version("billing-control-plane"),
        # None of the library's own integrations: it would read our log, and hook into whatever is installed.
        default_integrations=False,
        auto_enabling_integrations=False,
        include_local_variables=False,
        include_source_context=False,
        send_default_pii=False,
        max_breadcrumbs=0,
        max_request_body_size="never",
        auto_session_tracking=False,
        send_client_reports=False,
        traces_sample_rate=None,
        server_name="",
        before_send=scrubbed,
    )
    _IS_ON = True


def is_on() -> bool:
    """Whether errors are reported."""
    return _IS_ON


def report(error: BaseException, **tags: str) -> None:
    """Report an unexpected error, with its request or task as tags; does nothing where reporting is off."""
    if not is_on():
        return
    import sentry_sdk

    with sentry_sdk.new_scope() as scope:
        for name, value in {**structlog.contextvars.get_contextvars(), **tags}.items():
            scope.set_tag(name, redact(str(value)))
        scope.capture_exception(error)


def scrubbed(event: Any, _hint: dict[str, Any]) -> Any:
    """The event with nothing in it but what is listed above."""
    kept = {name: value for name, value in event.items() if name in KEPT}
    kept["tags"] = {name: value for name, value in (event.get("tags") or {}).items() if name in TAGS}
    errors = (event.get("exception") or {}).get("values") or []
    kept["exception"] = {"values": [_bare(error) for error in errors]}
    return kept


def _bare(error: dict[str, Any]) -> dict[str, Any]:
    frames = (error.get("stacktrace") or {}).get("frames") or []
    bare = {name: error[name] for name in ("type", "module") if error.get(name)}
    bare["stacktrace"] = {"frames": [{k: v for k, v in frame.items() if k in FRAME} for frame in frames]}
    return bare
