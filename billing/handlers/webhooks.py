"""Webhooks: not built yet; the document has them whole."""

from __future__ import annotations

from typing import NoReturn

from billing.errors import NotBuilt


def get_webhook_config() -> NoReturn:
    raise NotBuilt


def configure_webhook() -> NoReturn:
    raise NotBuilt


def remove_webhook() -> NoReturn:
    raise NotBuilt


def send_test_webhook() -> NoReturn:
    raise NotBuilt
