"""The only way to call a tenant's URL: at public addresses only, within 15 seconds and 64 KiB.

A tenant chooses the URL, and might choose one that only we can reach (OWASP: server-side request forgery).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv6Address, ip_network

from billing.errors import WebhookUrlRefused
from billing.outbound import (
    Address,
    AddressRefused,
    Bounds,
    CallTimedOut,
    ConnectFailed,
    ConnectionBroken,
    NameUnknown,
    OutboundError,
    Resolver,
    ResponseTooLarge,
    TlsFailed,
    UrlInvalid,
    tls_context,
)
from billing.post_client import Answer, PostClient
from billing.settings import Network
from billing.webhooks.delivery import Attempt, Failure
from billing.webhooks.endpoints import UrlPolicy

USER_AGENT = "billing-webhooks/1"
# An HTTP date has 29 characters (RFC 9110, 5.6.7).
LONGEST_RETRY_AFTER = 64
# Above it a status is not HTTP's (RFC 9110, 15); below 100 http.client rejects it.
GREATEST_STATUS = 599

# IANA, IPv4 Special-Purpose Address Registry; multicast; and Azure's, a public address that is local to each machine.
REFUSED_IPV4 = (
    "0.0.0.0/8",  # This network
    "10.0.0.0/8",  # Private
    "100.64.0.0/10",  # Carrier-grade NAT; 100.100.100.200 is Alibaba's metadata
    "127.0.0.0/8",  # Loopback
    "168.63.129.16/32",  # Azure's platform, as seen from its machines
    "169.254.0.0/16",  # Link-local; 169.254.169.254 is most clouds' metadata
    "172.16.0.0/12",  # Private
    "192.0.0.0/24",  # Protocol assignments; 192.0.0.192 is Oracle's metadata
    "192.0.2.0/24",  # Documentation
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # Automatic multicast tunnelling
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",  # Private
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # Benchmarking
    "198.51.100.0/24",  # Documentation
    "203.0.113.0/24",  # Documentation
    "224.0.0.0/4",  # Multicast
    "240.0.0.0/4",  # Reserved, and broadcast
)
# All global unicast addresses (RFC 4291). Outside of it: ::1, fe80::/10, fc00::/7, ff00::/8, and embedded IPv4: mapped
# (::ffff:0:0/96), translated (::ffff:0:0:0/96), compatible (::/96) and NAT64 (64:ff9b::/96, 64:ff9b:1::/48).
GLOBAL_IPV6 = "2000::/3"
# IANA, IPv6 Special-Purpose Address Registry: its entries within that block.
REFUSED_IPV6 = (
    "2001::/23",  # Protocol assignments: Teredo, benchmarking, AMT, AS112, ORCHID, ORCHIDv2, drones
    "2001:db8::/32",  # Documentation
    "2002::/16",  # 6to4: an IPv4 address in it
    "2620:4f:8000::/48",  # AS112
    "3ffe::/16",  # 6bone, given back (RFC 3701)
    "3fff::/20",  # Documentation
)
_REFUSED = tuple(ip_network(text) for text in (*REFUSED_IPV4, *REFUSED_IPV6))
_GLOBAL_IPV6 = ip_network(GLOBAL_IPV6)

FAILURES: dict[type[OutboundError], Failure] = {
    AddressRefused: "connection_failed",
    NameUnknown: "connection_failed",
    ConnectFailed: "connection_failed",
    TlsFailed: "tls_failed",
    CallTimedOut: "timeout",
    ConnectionBroken: "connection_broken",
    ResponseTooLarge: "connection_broken",
    UrlInvalid: "refused_url",
}


Post = Callable[[bytes, Mapping[str, str]], Attempt]
"""Posts a body with these headers; as `PostClient.post`, it may arrive twice."""


class Egress:
    """Sends to tenants' URLs, from any number of threads.

    `allow_networks` permits networks that are not public, for development. A name is called only if each of its
    addresses is permitted: `localhost` mostly needs both `127.0.0.0/8` and `::1/128`. `connect_seconds` bounds the
    lookup and each connection, `total_seconds` the whole attempt. Of a response's body `read_bytes` are read, so that
    most receivers can finish sending it, and `keep_bytes` are kept.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        allow_networks: Sequence[Network] = (),
        connect_seconds: float = 5,
        total_seconds: float = 15,
        read_bytes: int = 64 * 1024,
        keep_bytes: int = 4 * 1024,
        lookups: int = 16,
    ) -> None:
        self._policy = policy
        self._allow_networks = tuple(allow_networks)
        self._bounds = Bounds(
            connect_seconds, total_seconds, max_bytes=read_bytes, cut=True, permitted=self.permitted
        )
        self._keep_bytes = keep_bytes
        self._resolver = Resolver(lookups)
        self._tls = tls_context()

    def permitted(self, address: Address) -> bool:
        """Whether the address may be called: a public one, or one in `allow_networks`."""
        return is_public(address) or any(address in network for network in self._allow_networks)

    @contextmanager
    def to(self, url: str) -> Iterator[Post]:
        """A function that posts to this URL within the block, from any number of threads.

        Whatever the receiver does is reported in the `Attempt`, never raised. No state of one tenant's receiver reaches
        another's: what is kept between two attempts ends with the block.
        """
        client = self._client_to(url)
        if client is None:
            yield lambda _body, _headers: Attempt(None, "refused_url", 0)
            return
        with client:
            yield partial(self._attempt, client)

    def _client_to(self, url: str) -> PostClient | None:
        # Not raised on: an exception raised in the block would carry the refusal as its context.
        try:
            return PostClient(self._policy.check(url), self._bounds, resolver=self._resolver, tls=self._tls)
        except (WebhookUrlRefused, UrlInvalid):
            return None

    def _attempt(self, client: PostClient, body: bytes, headers: Mapping[str, str]) -> Attempt:
        began = time.monotonic()
        try:
            answer = client.post(body, {**headers, "User-Agent": USER_AGENT})
        except OutboundError as error:
            return Attempt(None, FAILURES[type(error)], _milliseconds_since(began))
        if answer.status > GREATEST_STATUS:
            return Attempt(None, "connection_broken", _milliseconds_since(began))
        return Attempt(
            answer.status,
            None,
            _milliseconds_since(began),
            answer.body[: self._keep_bytes],
            _retry_after(answer),
        )


def is_public(address: Address) -> bool:
    """Whether the address is global unicast, of no special purpose and with no IPv4 address in it."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    return not any(address in network for network in _REFUSED)


def _milliseconds_since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


def _retry_after(answer: Answer) -> str | None:
    given: str | None = answer.headers["Retry-After"]
    return given if given and len(given) <= LONGEST_RETRY_AFTER else None
