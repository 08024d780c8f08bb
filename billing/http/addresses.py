"""Where a request comes from: its client's address, and the network that limits count it under."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import Scope

from billing.http.headers import Headers, texts
from billing.settings import Network

IPV6_HOST_BITS = 64


def client_address(scope: Scope, trusted_proxies: Sequence[Network]) -> str | None:
    """The client's address: the peer's, or that reported by trusted proxies; None on a Unix socket.

    X-Forwarded-For is read from the right: each trusted proxy appended its own peer's address. The client may
    have forged anything to the left of the first untrusted address.
    """
    if not scope.get("client"):
        return None
    peer: str = scope["client"][0]
    address = parse_address(peer)
    hops = forwarded_for(scope["headers"]) if trusted_proxies else []
    while hops and any(address in network for network in trusted_proxies if address):
        hop = parse_address(hops.pop())
        if hop is None:
            break
        address = hop
    return str(address or peer)


def forwarded_for(headers: Headers) -> list[str]:
    """The hops of X-Forwarded-For, the nearest last; several headers are one list (RFC 9110, section 5.3)."""
    lines = texts(headers, b"x-forwarded-for")
    return ",".join(lines).split(",") if lines else []


@lru_cache(maxsize=1024)
def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """The address in `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1` or `[2001:db8::1]:80`, else None."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A dual-stack socket shows IPv4 peers as ::ffff:192.0.2.1, which no IPv4 network contains.
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """The address itself; for IPv6 its /64, as one customer has all of it and may use any address in it."""
    parsed = parse_address(address)
    if parsed is None or parsed.version == 4:
        return address
    return f"{int(parsed) >> IPV6_HOST_BITS:x}::/64"
