"""What a handler answers, before it becomes bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from starlette.responses import Response

from billing.http.templates import HTML_HEADERS, new_environment

JSON = orjson.OPT_UTC_Z
PAGE = new_environment().get_template("callback.html")


@dataclass(frozen=True)
class Reply:
    """A status, the members of a JSON body or the text of a page, and more headers."""

    status: int
    body: Mapping[str, Any] | str
    headers: Mapping[str, str] = field(default_factory=dict)

    def with_header(self, name: str, value: str) -> Reply:
        """The same reply with one more header."""
        return replace(self, headers={**self.headers, name: value})

    def response(self) -> Response:
        """The bytes. Nothing that this API answers is for a cache to keep."""
        headers = {"cache-control": "no-store", **self.headers}
        if not isinstance(self.body, str):
            return Response(orjson.dumps(self.body, option=JSON), self.status, headers, "application/json")
        return Response(self.body, self.status, headers, "text/html" if self.body else None)


def ok(body: Mapping[str, Any]) -> Reply:
    """200."""
    return Reply(200, body)


def created(body: Mapping[str, Any]) -> Reply:
    """201."""
    return Reply(201, body)


def see_other(url: str) -> Reply:
    """303: a browser goes there next."""
    return Reply(303, "", {"location": url})


def page(title: str, text: str, *, status: int = 200) -> Reply:
    """A small page for the person at the browser."""
    return Reply(status, PAGE.render(title=title, text=text), HTML_HEADERS)
