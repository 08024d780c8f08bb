"""Scripted faults of Stripe."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from enum import Enum, StrEnum, auto
from http import HTTPStatus
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio
import orjson
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

POLL_SECONDS = 0.02


class Operation(StrEnum):
    """The operations that can be called, and so can fail."""

    AUTHORIZE = "authorize"  # the page is opened
    DECIDE = "decide"  # its form is sent: connect, or decline
    TOKEN = "token"  # noqa: S105
    DEAUTHORIZE = "deauthorize"
    RETRIEVE_ACCOUNT = "retrieve_account"
    CREATE_ACCOUNT = "create_account"
    CREATE_ACCOUNT_LINK = "create_account_link"
    ONBOARD = "onboard"  # the page of an account link is opened
    RETURN = "return"  # its form is sent: finish, or leave


class Fault(Enum):
    """What happens instead of the proper answer, or to it."""

    HANG = auto()  # the call is not carried out, and not answered
    HANG_AFTER = auto()  # the call is carried out, and not answered
    SERVER_ERROR = auto()
    BAD_GATEWAY = auto()  # in HTML
    RATE_LIMIT = auto()
    EMPTY = auto()  # 200, and no body
    DRIP = auto()  # the proper answer, a byte at a time, so that no read times out
    UNKNOWN_OAUTH_ERROR = auto()
    WRONG_LIVEMODE = auto()
    READ_ONLY = auto()
    MALFORMED_ACCOUNT = auto()
    BARE_ACCOUNT = auto()  # no more than the schema requires
    NO_STATE = auto()


PAGES = {Operation.AUTHORIZE, Operation.DECIDE, Operation.ONBOARD, Operation.RETURN}
# Faults that apply to some operations only; the others apply to all.
ONLY = {
    Fault.DRIP: set(Operation) - PAGES,
    Fault.UNKNOWN_OAUTH_ERROR: {Operation.TOKEN, Operation.DEAUTHORIZE},
    Fault.WRONG_LIVEMODE: {Operation.TOKEN},
    Fault.READ_ONLY: {Operation.TOKEN},
    Fault.MALFORMED_ACCOUNT: {Operation.TOKEN},
    Fault.BARE_ACCOUNT: {Operation.RETRIEVE_ACCOUNT, Operation.CREATE_ACCOUNT},
    Fault.NO_STATE: {Operation.DECIDE},
}

INSTEAD: dict[Fault, Callable[[], Response]] = {
    Fault.SERVER_ERROR: lambda: _error(500, type="api_error", message="An unknown error occurred"),
    Fault.BAD_GATEWAY: lambda: _page(HTTPStatus.BAD_GATEWAY),
    Fault.RATE_LIMIT: lambda: _error(
        429, type="invalid_request_error", code="rate_limit", message="Request rate limit exceeded."
    ),
    Fault.EMPTY: lambda: Response(media_type="application/json"),
    Fault.UNKNOWN_OAUTH_ERROR: lambda: JSONResponse(
        {"error": "temporarily_unavailable", "error_description": "Try again later"}, 400
    ),
}

ALTERED: dict[Fault, Callable[[dict[str, Any]], dict[str, Any]]] = {
    Fault.WRONG_LIVEMODE: lambda token: {**token, "livemode": not token["livemode"]},
    Fault.READ_ONLY: lambda token: {**token, "scope": "read_only"},
    Fault.MALFORMED_ACCOUNT: lambda token: {**token, "stripe_user_id": "acct_1/../../v1/charges"},
    Fault.BARE_ACCOUNT: lambda account: {name: account[name] for name in ("id", "object")},
}


class Faults:
    """The script: the faults of each operation's next calls, and of all its calls.

    A hang lasts `hang_seconds` and ends with 504; a dripping answer takes `drip_seconds` per byte.
    """

    def __init__(self) -> None:
        self.clear()
        self.is_closing = False

    def clear(self) -> None:
        self.hang_seconds = 60.0
        self.drip_seconds = 0.25
        self._next: defaultdict[Operation, deque[Fault]] = defaultdict(deque)
        self._always: dict[Operation, Fault] = {}

    def once(self, operation: str, fault: Fault) -> None:
        """Add a fault for the next call that has none yet."""
        self._next[_checked(operation, fault)].append(fault)

    def always(self, operation: str, fault: Fault) -> None:
        """Set the fault of every other call, until `clear`."""
        self._always[_checked(operation, fault)] = fault

    def take(self, operation: Operation) -> Fault | None:
        waiting = self._next[operation]
        return waiting.popleft() if waiting else self._always.get(operation)

    async def play(self, fault: Fault | None, request: Request, proper: Callable[[], Response]) -> Response:
        """Answer with the fault; `proper` carries the call out."""
        if fault is None:
            return proper()
        if fault in INSTEAD:
            return INSTEAD[fault]()
        if fault is Fault.HANG:
            return await self._silence(request)
        return await self._spoil(fault, request, proper())

    async def _spoil(self, fault: Fault, request: Request, response: Response) -> Response:
        if fault is Fault.HANG_AFTER:
            return await self._silence(request)
        if fault is Fault.DRIP:
            return StreamingResponse(
                self._drops(bytes(response.body)), response.status_code, media_type="application/json"
            )
        if fault is Fault.NO_STATE:
            return _without_state(response)
        return response if response.status_code >= 400 else _altered(response, ALTERED[fault])

    async def _silence(self, request: Request) -> Response:
        # In short sleeps, to end soon after the client has given up or the sandbox is closing.
        end = monotonic() + self.hang_seconds
        while monotonic() < end and not self.is_closing and not await request.is_disconnected():
            await anyio.sleep(POLL_SECONDS)
        return _page(HTTPStatus.GATEWAY_TIMEOUT)

    async def _drops(self, body: bytes) -> AsyncIterator[bytes]:
        for byte in body:
            if self.is_closing:
                return
            yield bytes([byte])
            await anyio.sleep(self.drip_seconds)


def _checked(operation: str, fault: Fault) -> Operation:
    # A test with a fault that never happens would prove nothing.
    known = Operation(operation)
    if known not in ONLY.get(fault, Operation):
        raise ValueError(f"{fault.name} cannot befall {known}")
    return known


def _error(status: int, **error: str) -> Response:
    return JSONResponse({"error": error}, status)


def _page(status: HTTPStatus) -> Response:
    return HTMLResponse(f"<html><body><h1>{status} {status.phrase}</h1></body></html>", status)


def _altered(response: Response, alter: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
    return JSONResponse(alter(orjson.loads(response.body)), response.status_code)


def _without_state(response: Response) -> Response:
    if "location" not in response.headers:
        return response
    place, _, query = response.headers["location"].partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if name != "state"]
    response.headers["location"] = f"{place}?{urlencode(kept)}"
    return response
