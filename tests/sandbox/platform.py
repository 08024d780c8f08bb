"""Stripe's own library, as a platform uses it, pointed at the sandbox."""

from __future__ import annotations

import requests
from stripe import RequestsClient, StripeClient

from sandbox.stripe import Sandbox


def client_of(
    sandbox: Sandbox, session: requests.Session, *, key: str | None = None, timeout: float = 5
) -> StripeClient:
    return StripeClient(
        key or sandbox.secret_key,
        client_id=sandbox.client_id,
        max_network_retries=0,
        http_client=RequestsClient(timeout=timeout, session=session),
        base_addresses=dict.fromkeys(("api", "connect", "files", "meter_events"), sandbox.url),
    )
