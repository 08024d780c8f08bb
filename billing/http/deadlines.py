"""A deadline for each request: whoever asks is answered in time, whatever it is that hangs."""

from __future__ import annotations

import asyncio

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing import errors
from billing.http.edge import apologise

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.http")


class Deadline:
    """ASGI middleware that answers for an application which has not begun to answer in time.

    A thread that hangs cannot be ended from here. It keeps its place in its lane until a watchdog, of storage or of
    calls to the outside, sets it free.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        try:
            async with asyncio.timeout(self.seconds) as answer.timeout:
                await self.app(scope, receive, answer.send)
        except TimeoutError:
            if answer.timeout is None or not answer.timeout.expired():
                raise  # An answer has begun, or the error is the application's own.
        except asyncio.CancelledError:
            # A server that drains no longer ends what is in flight, and a client of that is owed an answer too.
            if answer.has_begun:
                raise
        else:
            return
        log.warning(errors.DeadlineExceeded.code())
        await apologise(send, scope, errors.DeadlineExceeded())


class Answer:
    """An answer on its way. Once it has begun, nothing hurries it: its client may read slowly."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.timeout: asyncio.Timeout | None = None

    @property
    def has_begun(self) -> bool:
        return self.timeout is None

    async def send(self, message: Message) -> None:
        timeout, self.timeout = self.timeout, None
        if timeout is not None and not timeout.expired():
            timeout.reschedule(None)
        await self._send(message)
