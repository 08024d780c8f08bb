"""The webhook secret, as Standard Webhooks 1.0 writes it."""

from __future__ import annotations

import base64
import re

import pytest

from billing.webhooks import signing
from billing.webhooks.signing import new_secret


def test_a_secret_is_the_prefix_and_the_base64_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing.secrets, "token_bytes", lambda count: bytes(range(count)))
    assert new_secret() == "whsec_" + base64.b64encode(bytes(range(32))).decode()


def test_a_secret_decodes_to_32_bytes_and_is_new_each_time() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    for secret in made:
        assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
