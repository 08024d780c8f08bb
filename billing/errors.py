"""What can go wrong, as facts: a docstring's first line is the title a client reads, the rest its page.

BillingError
├── Invalid                      400  does not match the document
│   ├── MalformedBody
│   ├── InvalidRequest
│   ├── StateMissing
│   ├── StateUnknown
│   ├── StateExpired
│   └── StateUsed
├── Unauthenticated              401  no credentials, or bad ones
│   ├── CredentialsMissing
│   ├── InvalidCredentials
│   ├── TokenInvalid
│   ├── TokenExpired
│   ├── SessionEnded
│   ├── RefreshTokenReused
│   ├── KeyMalformed
│   ├── KeyUnknown
│   ├── KeyRevoked
│   └── KeyExpired
├── Forbidden                    403  good credentials that may not do this
│   ├── InsufficientScope
│   ├── TenantDisabled
│   ├── WrongPassword
│   └── AccessDenied
├── NotFound                     404
├── MethodNotAllowed             405
├── RequestTimeout               408
├── Conflict                     409  the state of things
│   ├── EmailTaken
│   ├── StripeAlreadyConnected
│   ├── StripeAccountTaken
│   ├── WebhookNotConfigured
│   └── IdempotencyInProgress
├── PayloadTooLarge              413
├── UnsupportedMediaType         415
├── Refused                      422  matches the document, but a rule says no
│   ├── PasswordTooWeak
│   ├── WebhookUrlRefused
│   ├── ReturnUrlRefused
│   ├── CodeRejected
│   └── IdempotencyKeyReused
├── RateLimited                  429
├── RequestHeadersTooLarge       431
├── InternalError                500
├── StripeUnavailable            502
└── Unavailable                  503
    ├── Overloaded
    ├── DatabaseUnavailable
    ├── DeadlineExceeded
    └── StripeNotConfigured
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One member of a request that does not match the document: where, and why."""

    pointer: str
    message: str


class BillingError(Exception):
    """Something went wrong."""

    retry_after_seconds: int | None = None
    _code = "billing-error"

    def __init_subclass__(cls) -> None:
        cls._code = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(
        self,
        detail: str | None = None,
        *,
        faults: Sequence[Fault] = (),
        retry_after_seconds: int | None = None,
    ) -> None:
        self.detail = detail or self.title()
        super().__init__(self.detail)
        self.faults = tuple(faults)
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds

    @classmethod
    def code(cls) -> str:
        """The stable name a program reads: the class name in kebab-case."""
        return cls._code

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def explanation(cls) -> str:
        """What the docstring says after its first line, on one line."""
        return " ".join(" ".join((cls.__doc__ or "").strip().splitlines()[1:]).split())


def settled(outcome: T | BillingError) -> T:
    """The outcome, unless it is a refusal that had to outlast its transaction: that is raised now."""
    if isinstance(outcome, BillingError):
        raise outcome
    return outcome


def catalogue() -> Iterator[type[BillingError]]:
    """Every error a client can meet: the leaves of the tree."""
    waiting = [BillingError]
    while waiting:
        error = waiting.pop()
        children = error.__subclasses__()
        if not children:
            yield error
        waiting.extend(reversed(children))


# 400 ---------------------------------------------------------------------------------------------


class Invalid(BillingError):
    """The request does not match the document."""


class MalformedBody(Invalid):
    """The body is not JSON in UTF-8.

    Send one JSON value in UTF-8, without NUL or lone surrogates, nested at most 128 deep.
    """


class InvalidRequest(Invalid):
    """The request does not match the document.

    `errors` lists each member that does not, by its JSON Pointer (RFC 6901).
    """


class StateMissing(Invalid):
    """The callback has no state.

    Stripe's redirect always has the `state` that `start_stripe_connect` made. Start again.
    """


class StateUnknown(Invalid):
    """The state is not one of ours.

    It was not made here, or it was made for another browser. Start again.
    """


class StateExpired(Invalid):
    """The state has expired.

    A connection must be finished within ten minutes, by someone who is an owner still. Starting anew ends an older
    one, and so does a new password, or whatever else ends the owner's session. Start again.
    """


class StateUsed(Invalid):
    """The state was used already.

    Each state is good for one callback. If the account is not connected, start again.
    """


# 401 ---------------------------------------------------------------------------------------------


class Unauthenticated(BillingError):
    """No good credentials came with the request."""


class CredentialsMissing(Unauthenticated):
    """This operation needs credentials.

    Send an access token or an API key as `Authorization: Bearer …`, or an API key as `X-API-Key`,
    as the document says for the operation.
    """


class InvalidCredentials(Unauthenticated):
    """The email or the password is wrong.

    The answer is the same for an unknown email, a wrong password, a disabled user and a disabled tenant.
    """


class TokenInvalid(Unauthenticated):
    """The token is invalid.

    It is malformed, was not signed here, or is of another kind than this operation takes.
    """


class TokenExpired(Unauthenticated):
    """The token has expired.

    Exchange the refresh token for a new access token, or log in.
    """


class SessionEnded(Unauthenticated):
    """The session has ended.

    The password was changed, the user was disabled, or the session was ended. Log in again.
    """


class RefreshTokenReused(Unauthenticated):
    """The refresh token was used already.

    Each refresh token works once. A second use may be a theft, so the whole session was ended: log in again.
    """


