"""The only place that calls Stripe: every answer becomes a value of ours, every failure an error of ours."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import stripe
import structlog

from billing import tracing
from billing.errors import CodeRejected, StripeNotConfigured, StripeUnavailable
from billing.outbound import Bounds, Session
from billing.stripe_connect import Account, Grant, RequirementError, Requirements
from billing.tenants import Tenant
from billing.users import User

CONNECT_SECONDS = 3.05
TOTAL_SECONDS = 8
LARGEST_ANSWER = 1024 * 1024
DEEPEST_ANSWER = 100

ACCOUNT_ID = re.compile(r"acct_[A-Za-z0-9]{8,64}")
COUNTRY = re.compile(r"[A-Z]{2}")
CURRENCY = re.compile(r"[a-z]{3}")
URL = re.compile(r"https?://\S+")
LONGEST_NAME = 255
LONGEST_WORD = 64
LONGEST_REASON = 2048
LONGEST_EMAIL = 254
LONGEST_URL = 4096
MOST_ITEMS = 500
MOST_CAPABILITIES = 200
LATEST_TIME = 253402300799  # The end of the year 9999.

# How the library fails: its own errors, and what escapes it when an answer has an unknown form.
FAILURES = (stripe.StripeError, AttributeError, KeyError, TypeError, ValueError)

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.stripe")


class Malformed(ValueError):
    """Stripe's answer has not the form that was expected."""


class Gateway:
    """One client for the process, for any number of threads. No retries: the caller knows what a repeat does.

    Every call of Stripe takes at most `TOTAL_SECONDS` (`revoke` may need two), and may raise
    `StripeNotConfigured` and `StripeUnavailable`.
    """

    def __init__(
        self, *, secret_key: str | None, client_id: str | None, api_base: str, connect_base: str
    ) -> None:
        self._secret_key = secret_key
        self._client_id = client_id
        self._breaker = CircuitBreaker()
        self._client = _client(secret_key, client_id, api_base, connect_base) if secret_key else None

    @property
    def livemode(self) -> bool:
        """Whether our key is a live one, for real money."""
        return (self._secret_key or "").startswith(("sk_live_", "rk_live_"))

    def require_configured(self, *, for_oauth: bool = True) -> None:
        """Raises `StripeNotConfigured` naming what is missing; without OAuth the key alone will do."""
        wanted = {"STRIPE_SECRET_KEY": self._secret_key}
        if for_oauth:
            wanted = {"STRIPE_CONNECT_CLIENT_ID": self._client_id, **wanted}
        if missing := [name for name, value in wanted.items() if not value]:
            raise StripeNotConfigured(f"This server has no {' and no '.join(missing)}.")

    # OAuth ---------------------------------------------------------------------------------------

    def authorize_url(self, *, state: str, redirect_uri: str, tenant: Tenant, user: User) -> str:
        """The URL where an owner authorises us, prefilled with what we know, if it fits. Makes no call."""
        self.require_configured()
        prefill = {
            "email": user.email,
            "business_name": tenant.company_name,
            "url": tenant.domain,
            "first_name": user.first_name,
            "last_name": user.last_name,
        }
        parameters: Any = {
            "response_type": "code",
            "scope": "read_write",  # Stripe's own default is read_only.
            "state": state,
            "redirect_uri": redirect_uri,
        }
        known: Any = {**parameters, "stripe_user": {name: value for name, value in prefill.items() if value}}
        url = self._stripe.oauth.authorize_url(known)
        # A URL has six to twelve characters for each letter of another script.
        return url if len(url) <= LONGEST_URL else self._stripe.oauth.authorize_url(parameters)

    def complete(self, code: str) -> Grant:
        """Exchange an authorization code, which works once; raises `CodeRejected`."""
        self.require_configured()
        try:
            with _translated_errors("oauth.token"):
                token = self._stripe.oauth.token({"grant_type": "authorization_code", "code": code})
                return _grant(token.to_dict())
        except StripeUnavailable as error:
            if isinstance(error.__cause__, stripe.oauth_error.InvalidGrantError):
                raise CodeRejected from error
            raise

    def revoke(self, account_id: str) -> None:
        """Deauthorise the account at Stripe; no error if it is not connected there any more."""
        self.require_configured()
        try:
            with _translated_errors("oauth.deauthorize"):
                self._stripe.oauth.deauthorize({"stripe_user_id": account_id})
        except StripeUnavailable as error:
            if not isinstance(error.__cause__, stripe.oauth_error.InvalidClientError):
                raise
            # Either the account is not connected, or our own client id is wrong: a retrieval tells.
            if self._retrieve(account_id) is not None:
                raise

    # Accounts ------------------------------------------------------------------------------------

    def account(self, account_id: str) -> Account | None:
        """The account as Stripe has it now, None if it is not connected to this platform any more."""
        self.require_configured(for_oauth=False)
        with self._breaker:
            return self._retrieve(account_id)

    def create_account(self, tenant: Tenant, *, idempotency_key: str) -> Account:
        """Make an account for a tenant; the same key gives the same account."""
        self.require_configured(for_oauth=False)
        with self._breaker, _translated_errors("accounts.create"):
            made = self._stripe.v1.accounts.create(
                {
                    "type": "standard",
                    "email": tenant.email,
                    "business_profile": {"name": tenant.company_name},
                    "metadata": {"tenant_id": str(tenant.id)},
                },
                {"idempotency_key": idempotency_key},
            )
            return _account(made.to_dict())

    def account_link(self, account_id: str, *, return_url: str) -> str:
        """The URL of Stripe's form for an owner; valid for some minutes."""
        self.require_configured(for_oauth=False)
        with self._breaker, _translated_errors("account_links.create"):
            made = self._stripe.v1.account_links.create(
                {
                    "type": "account_onboarding",
                    "account": account_id,
                    "return_url": return_url,
                    # An expired link leads back as well: the account's status shows the unfinished form.
                    "refresh_url": return_url,
                }
            )
            url = _text(made.to_dict().get("url"), LONGEST_URL, URL)
            if url is None:
                raise Malformed
            return url

    def _retrieve(self, account_id: str) -> Account | None:
        try:
            with _translated_errors("accounts.retrieve"):
                return _account(self._stripe.v1.accounts.retrieve(account_id).to_dict())
        except StripeUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, stripe.PermissionError) and _code_of(cause) == "account_invalid":
                return None
            raise

    @property
    def _stripe(self) -> stripe.StripeClient:
        if self._client is None:
            raise StripeNotConfigured
        return self._client


