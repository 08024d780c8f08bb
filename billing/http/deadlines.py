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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_watching = False
        # In the order of their deadlines, as all have the same allowance: only the first need be checked.
        self._expected: dict[PendingAnswer, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._expect(send)
        try:
            await self.app(scope, receive, answer.send)
            return
        except asyncio.CancelledError:
            # Past its deadline; or cancelled by a server done draining, whose client is owed an answer too.
            if answer.has_begun:
                raise
        finally:
            self._expected.pop(answer, None)
        answer.settle()
        log.warning(errors.DeadlineExceeded.code())
        await send_error(send, scope, errors.DeadlineExceeded())

    def _expect(self, send: Send) -> PendingAnswer:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._is_watching, self._expected = loop, False, {}
        answer = PendingAnswer(send)
        self._expected[answer] = due = loop.time() + self.seconds
        if not self._is_watching:
            self._is_watching = True
            loop.call_at(due, self._cancel_overdue, loop)
        return answer

    def _cancel_overdue(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel what is overdue, and check again at the next deadline: one timer is cheaper than many."""
        self._is_watching = False
        for answer, due in list(self._expected.items()):
            if due > loop.time():
                self._is_watching = True
                loop.call_at(due, self._cancel_overdue, loop)
                return
            self._expected.pop(answer)
            answer.cancel()


class PendingAnswer:
    """An answer on its way, and the task that makes it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._task = asyncio.current_task()
        self.has_begun = False
        self._is_late = False

    async def send(self, message: Message) -> None:
        self.has_begun = True
        await self._send(message)

    def cancel(self) -> None:
        """Cancel the task, unless the answer has begun: then its client may read as slowly as it likes."""
        if self._task is not None and not self.has_begun:
            self._is_late = True
            self._task.cancel()

    def settle(self) -> None:
        """Clear the cancellation made by `cancel`: the task goes on, to send the error."""
        if self._task is not None and self._is_late:
            self._task.uncancel()
