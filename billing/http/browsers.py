"""The browser behind a request: whether it wants a page, and the cookie that ties a callback to its start."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

# The prefix keeps a neighbouring subdomain from setting it (RFC 6265bis, section 4.1.3.2). Lax, because it
# must be sent when Stripe redirects the browser back.
COOKIE = "__Host-connect"
# Max-Age is the state's lifetime: ten minutes.
ATTRIBUTES = "; Secure; HttpOnly; SameSite=Lax; Path=/; Max-Age=600"
BINDING_BYTES = 32
# A browser sends 100 to 200 characters; werkzeug takes 60 ms to choose among thousands of media types.
LONGEST_ACCEPT = 1024
BINDING = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Browser:
    """What a browser says of itself. `host` is that of the requesting page, if the request is same-origin."""

    prefers_html: bool = False
    host: str | None = None
    binding: str | None = None

    def bind_at(self, base_url: str) -> str | None:
        """What to bind a flow to that returns to `base_url`; None where the cookie would not be sent there.

        A fetch from another origin discards the cookie: a bound state would then refuse its honest owner.
        """
        if self.host != urlsplit(base_url).netloc:
            return None
        return self.binding or secrets.token_urlsafe(BINDING_BYTES)


def browser_of(headers: Headers) -> Browser:
    """The browser, or any other client, that sent these headers."""
    accepted = parse_accept_header(headers.get("accept", "")[:LONGEST_ACCEPT], MIMEAccept)
    preferred = accepted.best_match(["application/json", "text/html"])
    is_our_page = headers.get("sec-fetch-site") == "same-origin"
    origin = headers.get("origin")
    # Not http.cookies, which takes a second to unquote a long cookie (CVE-2024-7592): ours has no quotes.
    cookies = dict(pair.strip().partition("=")[::2] for pair in headers.get("cookie", "").split(";"))
    binding = cookies.get(COOKIE, "")
    return Browser(
        prefers_html=preferred == "text/html",
        host=(origin.partition("://")[2] if origin else headers.get("host")) if is_our_page else None,
        binding=binding if BINDING.fullmatch(binding) else None,
    )


def cookie(binding: str) -> str:
    """The value of Set-Cookie that gives a browser its binding."""
    return f"{COOKIE}={binding}{ATTRIBUTES}"
