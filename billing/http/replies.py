"""What a handler answers, before it becomes bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from starlette.responses import Response

JSON = orjson.OPT_UTC_Z


@dataclass(frozen=True)
class Reply:
    """A status, a JSON body and more headers."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    def with_header(self, name: str, value: str) -> Reply:
        """The same reply with one more header."""
        return replace(self, headers={**self.headers, name: value})

    def response(self) -> Response:
        """The bytes. Nothing that this API answers is for a cache to keep."""
        return Response(
            orjson.dumps(self.body, option=JSON),
            status_code=self.status,
            headers={"cache-control": "no-store", **self.headers},
            media_type="application/json",
        )


def ok(body: Mapping[str, Any]) -> Reply:
    """200."""
    return Reply(200, body)


def created(body: Mapping[str, Any]) -> Reply:
    """201."""
    return Reply(201, body)
