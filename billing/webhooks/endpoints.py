"""Which URLs may be a webhook endpoint: public host names over https.

What a name resolves to is looked at when it is called, not here: only there it cannot change in between.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from billing.errors import WebhookUrlRefused

LONGEST = 2048
LONGEST_NAME = 253
# RFC 1123, and the underscore that some names have. Percent-encoding in a host is read in two ways.
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
PORTS = {None, 443, 8443}
LOCAL_NAMES = ("localhost", "local", "internal")


@dataclass(frozen=True)
class UrlPolicy:
    """What development may open: plain http, and the name `localhost` with any port."""

    allow_http: bool = False
    allow_localhost: bool = False

    def check(self, url: str) -> str:
        """The URL, if deliveries may be sent to it; raises `WebhookUrlRefused` with the reason."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise WebhookUrlRefused("The webhook URL cannot be parsed.") from None
        if reason := self._refusal(url, parts, port):
            raise WebhookUrlRefused(f"The webhook URL {reason}.")
        return url

    def check_optional(self, url: str | None) -> None:
        """The same for a URL that may be left out."""
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
        if not local and (_is_address(host) or not _is_public_name(host)):
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
