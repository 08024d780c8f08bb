"""The callers as whom the API is fuzzed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Caller:
    """The security scheme that a caller uses, and its headers, made from the answer of `register_tenant`."""

    scheme: str | None
    credentials: Callable[[dict[str, Any]], dict[str, str]]


CALLERS = {
    "owner": Caller("bearerAuth", lambda answer: {"Authorization": f"Bearer {answer['tokens']['access']}"}),
    "secret_key": Caller("apiKeyAuth", lambda answer: {"X-API-Key": answer["tenant"]["api_key_secret"]}),
    "publishable_key": Caller("apiKeyAuth", lambda answer: {"X-API-Key": answer["tenant"]["api_key_public"]}),
    "nobody": Caller(None, lambda _: {}),
}
