"""Stripe Connect: not built yet; the document has it whole."""

from __future__ import annotations

from typing import NoReturn

from billing.errors import NotBuilt


def start_stripe_connect() -> NoReturn:
    raise NotBuilt


def complete_stripe_connect() -> NoReturn:
    raise NotBuilt


def get_stripe_status() -> NoReturn:
    raise NotBuilt


def disconnect_stripe() -> NoReturn:
    raise NotBuilt
