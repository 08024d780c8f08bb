"""Requests to tenants' URLs: to public addresses only, however they are written, and within the deadline."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Any, get_args

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from billing.outbound import Bounds, OutboundError, Resolver, Session, tls_context
from billing.post_client import PostClient
from billing.webhooks import egress as module
from billing.webhooks.delivery import Attempt, Failure
from billing.webhooks.egress import FAILURES, Egress, is_public
from billing.webhooks.endpoints import UrlPolicy
from tests import receivers
from tests.receivers import MEGABYTE, Behaviour, Names, answers, receiving

TOTAL_SECONDS = 0.3
# A busy machine must not fail a test.
LATE_SECONDS = 1
AMPLE_SECONDS = 5
LITTLE_MEMORY = 4 * MEGABYTE
NAME = "hooks.acme.example"
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
DEVELOPMENT = UrlPolicy(allow_http=True, allow_localhost=True)
PRODUCTION = Egress(UrlPolicy())
WITH_HTTP = Egress(UrlPolicy(allow_http=True))


# Connection attempts -----------------------------------------------------------------------------


@dataclass
class Connects:
    """Every address that this thread has tried to connect to; an audit hook can be neither bypassed nor removed."""

    tried: list[Any]
    thread: int | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and threading.get_ident() == self.thread:
            self.tried.append(arguments[1])


CONNECTS = Connects([])
sys.addaudithook(CONNECTS)


@pytest.fixture
def connects() -> Iterator[list[Any]]:
    CONNECTS.tried, CONNECTS.thread = [], threading.get_ident()
    yield CONNECTS.tried
    CONNECTS.thread = None


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[str]]], Names]:
    def resolve(addresses: dict[str, list[str]]) -> Names:
        stub = Names(addresses)
        monkeypatch.setattr(socket, "getaddrinfo", stub)
        return stub

    return resolve


@pytest.fixture(autouse=True)
def acme(names: Callable[[dict[str, list[str]]], Names]) -> Names:
    return names({NAME: ["127.0.0.1"], "localhost": ["::1", "127.0.0.1"]})


def development(**changes: Any) -> Egress:
    """An egress whose deadline is too far away to be hit by chance."""
    given = {"allow_networks": LOOPBACK, "connect_seconds": AMPLE_SECONDS, "total_seconds": AMPLE_SECONDS}
    return Egress(DEVELOPMENT, **{**given, **changes})


def hasty() -> Egress:
    return development(total_seconds=TOTAL_SECONDS)


def send(egress: Egress, url: str) -> Attempt:
    with egress.to(url) as post:
        return post(b"{}", {"webhook-id": "msg_1"})


def test_connections_are_recorded(connects: list[Any]) -> None:
    with receiving(answers()) as receiver:
        assert send(development(), receiver_url(receiver)).http_status == 200
    assert connects == [receiver.address]


def receiver_url(receiver: receivers.Receiver, scheme: str = "http") -> str:
    return f"{scheme}://{NAME}:{receiver.port}/in?a=1"


# Addresses ---------------------------------------------------------------------------------------

REFUSED = [
    *("0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.100.100.200"),
    *("100.127.255.255", "127.0.0.1", "127.255.255.255", "168.63.129.16", "169.254.0.0", "169.254.169.254"),
    *("169.254.170.2", "169.254.255.255", "172.16.0.0", "172.31.255.255", "192.0.0.1", "192.0.0.192"),
    *("192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.0.0", "192.168.255.255"),
    *("192.175.48.1", "198.18.0.0", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::7f00:1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8"),
    *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::7f00:1", "100::1", "100:0:0:1::1"),
    *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:3::1", "2001:4:112::1"),
    *("2001:10::1", "2001:20::1", "2001:30::1", "2001:1ff:ffff::1", "2001:db8::1", "2002:7f00:1::"),
    *("2002:808:808::", "2620:4f:8000::1", "3ffe::1", "3fff::1", "3fff:fff:ffff::1", "4000::1", "5f00::1"),
    *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "fe80::5efe:7f00:1", "fec0::1", "ff02::1"),
]
PUBLIC = [
    *("1.0.0.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255"),
    *("172.32.0.0", "192.0.1.0", "192.0.3.0", "192.167.255.255", "192.169.0.0", "198.17.255.255"),
    *("198.20.0.0", "223.255.255.255", "2000::1", "2001:200::1", "2001:4860:4860::8888", "2001:db7::1"),
    *("2001:db9::1", "2003::1", "2606:4700:4700::1111", "2620:4f:7fff::1", "2a00:1450:4001::1", "3ffd::1"),
    *("3fff:1000::1",),
]


@pytest.mark.parametrize("address", REFUSED)
def test_a_special_purpose_address_is_refused(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not PRODUCTION.permitted(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_permitted(address: str) -> None:
    assert is_public(ip_address(address))
    assert PRODUCTION.permitted(ip_address(address))


@pytest.mark.parametrize("network", [*module.REFUSED_IPV4, *module.REFUSED_IPV6])
def test_every_refused_network_is_covered(network: str) -> None:
    assert any(ip_address(address) in ip_network(network) for address in REFUSED)


def test_refused_and_public_addresses_agree_with_pythons_table() -> None:
    for network in module._REFUSED:
        if isinstance(network, IPv4Network):
            assert not is_public(network[0]) and not is_public(network[-1])
    # Python has its own table of the same registries.
    assert not [address for address in PUBLIC if not ip_address(address).is_global]


@pytest.mark.parametrize(
    ("address", "passes"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("8.8.8.8", True)),
        *(("::ffff:127.0.0.1", False), ("::7f00:1", False), ("10.0.0.1", False), ("::2", False)),
    ],
)
def test_development_permits_its_listed_networks(address: str, passes: bool) -> None:
    assert development().permitted(ip_address(address)) is passes


def test_localhost_needs_both_loopback_networks_permitted(connects: list[Any]) -> None:
    with receiving(answers()) as receiver:
        url = f"http://localhost:{receiver.port}/"
        assert send(development(allow_networks=LOOPBACK[:1]), url).error == "connection_failed"
        assert not connects
        assert send(development(), url).http_status == 200


# Hostile URLs ------------------------------------------------------------------------------------

# Each leads to an address that is not public: directly, or through a name that resolves to one.
HOSTILE = [
    "https://127.0.0.1/",
    "https://127.0.0.1:8443/",
    "https://127.0.0.1./",
    "https://127.1/",
    "https://127.0.1/",
    "https://127.000.000.001/",
    "https://2130706433/",
    "https://4294967295/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://0177.0.0.01/",
    "https://0x7f000001/",
    "https://0x7f.0x0.0x0.0x1/",
    "https://0X7F.0.0.1/",
    "https://0x7f.1/",
    "https://127.0.0.0x1/",
    "https://0/",
    "https://0.0.0.0/",
    "https://0x0/",
    "https://00000000000/",
    "https://10.0.0.1/",
    "https://10.1/",
    "https://0x0a000001/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://3232235777/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://2852039166/latest/meta-data/",
    "https://0xa9fea9fe/",
    "https://0xa9.0xfe.0xa9.0xfe/",
    "https://0251.0376.0251.0376/",
    "https://169.254.43518/",
    "https://169.16689662/",
    "https://168.63.129.16/metadata",
    "https://100.100.100.200/latest/",
    "https://192.0.0.192/opc/v2/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::]/",
    "https://[::1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[0000:0000:0000:0000:0000:0000:0000:0001]/",
    "https://[::127.0.0.1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:169.254.169.254]/",
    "https://[::FFFF:A9FE:A9FE]/",
    "https://[::ffff:0:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[64:ff9b:1::a9fe:a9fe]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25lo]/",
    "https://[fe80::1%lo]/",
    "https://[::1%25lo]/",
    "https://[fd00:ec2::254]/latest/meta-data/",
    "https://[ff02::1]/",
    "https://[::1]:8443/",
    "https://[::1/",
    "https://ada@127.0.0.1/",
    "https://ada:hunter2@127.0.0.1/",
    "https://good.example@127.0.0.1/",
    "https://good.example:443@127.0.0.1/",
    "https://good.example%40127.0.0.1/",
    "https://127.0.0.1#@good.example/",
    "https://127.0.0.1#.good.example/",
    "https://127.0.0.1?.good.example/",
    "https://127.0.0.1\\@good.example/",
    "https://127.0.0.1\\.good.example/",
    "https://127.0.0.1%2f.good.example/",
    "https://127.0.0.1%00.good.example/",
    "https://127.0.0.1\t.good.example/",
    "https://127.0.0.1\r\nHost: good.example/",
    "https://127.0.0.1 good.example/",
    "https:\\\\127.0.0.1\\",
    "https:127.0.0.1",
    "https:/127.0.0.1/",
    "https:///127.0.0.1/",
    "//127.0.0.1/",
    "https://%31%32%37.0.0.1/",
    "https://①②⑦.⓪.⓪.①/",
    "https://１２７.０.０.１/",
    "https://١٢٧.٠.٠.١/",
    "https://127。0。0。1/",
    "https://127．0．0．1/",
    "https://127｡0｡0｡1/",
    "https://ｌocalhost/",
    "https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://localhost:8443/",
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://printer.local/",
    "https://intranet/",
    "https://kubernetes.default.svc/",
    "https://xn--nxasmq6b.attacker.example/",
    "https://127.0.0.1.attacker.example/",
    "https://127-0-0-1.attacker.example/",
    "https://0x7f000001.attacker.example/",
    "https://localhost.attacker.example./",
    "https://metadata.attacker.example/latest/meta-data/",
    "https://six.attacker.example/",
    "https://mapped.attacker.example/",
    "https://nat64.attacker.example/",
    "https://mixed.attacker.example/",
    "https://mixed-too.attacker.example/",
    "https://link-local.attacker.example/",
    "https://MIXED.Attacker.Example:8443/",
    "http://127.0.0.1/",
    "http://localhost/",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "unix:///var/run/docker.sock",
]
LEADS_TO = {
    "localhost": ["::1", "127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "printer.local": ["192.168.1.9"],
    "intranet": ["10.0.0.9"],
    "kubernetes.default.svc": ["10.96.0.1"],
    "xn--nxasmq6b.attacker.example": ["127.0.0.1"],
    "127.0.0.1.attacker.example": ["127.0.0.1"],
    "127-0-0-1.attacker.example": ["127.0.0.1"],
    "0x7f000001.attacker.example": ["127.0.0.1"],
    "localhost.attacker.example": ["127.0.0.1"],
    "metadata.attacker.example": ["169.254.169.254"],
    "six.attacker.example": ["::1"],
    "mapped.attacker.example": ["::ffff:127.0.0.1"],
    "nat64.attacker.example": ["64:ff9b::a9fe:a9fe"],
    "mixed.attacker.example": ["8.8.8.8", "10.0.0.1"],
    "mixed-too.attacker.example": ["10.0.0.1", "8.8.8.8"],
    "link-local.attacker.example": ["fe80::1%lo"],
}


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_url_connects_to_nothing(
    url: str, connects: list[Any], names: Callable[[dict[str, list[str]]], Names]
) -> None:
    names(LEADS_TO)
    for egress in (PRODUCTION, WITH_HTTP):
        assert send(egress, url).error in ("refused_url", "connection_failed")
    assert not connects


@pytest.mark.parametrize("url", HOSTILE)
def test_the_address_rule_alone_blocks_hostile_urls(
    url: str, connects: list[Any], names: Callable[[dict[str, list[str]]], Names]
) -> None:
    names(LEADS_TO)
    with (
        Session(Bounds(1, 1, max_bytes=1, permitted=is_public)) as session,
        pytest.raises((requests.RequestException, UnicodeError)),
    ):
        session.post(url)
    assert not connects


@pytest.mark.parametrize("url", HOSTILE)
def test_the_post_clients_address_rule_alone_blocks_hostile_urls(
    url: str, connects: list[Any], names: Callable[[dict[str, list[str]]], Names]
) -> None:
    names(LEADS_TO)
    with pytest.raises(OutboundError), client_for(url) as opened:
        opened.post(b"{}", {})
    assert not connects


def client_for(url: str) -> PostClient:
    return PostClient(
        url,
        Bounds(1, 1, max_bytes=1, cut=True, permitted=is_public),
        resolver=Resolver(),
        tls=tls_context(),
    )


def test_at_least_100_hostile_urls_are_listed() -> None:
    assert len(set(HOSTILE)) >= 100


@pytest.mark.parametrize("address", REFUSED)
def test_a_name_that_resolves_to_a_special_purpose_address_is_refused(
    address: str, connects: list[Any], names: Callable[[dict[str, list[str]]], Names]
) -> None:
    for addresses in ([address], ["8.8.8.8", address], [address, "2606:4700:4700::1111"]):
        names({NAME: addresses})
        assert send(PRODUCTION, f"https://{NAME}/").error == "connection_failed"
    assert not connects


def test_the_address_connected_to_is_the_one_checked(
    connects: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name server that returns the permitted address once, and another from then on.
    addresses = iter(["127.0.0.2", *["127.0.0.3"] * 9])
    stub = Names({})
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: stub(next(addresses), port))
    egress = development(allow_networks=[ip_network("127.0.0.2/32")])
    with receiving(answers(), host="127.0.0.2") as receiver:
        assert send(egress, receiver_url(receiver)).http_status == 200
        assert send(egress, receiver_url(receiver)).error == "connection_failed"
    assert connects == [("127.0.0.2", receiver.port)]


def test_a_redirect_is_not_followed(connects: list[Any]) -> None:
    for status in (301, 302, 303, 307, 308):
        with receiving(answers(status, Location="http://169.254.169.254/")) as receiver:
            assert send(development(), receiver_url(receiver)).http_status == status
        assert connects.pop() == receiver.address
    assert not connects


def test_connection_failed_does_not_reveal_the_cause(names: Callable[[dict[str, list[str]]], Names]) -> None:
    with receiving(answers()) as receiver:
        closed = receiver.port
    names({"private.example": ["10.0.0.1"], "closed.example": ["127.0.0.1"]})
    attempts = [
        send(development(), f"http://{host}:{closed}/")
        for host in ("private.example", "closed.example", "unknown.example")
    ]
    assert {(one.http_status, one.error, one.body, one.retry_after) for one in attempts} == {
        (None, "connection_failed", b"", None)
    }


def test_every_outbound_error_has_a_failure_code() -> None:
    assert set(FAILURES) == set(OutboundError.__subclasses__())
    assert {*FAILURES.values(), "refused_url"} == set(get_args(Failure))


# Receivers ---------------------------------------------------------------------------------------


def test_a_delivery_arrives_as_it_was_signed() -> None:
    headers = {"webhook-id": "msg_1", "Content-Type": "application/json"}
    with (
        receiving(answers(202, b"thanks", Set_Cookie="a=b")) as receiver,
        development().to(receiver_url(receiver)) as post,
    ):
        attempt = [post(b'{"a": "\xc3\xa4"}', headers) for _ in range(2)][-1]
    assert (attempt.http_status, attempt.error, attempt.body) == (202, None, b"thanks")
    assert (receiver.last.method, receiver.last.path) == ("POST", "/in?a=1")
    assert receiver.last.body == b'{"a": "\xc3\xa4"}'
    assert dict(receiver.last.headers.items()) == {
        "Host": f"{NAME}:{receiver.port}",
        "Accept-Encoding": "identity",
        "webhook-id": "msg_1",
        "Content-Type": "application/json",
        "User-Agent": "billing-webhooks/1",
        "Content-Length": "11",
    }


def test_connections_are_reused_within_a_block_and_closed_after_it() -> None:
    egress = development()
    with receiving(answers()) as receiver:
        for turn in (1, 2):
            with egress.to(receiver_url(receiver)) as post:
                assert [post(b"{}", {}).http_status for _ in range(3)] == [200] * 3
            assert receiver.ended.acquire(timeout=AMPLE_SECONDS)
            assert receiver.connections == turn


def test_each_block_resolves_the_name_again(acme: Names) -> None:
    egress = development()
    with receiving(answers(Connection="close")) as receiver:
        for _ in range(2):
            with egress.to(receiver_url(receiver)) as post:
                assert [post(b"{}", {}).http_status for _ in range(3)] == [200] * 3
    assert acme.looked_up == [NAME, NAME]


@pytest.mark.parametrize("url", [f"https://{NAME}/", "https:///", "ftp://files.example/"])
def test_an_error_raised_in_a_block_has_no_refusal_as_its_context(url: str) -> None:
    with pytest.raises(LookupError) as raised, development().to(url):
        raise LookupError
    assert raised.value.__context__ is None


@pytest.mark.parametrize("status", [200, 204, 301, 400, 410, 500, 503])
def test_any_status_is_returned_without_an_error(status: int) -> None:
    with receiving(answers(status, b"")) as receiver:
        attempt = send(development(), receiver_url(receiver))
    assert (attempt.http_status, attempt.error, attempt.retry_after) == (status, None, None)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("7", "7"),
        ("Sun, 06 Nov 2033 08:49:37 GMT", "Sun, 06 Nov 2033 08:49:37 GMT"),
        ("soon", "soon"),
        ("9" * 64, "9" * 64),
        ("9" * 65, None),
        ("", None),
    ],
)
def test_retry_after_is_passed_on_unparsed(given: str, kept: str | None) -> None:
    with receiving(answers(429, Retry_After=given)) as receiver:
        attempt = send(development(), receiver_url(receiver))
    assert (attempt.http_status, attempt.retry_after) == (429, kept)


BAD: list[tuple[Behaviour, int | None, Failure | None]] = [
    (receivers.resets, None, "connection_broken"),
    (receivers.hangs, None, "timeout"),
    (receivers.drips_head, None, "timeout"),
    (receivers.drips_body, None, "timeout"),
    (receivers.drips_until_the_end, None, "timeout"),
    (receivers.floods(), 200, None),
    (receivers.floods(302, Location="http://127.0.0.1:9/"), 302, None),
    (receivers.sends_bomb, 200, None),
    (receivers.floods_head, None, "connection_broken"),
    (receivers.floods_continue, None, "connection_broken"),
    (receivers.floods_negative_chunk, None, "connection_broken"),
    (receivers.floods_trailers, None, "connection_broken"),
    (receivers.says(b""), None, "connection_broken"),
    (receivers.says(b"HTTP/1.1 abc\r\n\r\n"), None, "connection_broken"),
    (receivers.sends_head(receivers.nested_parts(300)), None, "connection_broken"),
    (receivers.says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), None, "connection_broken"),
]


@pytest.mark.parametrize(("behave", "status", "error"), BAD)
def test_a_bad_receiver_costs_little_time_and_memory(
    behave: Behaviour, status: int | None, error: Failure | None
) -> None:
    receivers.bomb()
    egress = hasty() if error == "timeout" else development()
    with receiving(behave) as receiver:
        tracemalloc.start()
        attempt = send(egress, receiver_url(receiver))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (attempt.http_status, attempt.error) == (status, error)
    assert len(attempt.body) == (4096 if status else 0)
    assert attempt.duration_ms < 1000 * (
        LATE_SECONDS + (TOTAL_SECONDS if error == "timeout" else AMPLE_SECONDS)
    )
    assert peak < LITTLE_MEMORY


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Type: multipart/x; boundary*=\x00''z"],
        [b"content-type: multipart/x; boundary*" + b"9" * 5_000 + b"=z"],
        [b"Content-Type: multipart/x; boundary=a", b"no header", b"--a", b"Content-Type: message/rfc822"],
        [b"X-Before: 1", b"Content-Type: application/json", b"X-After: 2"],
        [b"Content-Length: 0", b"Content-Type: text/plain;", b" charset=utf-8"],
    ],
)
def test_a_response_head_that_is_not_valid_mime_is_accepted(lines: list[bytes]) -> None:
    with receiving(receivers.sends_head(*lines)) as receiver:
        assert send(development(), receiver_url(receiver)).http_status == 204


def test_an_immediately_reset_connection_is_a_failure() -> None:
    with receiving(receivers.resets_at_once) as receiver:
        assert send(development(), receiver_url(receiver)).error in ("connection_failed", "connection_broken")


def test_a_compressed_body_is_kept_undecoded() -> None:
    with receiving(receivers.sends_bomb) as receiver:
        assert send(development(), receiver_url(receiver)).body == receivers.bomb()[:4096]


def test_keep_bytes_and_read_bytes_limit_the_body() -> None:
    with receiving(answers(200, b"x" * 100)) as receiver:
        assert send(development(keep_bytes=10), receiver_url(receiver)).body == b"x" * 10
        assert send(development(read_bytes=20), receiver_url(receiver)).body == b"x" * 20


def test_the_duration_is_reported() -> None:
    with receiving(receivers.hangs) as receiver:
        attempt = send(development(total_seconds=0.2), receiver_url(receiver))
    assert 190 <= attempt.duration_ms < 200 + LATE_SECONDS * 1000


def test_a_bad_receiver_does_not_delay_other_deliveries() -> None:
    egress = development(total_seconds=2)
    with receiving(answers()) as good, receiving(receivers.drips_body) as bad:
        urls = [receiver_url(bad if number % 20 == 0 else good) for number in range(200)]
        began = time.monotonic()
        with ThreadPoolExecutor(64) as threads:
            attempts = list(threads.map(lambda url: send(egress, url), urls))
    assert time.monotonic() - began < 2 + 2 * LATE_SECONDS
    assert [one.error for one in attempts] == [
        None if url == receiver_url(good) else "timeout" for url in urls
    ]


# TLS ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the test's own."""

    directory: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def path(self) -> Path:
        return self.directory / "authority.pem"

    def server(self, name: str, *, days: int = 1) -> ssl.SSLContext:
        """TLS of a server for this name; with a negative number of days its certificate has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = certificate_of(name, key, self.key, days=days)
        pem = self.directory / f"{name}.pem"
        pem.write_bytes(pem_of(key) + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_of(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, days: int = 1
) -> x509.Certificate:
    is_authority = key is signer
    until = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - dt.timedelta(days=9))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(signer, hashes.SHA256())
    )


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    made = Authority(tmp_path, key)
    made.path.write_bytes(certificate_of("authority", key, key).public_bytes(serialization.Encoding.PEM))
    monkeypatch.setattr("requests.utils.DEFAULT_CA_BUNDLE_PATH", str(made.path))
    return made


@pytest.mark.parametrize("written", [NAME, f"{NAME}."])
def test_sni_and_the_host_header_carry_the_host_name(
    authority: Authority, names: Callable[[dict[str, list[str]]], Names], written: str
) -> None:
    names({written: ["127.0.0.1"]})
    said: list[str | None] = []
    context = authority.server(NAME)
    context.sni_callback = lambda _, name, __: said.append(name)
    with receiving(answers(), tls=context) as receiver:
        url = receiver_url(receiver, "https").replace(NAME, written)
        assert send(development(), url).http_status == 200
    assert said == [NAME]
    assert receiver.last.headers["Host"] == f"{NAME}:{receiver.port}"


def test_an_early_answer_to_the_request_head_is_read_over_tls(authority: Authority) -> None:
    with (
        receiving(receivers.answers_head(410), tls=authority.server(NAME)) as receiver,
        development().to(receiver_url(receiver, "https")) as post,
    ):
        # More than the socket buffers hold.
        assert post(b"x" * 50 * MEGABYTE, {}).http_status == 410


def test_a_wrong_or_expired_certificate_is_refused(authority: Authority) -> None:
    for context in (authority.server("other.example"), authority.server(NAME, days=-1)):
        with receiving(answers(), tls=context) as receiver:
            assert send(development(), receiver_url(receiver, "https")).error == "tls_failed"
            assert not receiver.received


def test_a_certificate_of_an_unknown_authority_is_refused(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(socket, "getaddrinfo", Names({NAME: ["127.0.0.1"]}))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.path))
    with receiving(answers(), tls=authority.server(NAME)) as receiver:
        assert send(development(), receiver_url(receiver, "https")).error == "tls_failed"


@pytest.mark.parametrize("connections", [1, 3])
def test_a_tls_connection_is_reused_like_any_other(authority: Authority, connections: int) -> None:
    behave = answers() if connections == 1 else receivers.says(receivers.head(200, {"Content-Length": "0"}))
    with (
        receiving(behave, tls=authority.server(NAME)) as receiver,
        development().to(receiver_url(receiver, "https")) as post,
    ):
        for _ in range(3):
            assert post(b"{}", {}).http_status == 200
            assert connections == 1 or receiver.ended.acquire(timeout=AMPLE_SECONDS)
        assert receiver.last.headers["Host"] == f"{NAME}:{receiver.port}"
    assert receiver.connections == connections


def test_a_receiver_without_tls_is_tls_failed() -> None:
    with receiving(receivers.greets(b"220 smtp.acme.example\r\n")) as receiver:
        assert send(development(), receiver_url(receiver, "https")).error == "tls_failed"


@pytest.mark.parametrize("behave", [receivers.hangs, receivers.drips_handshake])
def test_an_endless_tls_handshake_times_out(behave: Behaviour) -> None:
    with receiving(behave) as receiver:
        attempt = send(hasty(), receiver_url(receiver, "https"))
    assert attempt.error == "timeout"
    assert attempt.duration_ms < (TOTAL_SECONDS + LATE_SECONDS) * 1000


@pytest.mark.parametrize(
    "behave", [receivers.drips_head, receivers.drips_body, receivers.drips_until_the_end]
)
def test_a_slowly_sent_tls_response_times_out(authority: Authority, behave: Behaviour) -> None:
    with receiving(behave, tls=authority.server(NAME)) as receiver:
        attempt = send(hasty(), receiver_url(receiver, "https"))
    assert attempt.error == "timeout"
    assert attempt.duration_ms < (TOTAL_SECONDS + LATE_SECONDS) * 1000


def test_many_threads_share_the_trust_store(authority: Authority) -> None:
    egress = development(total_seconds=2 * AMPLE_SECONDS)
    with receiving(answers(), tls=authority.server(NAME)) as receiver, ThreadPoolExecutor(32) as threads:
        attempts = list(threads.map(lambda _: send(egress, receiver_url(receiver, "https")), range(100)))
    assert [one.http_status for one in attempts] == [200] * 100
