"""OpenTelemetry traces of requests and tasks: what waited for what, and nothing where no collector is set.

The libraries are imported by `begin`: until then a span costs a check of a variable. A span has no body, no
query, no parameter of a statement, and no message of an error: its type alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, Literal

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | int | float | bool | None
Attributes = Mapping[str, Value]

# What is left at the end is sent within this time or not at all: a collector that is down delays no exit.
SHUTDOWN_SECONDS = 2.0

_PROVIDER: Any = None
_TRACER: Any = None


def begin(endpoint: str, service: str) -> None:
    """From now on send spans to this collector, by OTLP over HTTP, in a thread of their own; once in a process."""
    global _PROVIDER, _TRACER
    if is_on():
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = {"service.name": service, "service.version": version("billing-control-plane")}
    # The environment's OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER are read by the library.
    # `end` does it instead: at exit the library would go on trying for half a minute.
    _PROVIDER = TracerProvider(resource=Resource.create(ours), shutdown_on_exit=False)
    _PROVIDER.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")))
    _TRACER = _PROVIDER.get_tracer("billing")


def end() -> None:
    """Send the spans that are left, if that can be done soon, and none after them."""
    if _PROVIDER is None:
        return
    # A daemon, as the library's own thread is: neither keeps the process from ending.
    last = threading.Thread(target=_PROVIDER.shutdown, name="last-spans", daemon=True)
    last.start()
    last.join(SHUTDOWN_SECONDS)


def is_on() -> bool:
    """Whether spans are recorded."""
    return _TRACER is not None


class NoSpan:
    """What a block gets when nothing is traced."""

    def rename(self, name: str) -> None: ...

    def set_attributes(self, attributes: Attributes) -> None: ...

    def fail(self, kind: str) -> None: ...


class Span:
    """A span that is being recorded."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def rename(self, name: str) -> None:
        """Give it the name that is known only now."""
        self._span.update_name(name)

    def set_attributes(self, attributes: Attributes) -> None:
        """Add what is known only now."""
        self._span.set_attributes(_known(attributes))

    def fail(self, kind: str) -> None:
        """Mark it as failed, with this as its `error.type`."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", kind)
        self._span.set_status(StatusCode.ERROR)


_NO_SPAN = nullcontext(NoSpan())


def span(
    name: str, kind: Kind = "internal", attributes: Mapping[str, Value] = {}, *, parent: str | None = None
) -> AbstractContextManager[Span | NoSpan]:
    """A span for the length of a block; its parent is the current one, or the `traceparent` given.

    The names of attributes are OpenTelemetry's, or begin with `billing.`; one that is None is left out.
    """
    return _NO_SPAN if _TRACER is None else _recorded(name, kind, parent, attributes)


@contextmanager
def _recorded(name: str, kind: Kind, parent: str | None, attributes: Attributes) -> Iterator[Span]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _TRACER.start_as_current_span(
        name,
        context=context,
        kind=SpanKind[kind.upper()],
        attributes=_known(attributes),
        # The library would record the error's message and its traceback.
        record_exception=False,
        set_status_on_exception=False,
    ) as recorded:
        ours = Span(recorded)
        try:
            yield ours
        except BaseException as error:
            ours.fail(type(error).__name__)
            raise


def _known(attributes: Attributes) -> Attributes:
    return {name: value for name, value in attributes.items() if value is not None}


def headers() -> dict[str, str]:
    """The `traceparent` of the current span, for outbound calls; nothing where nothing is traced."""
    if _TRACER is None:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carried: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carried)
    return carried
