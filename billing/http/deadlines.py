"""A deadline for each request: the client is answered in time, whatever hangs."""

from __future__ import annotations

import asyncio

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing import errors
from billing.http.edge import send_error

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


class Deadline:
    """ASGI middleware that answers in place of an application that has not begun its answer in time.

    A hanging thread cannot be ended from here. It keeps its place in its lane until a watchdog, of storage or
    of outbound calls, frees it.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def send_in_time(message: Message) -> None:
            # Once the answer has begun its client may read as slowly as it likes.
            nonlocal has_begun
            if not has_begun and not deadline.expired():
                deadline.reschedule(None)
            has_begun = True
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as deadline:
                await self.app(scope, receive, send_in_time)
            return
        except TimeoutError:
            if not deadline.expired():  # The application's own.
                raise
        except asyncio.CancelledError:
            # By a server done draining, whose client is owed an answer too.
            if has_begun:
                raise
        log.warning(errors.DeadlineExceeded.code())
        if not has_begun:
            await send_error(send, scope, errors.DeadlineExceeded())
