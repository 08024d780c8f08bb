"""The secret that signs deliveries, and the headers with its signature, as in Standard Webhooks 1.0."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime
from secrets import token_bytes

PREFIX = "whsec_"
SECRET_BYTES = 32


def new_secret() -> str:
    """`whsec_` and the base64 of 32 random bytes; the key is the decoded bytes."""
    return PREFIX + base64.b64encode(token_bytes(SECRET_BYTES)).decode()


def signed_headers(secrets: Sequence[str], *, id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The four headers of one attempt: its id, its time, and one signature per secret, in their order.

    `secrets` are `whsec_…`, newest first, at least one; `id` is the same on every attempt and has no dot;
    `at` has a time zone and is cut to whole seconds; `body` is sent as it is. Raises `ValueError` for a secret
    of another form. Source: https://github.com/standard-webhooks/standard-webhooks, version 1.0.
    """
    timestamp = int(at.timestamp())
    signed = b"%s.%d.%s" % (id.encode(), timestamp, body)
    digests = [hmac.digest(_key_of(secret), signed, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
        # For receivers from before Standard Webhooks.
        "X-Webhook-Signature": f"t={timestamp}" + "".join(f",v1={digest.hex()}" for digest in digests),
    }


def _key_of(secret: str) -> bytes:
    if not secret.startswith(PREFIX):
        raise ValueError(f"a webhook secret begins with {PREFIX}")
    key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    # Anybody could sign with an empty key.
    if not key:
        raise ValueError("a webhook secret is not empty")
    return key
