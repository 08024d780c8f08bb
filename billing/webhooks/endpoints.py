"""A tenant's webhook endpoint: which URLs are allowed, how it is configured, and when it is disabled.

What a name resolves to is checked when it is called, not here: only there can it not change in between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Literal, Protocol
from urllib.parse import SplitResult, urlsplit
from uuid import UUID

from billing.errors import WebhookNotConfigured, WebhookUrlRefused
from billing.ports import Audit, Events, Tasks
from billing.webhooks.delivery import wake
from billing.webhooks.events import EventType
from billing.webhooks.signing import new_secret

LONGEST = 2048
LONGEST_NAME = 253
# RFC 1123, and the underscore that some names have. No percent-encoding, which clients interpret differently in a host.
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
PORTS = {None, 443, 8443}
LOCAL_NAMES = ("localhost", "local", "internal")


# URLs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UrlPolicy:
    """Which URLs are allowed. In development also plain http, and the name `localhost` together with any port."""

    allow_http: bool = False
    allow_localhost: bool = False

    def check(self, url: str) -> str:
        """Return the URL, if deliveries may be sent to it; raises `WebhookUrlRefused` with the reason."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise WebhookUrlRefused("The webhook URL cannot be parsed.") from None
        if reason := self._refusal(url, parts, port):
            raise WebhookUrlRefused(f"The webhook URL {reason}.")
        return url

    def check_optional(self, url: str | None) -> None:
        """Check a URL unless it is None."""
        if url is not None:
            self.check(url)

    def _refusal(self, url: str, parts: SplitResult, port: int | None) -> str | None:
        host = (parts.hostname or "").removesuffix(".")
        local = self.allow_localhost and host == "localhost"
        if len(url) > LONGEST or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            return f"must be printable ASCII, at most {LONGEST} characters"
        if parts.scheme != "https" and not (parts.scheme == "http" and self.allow_http):
            return "must begin with https://"
        if "@" in parts.netloc or "#" in url:
            return "must not have a user name, a password or a fragment"
        # `hostname` has no brackets: [v1.acme.example] (RFC 3986, IPvFuture) would look like a name.
        if not local and ("[" in parts.netloc or _is_address(host) or not _is_public_name(host)):
            return "must name a public host"
        if not self.allow_localhost and port not in PORTS:
            return "must use port 443 or 8443"
        return None


def _is_public_name(host: str) -> bool:
    labels = host.split(".")
    is_name = len(host) <= LONGEST_NAME and all(LABEL.fullmatch(label) for label in labels)
    return is_name and len(labels) > 1 and labels[-1] not in LOCAL_NAMES


def _is_address(host: str) -> bool:
    # inet_aton also reads 127.1, 0x7f.1 and 2130706433: no public name ends in a number (RFC 3696).
    last = host.rpartition(".")[2].lower()
    if last.isdigit() or last.startswith("0x"):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


# Endpoints ---------------------------------------------------------------------------------------

DISABLED: EventType = "webhook.disabled"
# The error of a delivery whose URL was removed.
CANCELLED = "cancelled"
DisabledReason = Literal["failing", "gone"]
TOO_LONG = timedelta(days=5)
TOO_MANY = 10


