"""Connected accounts, as Stripe's `account` object shows them in each of their states."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

COMPANY = ("business_profile.url", "company.tax_id", "external_account", "tos_acceptance.date")
DOCUMENT = "individual.verification.document"
EXPIRED = {
    "code": "verification_document_expired",
    "reason": "The document is expired. Upload a document that is still valid.",
    "requirement": DOCUMENT,
}

# Stripe's default currencies; our other examples are in the euro area.
CURRENCIES = {"AU": "aud", "CA": "cad", "CH": "chf", "GB": "gbp", "JP": "jpy", "US": "usd"}


class Status(StrEnum):
    """The status that a platform derives from an account object."""

    ACTIVE = "active"
    INCOMPLETE = "incomplete"
    RESTRICTED = "restricted"
    PENDING = "pending"
    UNDER_REVIEW = "under_review"
    REJECTED = "rejected"

    @property
    def label(self) -> str:
        return self.value.replace("_", " ").capitalize()


@dataclass
class Account:
    """One account, and whether the platform has access to it."""

    body: dict[str, Any]
    is_connected: bool = False
    # An account that the platform created has no authorization to revoke.
    is_by_oauth: bool = field(default=True, kw_only=True)

    @property
    def id(self) -> str:
        return str(self.body["id"])

    def become(self, status: Status) -> None:
        self.body.update(_fields(status))

    def change(self, **fields: Any) -> None:
        """Set members of the object; a mapping is merged into the member's."""
        for name, value in fields.items():
            held = self.body.get(name)
            if isinstance(held, dict) and isinstance(value, Mapping):
                self.body[name] = {**held, **value}
            else:
                self.body[name] = value


def new_id(prefix: str, length: int = 16) -> str:
    """`prefix` and random letters and digits."""
    alphabet = string.ascii_letters + string.digits
    return prefix + "".join(secrets.choice(alphabet) for _ in range(length))


def authorized(status: Status, *, created: int, prefill: Mapping[str, str]) -> Account:
    """An account that its owner controls, made of the form's values as the platform prefilled them."""
    return Account(
        {
            **_blank(created),
            **_profile(prefill, name=prefill.get("business_name"), url=prefill.get("url")),
            "controller": {"type": "account"},
            "type": "standard",
            **_fields(status),
        }
    )


def controlled(*, created: int, form: Mapping[str, str]) -> Account:
    """An account that the platform creates, by the parameters of its call; its owner has yet to complete it."""
    profile = members(form, "business_profile")
    body = {
        **_blank(created),
        **_profile(form, name=profile.get("name"), url=profile.get("url")),
        "controller": {"type": "application", "is_controller": True},
        "metadata": members(form, "metadata"),
        "type": form.get("type", "none"),
        **_fields(Status.PENDING),
    }
    return Account(body, is_connected=True, is_by_oauth=False)


def members(form: Mapping[str, str], name: str) -> dict[str, str]:
    """The form's fields `name[member]`, by member."""
    start = f"{name}["
    return {
        key.removeprefix(start).removesuffix("]"): value
        for key, value in form.items()
        if key.startswith(start) and key.endswith("]") and value
    }


def requirements(**named: Any) -> dict[str, Any]:
    """A `requirements` member in which nothing is due but what is given."""
    return {
        "alternatives": [],
        "current_deadline": None,
        "currently_due": [],
        "disabled_reason": None,
        "errors": [],
        "eventually_due": [],
        "past_due": [],
        "pending_verification": [],
        **named,
    }


def _blank(created: int) -> dict[str, Any]:
    account_id = new_id("acct_1", 15)  # Stripe's ids begin so, and have at least one digit.
    return {
        "id": account_id,
        "object": "account",
        "created": created,
        "external_accounts": {
            "object": "list",
            "data": [],
            "has_more": False,
            "url": f"/v1/accounts/{account_id}/external_accounts",
        },
        "future_requirements": requirements(),
        "metadata": {},
    }


def _profile(given: Mapping[str, str], *, name: str | None, url: str | None) -> dict[str, Any]:
    country = given.get("country") or "US"
    return {
        "business_profile": {"name": name, "url": url},
        "business_type": given.get("business_type") or None,
        "country": country,
        "default_currency": CURRENCIES.get(country, "eur"),
        "email": given.get("email") or None,
    }


def _fields(status: Status) -> dict[str, Any]:
    """The members that depend on the status, made anew each time, as callers change them in place."""
    charges, payouts, submitted, capability = _SWITCHES[status]
    return {
        "capabilities": {"card_payments": capability, "transfers": capability},
        "charges_enabled": charges,
        "details_submitted": submitted,
        "payouts_enabled": payouts,
        "requirements": requirements(**_due(status)),
    }


# Charges enabled, payouts enabled, details submitted, and what the capabilities are.
_SWITCHES = {
    Status.ACTIVE: (True, True, True, "active"),
    Status.INCOMPLETE: (True, False, True, "active"),
    Status.RESTRICTED: (False, False, True, "inactive"),
    Status.PENDING: (False, False, False, "inactive"),
    Status.UNDER_REVIEW: (False, False, True, "pending"),
    Status.REJECTED: (False, False, True, "inactive"),
}


def _due(status: Status) -> dict[str, Any]:
    match status:
        case Status.INCOMPLETE:
            return {"currently_due": ["external_account"], "eventually_due": ["external_account"]}
        case Status.RESTRICTED:
            return {**_past_due(DOCUMENT), "errors": [dict(EXPIRED)]}
        case Status.PENDING:
            return _past_due(*COMPANY)
        case Status.UNDER_REVIEW:
            return {
                "disabled_reason": "requirements.pending_verification",
                "pending_verification": ["company.tax_id"],
            }
        case Status.REJECTED:
            return {"disabled_reason": "rejected.other"}
        case _:
            return {}


def _past_due(*names: str) -> dict[str, Any]:
    # What is past due is due: Stripe lists it in all three.
    return {
        "currently_due": [*names],
        "disabled_reason": "requirements.past_due",
        "eventually_due": [*names],
        "past_due": [*names],
    }
