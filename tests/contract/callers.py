"""Those as whom the API is fuzzed: what each sends, and what the document lets each do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Caller:
    """Somebody who calls: the security scheme, and its headers from what `register_tenant` answered."""

    scheme: str | None
    credentials: Callable[[dict[str, Any]], dict[str, str]]

    @property
    def has_credentials(self) -> bool:
        return self.scheme is not None


CALLERS = {
    "owner": Caller("bearerAuth", lambda answer: {"Authorization": f"Bearer {answer['tokens']['access']}"}),
    "secret_key": Caller("apiKeyAuth", lambda answer: {"X-API-Key": answer["tenant"]["api_key_secret"]}),
    "publishable_key": Caller("apiKeyAuth", lambda answer: {"X-API-Key": answer["tenant"]["api_key_public"]}),
    "nobody": Caller(None, lambda _: {}),
}