class KeyMalformed(Unauthenticated):
    """The API key is malformed.

    A key has 46 characters: `pk_` or `sk_`, `live_` or `test_`, 32 random ones and a checksum of 6.
    """


class KeyUnknown(Unauthenticated):
    """The API key is unknown."""


class KeyRevoked(Unauthenticated):
    """The API key was revoked.

    Make new keys with `regenerate_api_keys`.
    """


class KeyExpired(Unauthenticated):
    """The API key has expired.

    It was replaced, and its grace period is over. Use the key that replaced it.
    """


# 403 ---------------------------------------------------------------------------------------------


class Forbidden(BillingError):
    """These credentials may not do this."""


class InsufficientScope(Forbidden):
    """These credentials may not do this.

    The operation needs a user of a higher role; API keys may only verify themselves and read their tenant.
    """


class TenantDisabled(Forbidden):
    """The tenant is disabled.

    The credentials are good, but the tenant was switched off by the platform's operator.
    """


class WrongPassword(Forbidden):
    """The old password is wrong."""


class AccessDenied(Forbidden):
    """The connection was refused at Stripe.

    The person at Stripe declined, or shared too little, or Stripe itself refused. Nothing was changed.
    """


# 404, 405, 408 -----------------------------------------------------------------------------------


class NotFound(BillingError):
    """There is nothing here.

    The path is unknown (each ends in a slash), or the thing is not yours.
    """


class MethodNotAllowed(BillingError):
    """The path does not support this method.

    The header `Allow` lists those that it supports.
    """


class RequestTimeout(BillingError):
    """The request took too long to arrive.

    Its head and its body must each be here within 15 seconds. Nothing was changed: repeat the request.
    """


# 409 ---------------------------------------------------------------------------------------------


class Conflict(BillingError):
    """The current state does not allow this."""


class EmailTaken(Conflict):
    """The email is in use.

    Emails are compared without regard to case. Log in instead, or use another one.
    """


class StripeAlreadyConnected(Conflict):
    """A Stripe account is connected already.

    Disconnect it first.
    """


class StripeAccountTaken(Conflict):
    """The Stripe account belongs to another tenant.

    A Stripe account can be connected to one tenant at a time.
    """


class WebhookNotConfigured(Conflict):
    """No webhook URL is configured.

    Configure one with `configure_webhook` first.
    """


class IdempotencyInProgress(Conflict):
    """The first request with this Idempotency-Key is not answered yet.

    Wait as many seconds as `Retry-After` says, and repeat the request. If the first one was broken off, nothing was
    changed by it, and after a minute at most a repeat takes its place.
    """

    retry_after_seconds = 1


# 413, 415 ----------------------------------------------------------------------------------------


class PayloadTooLarge(BillingError):
    """The body is larger than 64 KiB."""


class UnsupportedMediaType(BillingError):
    """The body must be application/json in UTF-8.

    Send one `Content-Type: application/json`, and no `Content-Encoding`.
    """


# 422 ---------------------------------------------------------------------------------------------


class Refused(BillingError):
    """The request matches the document, but a rule refuses it."""


class PasswordTooWeak(Refused):
    """The password is too easy to guess.

    It is a common one, or made from words that belong to the account. Use a longer phrase.
    """


class WebhookUrlRefused(Refused):
    """The webhook URL is not allowed.

    It must be https on port 443 or 8443 of a public host name, without user name, password or fragment.
    """


class ReturnUrlRefused(Refused):
    """The return URL is not a page of this platform.

    It must be on one of the origins that the platform's operator allows to call this API.
    """


class CodeRejected(Refused):
    """Stripe did not accept the authorization code.

    Codes are good once and for five minutes. Start again.
    """


class IdempotencyKeyReused(Refused):
    """The Idempotency-Key belongs to another request.

    For 24 hours a key means the request that it first came with: the same operation, body and query. Use a new key
    for each request, and the same only to repeat one.
    """


# 429, 431 ----------------------------------------------------------------------------------------


class RateLimited(BillingError):
    """Too many requests.

    Wait as many seconds as `Retry-After` says.
    """

    retry_after_seconds = 1


class RequestHeadersTooLarge(BillingError):
    """The request line and the headers are too large.

    Together they may have 32 KiB, and there may be 100 headers.
    """


# 5xx ---------------------------------------------------------------------------------------------


class InternalError(BillingError):
    """Something went wrong on our side.

    Whether anything was changed is unknown. Quote `request_id` when you report it.
    """


class StripeUnavailable(BillingError):
    """Stripe did not answer as it should.

    Whether Stripe did what was asked is unknown. Start again in a while.
    """


class Unavailable(BillingError):
    """The service cannot answer now."""


class Overloaded(Unavailable):
    """The service is busy.

    Wait as many seconds as `Retry-After` says, and repeat the request.
    """

    retry_after_seconds = 2


class DatabaseUnavailable(Unavailable):
    """The database does not answer in time.

    Wait as many seconds as `Retry-After` says, and repeat the request.
    """

    retry_after_seconds = 5


class DeadlineExceeded(Unavailable):
    """The response was not ready in time.

    Whether anything was changed is unknown. Wait as many seconds as `Retry-After` says, and repeat the request, with
    the same `Idempotency-Key` where it had one.
    """

    retry_after_seconds = 5


class StripeNotConfigured(Unavailable):
    """Stripe Connect is not configured on this server.

    The platform's operator must set the variable that the detail names.
    """