@dataclass(frozen=True)
class Endpoint:
    """Where a tenant's events go, which types (none means all), and how deliveries have been going.

    `failing_since` is the first failure after the last success, None if the last attempt succeeded; `failed_events`
    is how many events have failed since then.
    """

    url: str | None
    event_types: tuple[str, ...] = ()
    disabled_reason: DisabledReason | None = None
    failing_since: datetime | None = None
    failed_events: int = 0

    @property
    def is_active(self) -> bool:
        return self.url is not None and self.disabled_reason is None

    @property
    def host(self) -> str | None:
        """The part of the URL that may be kept for ever: the rest may contain a secret."""
        return urlsplit(self.url).hostname if self.url else None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The types of events that are sent, none for all. `webhook.disabled` is always among them."""
        return (*self.event_types, DISABLED) if self.event_types else ()

    def is_failing_too_long(self, now: datetime) -> bool:
        """Whether to disable it: for 5 days every attempt has failed, those of 10 events or more.

        A few prove little: one event that a receiver cannot process is no reason to withhold the others.
        """
        since = self.failing_since
        return since is not None and now - since >= TOO_LONG and self.failed_events >= TOO_MANY

    def after(self, *, delivered: int, failed: int, first_failures: int, now: datetime) -> Endpoint:
        """The endpoint after some attempts: one success among them clears its failures."""
        if delivered:
            return replace(self, failing_since=None, failed_events=0)
        if not failed:
            return self
        if self.failing_since is None:
            return replace(self, failing_since=now, failed_events=failed)
        return replace(self, failed_events=self.failed_events + first_failures)


@dataclass(frozen=True)
class Secret:
    """A secret that signs deliveries, without its text; `expires_at` is None for the current one."""

    id: UUID
    last4: str
    expires_at: datetime | None


@dataclass(frozen=True)
class Configured:
    """The endpoint as configured. A new secret is shown this once and never again."""

    endpoint: Endpoint
    new_secret: str | None = field(repr=False)
    previous_secret_expires_at: datetime | None


def configure(
    tx: Storage,
    *,
    url: str,
    event_types: Sequence[str] | None,
    regenerate_secret: bool,
    grace: timedelta,
    now: datetime,
) -> Configured:
    """Send the tenant's events to this URL from now on; what was pending goes there too.

    An endpoint that was disabled is tried again. The secret is renewed if that is asked for; until the grace period
    ends, the previous one signs too.
    """
    before = tx.webhooks.find(lock=True)
    types = before.event_types if event_types is None else tuple(event_types)
    endpoint = Endpoint(url, types)
    is_as_it_was = before.is_active and (before.url, before.event_types) == (url, types)
    secrets = tx.webhooks.secrets(now)
    text = _renew_secret(tx, now, grace=grace) if regenerate_secret or not secrets else None
    if text is not None or not is_as_it_was:
        details = {"new_secret": text is not None}
        tx.audit.record("webhook.configured", subject=endpoint.host, now=now, details=details)
    if not is_as_it_was:
        tx.webhooks.keep(endpoint, now)
        tx.tenants.touch(now)
        wake(tx.tasks, tx.tenant_id, now, anew=True)
    if text is not None:
        secrets = tx.webhooks.secrets(now)
    return Configured(before if is_as_it_was else endpoint, text, previous_expiry(secrets))


def _renew_secret(tx: Storage, now: datetime, *, grace: timedelta) -> str:
    tx.webhooks.retire_secrets(now, expires_at=now + grace)
    text = new_secret()
    tx.webhooks.add_secret(text, now)
    return text


def previous_expiry(secrets: Sequence[Secret]) -> datetime | None:
    """Until when the previous secret signs too, if it does."""
    return next((secret.expires_at for secret in secrets if secret.expires_at is not None), None)


def remove(tx: Storage, *, now: datetime) -> None:
    """Remove the URL, and fail the pending deliveries. The secret is kept."""
    before = tx.webhooks.find(lock=True)
    if before.url is None:
        return
    tx.webhooks.keep(Endpoint(None, before.event_types), now)
    tx.deliveries.cancel(CANCELLED, now)
    tx.tenants.touch(now)
    tx.audit.record("webhook.removed", subject=before.host, now=now)
    wake(tx.tasks, tx.tenant_id, now, anew=True)


def require_url(endpoint: Endpoint) -> str:
    """Where events go; raises `WebhookNotConfigured`."""
    if endpoint.url is None:
        raise WebhookNotConfigured
    return endpoint.url


def disable(tx: Storage, endpoint: Endpoint, reason: DisabledReason, *, now: datetime) -> Endpoint:
    """Disable an endpoint that takes no deliveries: it gets only `webhook.disabled`. Pending ones are kept.

    The caller holds the endpoint's lock.
    """
    since = None if reason == "gone" else endpoint.failing_since
    data = {"webhook_url": endpoint.url, "disabled_reason": reason, "failing_since": since}
    tx.audit.record("webhook.disabled", subject=endpoint.host, reason=reason, now=now)
    tx.events.record(DISABLED, data, now=now)
    disabled = replace(endpoint, disabled_reason=reason)
    tx.webhooks.keep(disabled, now)
    return disabled


def reason_to_disable(endpoint: Endpoint, *, gone: bool, now: datetime) -> DisabledReason | None:
    """Why to disable the endpoint, if there is a reason."""
    if gone:
        return "gone"
    return "failing" if endpoint.is_failing_too_long(now) else None


class WebhookShelf(Protocol):
    def find(self, *, lock: bool = False) -> Endpoint: ...
    def keep(self, endpoint: Endpoint, now: datetime) -> None: ...
    def secrets(self, now: datetime) -> list[Secret]: ...
    def add_secret(self, text: str, now: datetime) -> None: ...
    def retire_secrets(self, now: datetime, *, expires_at: datetime) -> None: ...


class DeliveryShelf(Protocol):
    def cancel(self, error: str, now: datetime) -> bool: ...


class TenantShelf(Protocol):
    def touch(self, now: datetime) -> None: ...


class Storage(Protocol):
    """What this chapter asks of storage, inside one transaction of one tenant."""

    @property
    def tenant_id(self) -> UUID: ...
    @property
    def tenants(self) -> TenantShelf: ...
    @property
    def webhooks(self) -> WebhookShelf: ...
    @property
    def deliveries(self) -> DeliveryShelf: ...
    @property
    def events(self) -> Events: ...
    @property
    def tasks(self) -> Tasks: ...
    @property
    def audit(self) -> Audit: ...
