"""Each operation as one callable, made at the start: read, admit, validate, call, answer.

It does what Connexion's stack does for an operation, in the same order and with the same parts, without nine
layers that each route, match or copy the request anew (docs/decisions.md). A request for no operation goes on
to that stack. `COMPILED_OPERATIONS=off` sends everything there, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from billing.errors import BillingError
from billing.http import problems
from billing.http.access import Access
from billing.http.document import Operation
from billing.http.guard import Intake
from billing.http.limits import Limits
from billing.http.replies import Rendered
from billing.http.validation import Rules
from billing.http.wiring import Endpoint

# An answer, or None when the client went away.
Run = Callable[[Scope, Receive], Awaitable[Rendered | None]]


class Operations:
    """ASGI middleware in front of Connexion's stack: runs the operation of exactly this method and path."""

    def __init__(self, app: ASGIApp, runs: Mapping[tuple[str, str], Run]) -> None:
        self.app = app
        self.runs = runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self.runs.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if run is None:
            await self.app(scope, receive, send)
            return
        try:
            answer = await run(scope, receive)
        except BillingError as error:
            answer = problems.answer_to(error, scope)
        if answer is not None:
            await answer.send(send)


def compile_all(
    operations: Sequence[Operation],
    *,
    access: Access,
    limits: Limits,
    rules: Mapping[str, Rules],
    endpoints: Mapping[str, Endpoint],
) -> dict[tuple[str, str], Run]:
    """The callable of each operation, by its method and path."""
    intake = Intake()
    return {
        (o.method, o.path): _run(o, intake, limits, access, rules[o.operation_id], endpoints[o.operation_id])
        for o in operations
    }


def _run(
    operation: Operation, intake: Intake, limits: Limits, access: Access, rules: Rules, endpoint: Endpoint
) -> Run:
    async def run(scope: Scope, receive: Receive) -> Rendered | None:
        state = scope["state"]
        state["operation_id"] = operation.operation_id
        body = await intake.take(scope, receive)
        if body is None:
            return None
        await limits.admit(scope, operation)
        if operation.schemes:
            await access.admit(scope, operation)
        state["query"] = rules.query(scope["query_string"])
        state["headers"] = rules.headers(scope["headers"])
        state["body"] = rules.body(body) if operation.request else None
        return await endpoint(scope)

    return run
