"""One platform at Stripe Connect: its keys, its connected accounts, codes and account links."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sandbox.accounts import Account, Status, authorized, controlled, members, new_id

Clock = Callable[[], datetime]

CODE_LIFETIME = timedelta(minutes=5)
LINK_LIFETIME = timedelta(minutes=5)
SCOPES = ("read_only", "read_write")


def utc_now() -> datetime:
    return datetime.now(UTC)


class Refusal(Exception):
    """An error answer to a call: this status and this JSON body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class PageRefused(Exception):
    """A page cannot be shown at this address; the sentence says why."""


def oauth_error(status: int, code: str, description: str) -> Refusal:
    """The flat form of RFC 6749, section 5.2."""
    return Refusal(status, {"error": code, "error_description": description})


def api_error(status: int, message: str, **more: str) -> Refusal:
    return Refusal(status, {"error": {"type": "invalid_request_error", "message": message, **more}})


@dataclass(frozen=True)
class Authorization:
    """What a valid authorize URL asks for."""

    redirect_uri: str
    scope: str
    state: str | None
    prefill: dict[str, str]


@dataclass
class Code:
    """An authorization code, good for one token."""

    account: Account
    scope: str
    expires_at: datetime
    is_used: bool = False


@dataclass
class Link:
    """An account link, good for one completed visit."""

    account: Account
    return_url: str
    refresh_url: str
    expires_at: datetime
    is_used: bool = False

    def works_at(self, now: datetime) -> bool:
        return not self.is_used and now < self.expires_at


