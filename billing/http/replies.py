"""A handler's reply, and the bytes that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Send

from billing.http.templates import HTML_HEADERS, new_environment

JSON = orjson.OPT_UTC_Z
NO_STORE = (b"cache-control", b"no-store")
IN_JSON = (b"content-type", b"application/json")
HTML = (b"content-type", b"text/html; charset=utf-8")
PAGE = new_environment().get_template("callback.html")


@dataclass(frozen=True)
class Rendered:
    """An answer in bytes, as ASGI sends it, and the error's code if it reports one."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    problem: str | None = None

    async def send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})

    def response(self) -> Response:
        """The same as a Starlette response."""
        response = Response(self.body, self.status)
        response.raw_headers = self.headers
        return response


@dataclass(frozen=True)
class Reply:
    """A status, a JSON body's members or a page's text, further headers, and the code of an error, if any."""

    status: int
    body: Mapping[str, Any] | str
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    def with_header(self, name: str, value: str) -> Reply:
        """The same reply with one more header."""
        return replace(self, headers={**self.headers, name: value})

    def refusing(self, problem: str) -> Reply:
        """The same reply, marked as a refusal: log and metrics get its code, as for any problem."""
        return replace(self, problem=problem)

    def rendered(self) -> Rendered:
        """The reply in bytes. No cache may store an answer of this API."""
        is_page = isinstance(self.body, str)
        body = self.body.encode() if isinstance(self.body, str) else orjson.dumps(self.body, option=JSON)
        headers = [NO_STORE, (b"content-length", b"%d" % len(body))]
        if body:
            headers.append(HTML if is_page else IN_JSON)
        headers.extend(
            (name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()
        )
        return Rendered(self.status, headers, body, self.problem)


def ok(body: Mapping[str, Any]) -> Reply:
    """200."""
    return Reply(200, body)


def created(body: Mapping[str, Any]) -> Reply:
    """201."""
    return Reply(201, body)


def see_other(url: str) -> Reply:
    """303: the browser loads this URL next."""
    return Reply(303, "", {"location": url})


def page(title: str, text: str, *, status: int = 200) -> Reply:
    """A small page for the person at the browser."""
    return Reply(status, PAGE.render(title=title, text=text), HTML_HEADERS)