# The environment could make the library print what it receives, codes too, past our log and its redaction.
stripe._util.STRIPE_LOG = None  # noqa: SLF001


class _Client(stripe.RequestsClient):
    """Refuses an answer nested too deeply for the library, which traverses it by recursion.

    At the stack's limit whatever else happens to run fails as well, such as another object's finalizer.
    """

    def request(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().request(*args, **kwargs)
        if _is_deep(answer[0]):
            raise Malformed
        return answer


def _client(secret_key: str, client_id: str | None, api_base: str, connect_base: str) -> stripe.StripeClient:
    session = Session(Bounds(CONNECT_SECONDS, TOTAL_SECONDS, max_bytes=LARGEST_ANSWER))
    return stripe.StripeClient(
        secret_key,
        client_id=client_id,
        max_network_retries=0,
        http_client=_Client(timeout=(CONNECT_SECONDS, TOTAL_SECONDS), session=session),
        # All four: one that is left out keeps Stripe's real address.
        base_addresses={
            "api": api_base,
            "connect": connect_base,
            "files": api_base,
            "meter_events": api_base,
        },
    )


@contextmanager
def _translated_errors(operation: str) -> Iterator[None]:
    try:
        with tracing.span(f"stripe {operation}", "client"):
            yield
    except FAILURES as error:
        # Without its message: that of `invalid_grant` repeats the code.
        log.warning(
            "stripe refused or failed",
            operation=operation,
            error=type(error).__name__,
            code=_code_of(error),
            http_status=getattr(error, "http_status", None),
            stripe_request_id=getattr(error, "request_id", None),
        )
        raise StripeUnavailable from error


def _code_of(error: BaseException) -> str | None:
    # For 401, 403 and 429 the library leaves `code` empty.
    found = getattr(error, "code", None) or getattr(getattr(error, "error", None), "code", None)
    return _text(found, LONGEST_WORD)


class CircuitBreaker:
    """Fails fast while Stripe does not answer: raises `StripeUnavailable` at once instead of waiting.

    It is open for `OPEN_SECONDS` after `OPENS_AFTER` silences in a row, and while any call has been waiting
    for longer than `PATIENCE_SECONDS`.
    """

    OPENS_AFTER = 3
    OPEN_SECONDS = 15
    PATIENCE_SECONDS = 1.5

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting_since: dict[int, float] = {}
        self._silences = 0
        self._open_until = 0.0

    def __enter__(self) -> None:
        now = self._clock()
        with self._lock:
            oldest = min(self._waiting_since.values(), default=now)
            if now < self._open_until or now - oldest > self.PATIENCE_SECONDS:
                raise StripeUnavailable
            self._waiting_since[threading.get_ident()] = now

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with self._lock:
            del self._waiting_since[threading.get_ident()]
            self._silences = self._silences + 1 if _is_silence(error) else 0
            if self._silences >= self.OPENS_AFTER:
                self._open_until = self._clock() + self.OPEN_SECONDS


def _is_silence(error: BaseException | None) -> bool:
    """Whether Stripe did not answer, or with a 5xx: a refusal for one account says nothing of the others."""
    cause = error.__cause__ if error is not None else None
    return isinstance(cause, stripe.APIConnectionError) or (getattr(cause, "http_status", None) or 0) >= 500


# Answers -----------------------------------------------------------------------------------------


def _is_deep(body: bytes) -> bool:
    """Whether lists and objects of a JSON text are nested more than `DEEPEST_ANSWER` deep."""
    if body.count(b"[") + body.count(b"{") <= DEEPEST_ANSWER:
        return False
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    steps = (1 if byte in b"[{" else -1 for byte in outside_strings if byte in b"[]{}")
    return any(depth > DEEPEST_ANSWER for depth in accumulate(steps))


def _grant(token: Mapping[str, Any]) -> Grant:
    account_id, livemode = token.get("stripe_user_id"), token.get("livemode")
    if not (_is_account_id(account_id) and isinstance(livemode, bool)):
        raise Malformed
    return Grant(str(account_id), str(token.get("scope")), livemode)


def _account(raw: Mapping[str, Any]) -> Account:
    """The account in Stripe's answer, without members of unexpected form; raises `Malformed` for its id."""
    if not _is_account_id(raw.get("id")):
        raise Malformed
    return Account(
        id=raw["id"],
        charges_enabled=_truth(raw.get("charges_enabled")),
        payouts_enabled=_truth(raw.get("payouts_enabled")),
        details_submitted=_truth(raw.get("details_submitted")),
        requirements=_requirements(_mapping(raw.get("requirements"))),
        capabilities=_capabilities(_mapping(raw.get("capabilities"))),
        email=_text(raw.get("email"), LONGEST_EMAIL),
        business_type=_text(raw.get("business_type"), LONGEST_WORD),
        country=_text(raw.get("country"), LONGEST_WORD, COUNTRY),
        default_currency=_text(raw.get("default_currency"), LONGEST_WORD, CURRENCY),
    )


def _requirements(raw: Mapping[str, Any]) -> Requirements:
    deadline = raw.get("current_deadline")
    return Requirements(
        currently_due=_names(raw.get("currently_due")),
        eventually_due=_names(raw.get("eventually_due")),
        past_due=_names(raw.get("past_due")),
        pending_verification=_names(raw.get("pending_verification")),
        disabled_reason=_text(raw.get("disabled_reason"), LONGEST_NAME),
        current_deadline=deadline if type(deadline) is int and 0 <= deadline <= LATEST_TIME else None,
        errors=tuple(_error(_mapping(error)) for error in _items(raw.get("errors"))),
    )


def _error(raw: Mapping[str, Any]) -> RequirementError:
    return RequirementError(
        code=_text(raw.get("code"), LONGEST_NAME) or "",
        reason=_text(raw.get("reason"), LONGEST_REASON) or "",
        requirement=_text(raw.get("requirement"), LONGEST_NAME) or "",
    )


def _capabilities(raw: Mapping[str, Any]) -> dict[str, str]:
    states = {name: _text(state, LONGEST_WORD) for name, state in list(raw.items())[:MOST_CAPABILITIES]}
    return {name: state for name, state in states.items() if state and _text(name, LONGEST_WORD)}


def _is_account_id(value: object) -> bool:
    return isinstance(value, str) and ACCOUNT_ID.fullmatch(value) is not None


def _truth(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: object) -> list[object]:
    return value[:MOST_ITEMS] if isinstance(value, list) else []


def _names(value: object) -> tuple[str, ...]:
    found = (_text(item, LONGEST_NAME) for item in _items(value))
    return tuple(name for name in found if name)


def _text(value: object, longest: int, form: re.Pattern[str] | None = None) -> str | None:
    """The value if it is a text that fits and that can be shown and stored, else None."""
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        return None
    return value if form is None or form.fullmatch(value) else None