class Platform:
    """What Stripe knows of one platform.

    With `redirect_uris` only these are registered, compared exactly as Stripe does; without, any http(s) URL is.
    """

    def __init__(
        self,
        *,
        livemode: bool = False,
        redirect_uris: Collection[str] | None = None,
        clock: Clock = utc_now,
    ) -> None:
        self.livemode = livemode
        self.redirect_uris = redirect_uris
        self.clock = clock
        self.client_id = new_id("ca_", 32)
        self.secret_key = self._new_key("sk")
        self.forget()

    def forget(self) -> None:
        """Return to the initial state, with the same keys."""
        self.accounts: dict[str, Account] = {}
        self.codes: dict[str, Code] = {}
        self.links: dict[str, Link] = {}

    # What tests do at Stripe's dashboard ---------------------------------------------------------

    def revoke(self, account_id: str) -> None:
        """Withdraw the platform's access, as the account's owner."""
        self.accounts[account_id].is_connected = False

    def become(self, account_id: str, status: str) -> None:
        """Put the account into this status."""
        self.accounts[account_id].become(Status(status))

    def change(self, account_id: str, **fields: Any) -> None:
        """Set members of the account object; a mapping, such as `requirements`, is merged."""
        self.accounts[account_id].change(**fields)

    # OAuth ---------------------------------------------------------------------------------------

    def authorization(self, query: Mapping[str, str]) -> Authorization:
        """Parse an authorize URL's query; raises `PageRefused`."""
        if query.get("client_id") != self.client_id:
            raise PageRefused("No application matches the supplied client identifier.")
        if query.get("response_type") != "code":
            raise PageRefused("The response_type must be: code.")
        # Stripe's default scope, for a platform that asks for none.
        scope = query.get("scope", "read_only")
        if scope not in SCOPES:
            raise PageRefused(f"The scope must be one of: {', '.join(SCOPES)}.")
        redirect_uri = self._registered(query.get("redirect_uri", ""))
        return Authorization(redirect_uri, scope, query.get("state"), members(query, "stripe_user"))

    def connect(self, authorization: Authorization, choice: str) -> str:
        """A code for an existing account, or for a new one in this status."""
        account = self.accounts.get(choice) or self._add(
            authorized(_chosen(choice), created=self._created(), prefill=authorization.prefill)
        )
        code = new_id("ac_", 32)
        self.codes[code] = Code(account, authorization.scope, self.clock() + CODE_LIFETIME)
        return code

    def token(self, form: Mapping[str, str]) -> dict[str, Any]:
        if form.get("grant_type") != "authorization_code":
            raise oauth_error(400, "unsupported_grant_type", "The grant_type must be: authorization_code")
        code = self._redeemed(form.get("code", ""))
        code.account.is_connected = True
        return {
            "access_token": self._new_key("sk"),
            "livemode": self.livemode,
            "refresh_token": new_id("rt_", 48),
            "token_type": "bearer",
            "stripe_publishable_key": self._new_key("pk"),
            "stripe_user_id": code.account.id,
            "scope": code.scope,
        }

    def deauthorize(self, form: Mapping[str, str]) -> dict[str, Any]:
        if form.get("client_id") != self.client_id:
            raise oauth_error(401, "invalid_client", "No such application")
        account_id = form.get("stripe_user_id", "")
        account = self.accounts.get(account_id)
        if account is None or not (account.is_connected and account.is_by_oauth):
            raise oauth_error(
                401,
                "invalid_client",
                f"This application is not connected to stripe account {account_id}, "
                "or that account does not exist.",
            )
        account.is_connected = False
        return {"stripe_user_id": account_id}

    # Accounts and links --------------------------------------------------------------------------

    def create_account(self, form: Mapping[str, str]) -> dict[str, Any]:
        return self._add(controlled(created=self._created(), form=form)).body

    def account(self, account_id: str) -> Account:
        """An account to which the platform has access; raises `Refusal`."""
        account = self.accounts.get(account_id)
        if account is None or not account.is_connected:
            raise api_error(
                403,
                f"The provided key does not have access to account '{account_id}' (or that account does not "
                "exist). Application access may have been revoked.",
                code="account_invalid",
            )
        return account

    def create_link(self, form: Mapping[str, str], *, base: str) -> dict[str, Any]:
        """A link to the onboarding page under `base`."""
        for name in ("account", "type", "refresh_url", "return_url"):
            if not form.get(name):
                raise api_error(400, f"Missing required param: {name}.", code="parameter_missing", param=name)
        if form["type"] != "account_onboarding":
            # `account_update` is for accounts without a dashboard of their own, which we never make.
            raise api_error(400, 'Invalid type: must be one of ["account_onboarding"]', param="type")
        account, expires_at = self.account(form["account"]), self.clock() + LINK_LIFETIME
        secret = new_id("", 24)
        self.links[secret] = Link(account, form["return_url"], form["refresh_url"], expires_at)
        return {
            "object": "account_link",
            "created": self._created(),
            "expires_at": int(expires_at.timestamp()),
            "url": f"{base}/setup/{secret}",
        }

    def link(self, secret: str) -> Link:
        """The link, whether it still works or not; raises `PageRefused`."""
        if secret not in self.links:
            raise PageRefused("There is no such account link.")
        return self.links[secret]

    def visit(self, link: Link, *, finished: str | None = None) -> str:
        """End the visit; returns where the browser goes next. `finished` is the account's new status."""
        if not link.works_at(self.clock()):
            return link.refresh_url
        if finished is not None:
            link.account.become(_chosen(finished))
        link.is_used = True
        return link.return_url

    # Shared by the above -------------------------------------------------------------------------

    def _registered(self, uri: str) -> str:
        if not _is_absolute(uri) or (self.redirect_uris is not None and uri not in self.redirect_uris):
            raise PageRefused("The redirect_uri is not one of those registered for this application.")
        return uri

    def _redeemed(self, text: str) -> Code:
        code = self.codes.get(text)
        # Each message contains the code, as Stripe's do: a platform that logs the message logs the code.
        if code is None:
            raise oauth_error(400, "invalid_grant", f"Authorization code does not exist: {text}")
        if code.is_used:
            raise oauth_error(400, "invalid_grant", f"Authorization code has already been used: {text}")
        if self.clock() >= code.expires_at:
            raise oauth_error(400, "invalid_grant", f"Authorization code expired: {text}")
        code.is_used = True
        return code

    def _add(self, account: Account) -> Account:
        return self.accounts.setdefault(account.id, account)

    def _created(self) -> int:
        return int(self.clock().timestamp())

    def _new_key(self, kind: str) -> str:
        return new_id(f"{kind}_{'live' if self.livemode else 'test'}_", 24)


def _is_absolute(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment


def _chosen(text: str) -> Status:
    try:
        return Status(text)
    except ValueError as error:
        raise PageRefused("There is no such choice.") from error
