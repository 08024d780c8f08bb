"""Requests that no well-behaved client sends, byte by byte, to the server as it is run.

The answer is never a 5xx; an error is a problem with a request id, and repeats nothing of what was sent;
and the connection is either closed or usable for the next request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
import requests

from billing.keyrings import Keyring
from billing.settings import Settings
from billing.tokens import ACCESS, REFRESH
from tests.conftest import API, PASSWORD
from tests.rawhttp import Address, Answer, Connection, chunked, request

# Part of what is sent, and never of an answer.
MARK = "hunter2hunter2"
JSON = "Content-Type: application/json"
PROBLEM = "application/problem+json"
MAX_BODY = 64 * 1024
CREDENTIALS = {"email": f"{MARK}@acme.example", "password": MARK}
LOGIN = json.dumps(CREDENTIALS).encode()

ARRIVED = (401, "invalid-credentials")  # The body was read and understood; no user has these credentials.
MALFORMED = (400, "malformed-body")
INVALID = (400, "invalid-request")
NOT_FOUND = (404, "not-found")
NOT_ALLOWED = (405, "method-not-allowed")
TOO_LARGE = (413, "payload-too-large")
UNSUPPORTED = (415, "unsupported-media-type")
HEADERS_TOO_LARGE = (431, "request-headers-too-large")
MISSING = (401, "credentials-missing")
BAD_TOKEN = (401, "token-invalid")
BAD_KEY = (401, "key-malformed")

Expected = tuple[int, str]


# Fixtures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(live_server_url: str) -> Address:
    url = urlsplit(live_server_url)
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


@pytest.fixture(scope="module")
def owner(live_server_url: str) -> dict[str, Any]:
    """What `register_tenant` answered to the owner of a tenant."""
    body = {"company_name": "Acme Inc.", "email": "probes@acme.example", "password": PASSWORD}
    registered: dict[str, Any] = requests.post(
        f"{live_server_url}{API}/register/", json=body, timeout=5
    ).json()
    return registered


@pytest.fixture(scope="module")
def bearer(owner: dict[str, Any]) -> str:
    return f"Authorization: Bearer {owner['tokens']['access']}"


# Sending -----------------------------------------------------------------------------------------


def probe(address: Address, *packets: bytes) -> Answer:
    """Send the packets; return the answer, once it and its connection are checked."""
    with Connection(address) as connection:
        connection.send(*packets)
        answer = connection.receive(to_head=packets[0].startswith(b"HEAD "))
        require_sound(answer)
        if answer["connection"] == "close":
            assert connection.is_closed_by_server()
        else:
            connection.send(request("GET", "/healthz"))
            assert connection.receive().status == 200
        return answer


def require_sound(answer: Answer) -> None:
    """Check what is true of every answer."""
    assert answer.status < 500
    assert answer["x-request-id"]
    assert MARK.encode() not in answer.body + str(answer.headers).encode()
    if answer.status >= 400:
        assert answer["content-type"] == PROBLEM
    if answer.status >= 400 and answer.body:
        assert answer.json()["request_id"] == answer["x-request-id"]


def outcome(answer: Answer) -> Expected:
    return answer.status, answer.code


def get(target: str, *headers: str) -> bytes:
    return request("GET", target, *headers)


def log_in(*headers: str, body: bytes = LOGIN) -> bytes:
    return request("POST", f"{API}/login/", *headers, body=body)


# Bodies ------------------------------------------------------------------------------------------


def padded(size: int) -> bytes:
    return LOGIN.ljust(size)


def with_email(raw: bytes) -> bytes:
    """The body of a login with these raw bytes as its email."""
    return b'{"email": %b, "password": "%b"}' % (raw, MARK.encode())


BODIES: dict[str, tuple[bytes, Expected]] = {
    "no content": (b"", INVALID),
    "65,536 bytes": (padded(MAX_BODY), ARRIVED),
    "65,537 bytes": (padded(MAX_BODY + 1), TOO_LARGE),
    "a member twice": (b'{"email": "x@y.example", ' + LOGIN[1:], ARRIVED),
    "invalid UTF-8": (with_email(b'"\xff"'), MALFORMED),
    "an overlong slash": (with_email(b'"\xc0\xaf"'), MALFORMED),
    "a surrogate in UTF-8": (with_email(b'"\xed\xa0\x80"'), MALFORMED),
    "a byte order mark": (b"\xef\xbb\xbf" + LOGIN, MALFORMED),
    "UTF-16, undeclared": (LOGIN.decode().encode("utf-16"), MALFORMED),
    "a lone surrogate, escaped": (with_email(rb'"\ud800"'), MALFORMED),
    "NUL, escaped": (with_email(rb'"x\u0000@y.example"'), MALFORMED),
    "NUL, escaped, in a name": (b'{"a\\u0000": 1, ' + LOGIN[1:], MALFORMED),
    "NUL": (with_email(b'"x\0@y.example"'), MALFORMED),
    "nested 100,000 deep": (b"[" * 100_000, TOO_LARGE),
    "nested 60,000 deep": (with_email(b"[" * 30_000 + b"]" * 30_000), MALFORMED),
    "nested 500 deep": (with_email(b"[" * 500 + b"]" * 500), MALFORMED),
    "nested 129 deep": (with_email(b'{"a":' * 128 + b"1" + b"}" * 128), MALFORMED),
    "nested 128 deep": (with_email(b'{"a":' * 127 + b"1" + b"}" * 127), INVALID),
    "a number of 5,000 digits": (with_email(b"1" * 5_000), MALFORMED),
    "NaN": (with_email(b"NaN"), MALFORMED),
    "Infinity": (with_email(b"-Infinity"), MALFORMED),
    "1e400": (with_email(b"1e400"), MALFORMED),
    "null": (b"null", INVALID),
    "a list": (b"[]", INVALID),
    "a text": (f'"{MARK}"'.encode(), INVALID),
    "a comma too many": (LOGIN[:-1] + b",}", MALFORMED),
    "two values": (LOGIN + LOGIN, MALFORMED),
    "single quotes": (LOGIN.replace(b'"', b"'"), MALFORMED),
    "an unknown member": (json.dumps({**CREDENTIALS, MARK: MARK}).encode(), INVALID),
    "a member with a slash": (json.dumps({**CREDENTIALS, f"a/~{MARK}": 1}).encode(), INVALID),
}


@pytest.mark.parametrize(("body", "expected"), BODIES.values(), ids=BODIES)
def test_a_body_gets_the_expected_answer(address: Address, body: bytes, expected: Expected) -> None:
    assert outcome(probe(address, log_in(JSON, body=body))) == expected


@pytest.mark.parametrize(
    "number", [b"1" * 5_000, b"-" + b"9" * 400, b"1e400", b"-0.5", b"1e3", b"18446744073709551616", b"true"]
)
def test_400_for_a_grace_period_that_is_not_a_whole_number(
    address: Address, bearer: str, number: bytes
) -> None:
    body = b'{"key_type": "test", "confirm": true, "grace_period_seconds": %b}' % number
    answer = probe(address, request("POST", f"{API}/api-keys/regenerate/", JSON, bearer, body=body))
    assert answer.status == 400 or (answer.status == 200 and float(number).is_integer())


CONTENT_TYPES: dict[str, tuple[list[str], Expected]] = {
    "none": ([], UNSUPPORTED),
    "two": ([JSON, "Content-Type: text/plain"], UNSUPPORTED),
    "two of the same": ([JSON, JSON], UNSUPPORTED),
    "two in one": (["Content-Type: application/json, application/json"], UNSUPPORTED),
    "capitals": (["Content-Type: APPLICATION/JSON"], ARRIVED),
    "UTF-8, quoted, in capitals": (['CONTENT-TYPE: Application/Json; Charset="UTF-8"'], ARRIVED),
    "UTF-16": (["Content-Type: application/json; charset=utf-16"], UNSUPPORTED),
    "an unknown charset": ([f"Content-Type: application/json; charset={MARK}"], UNSUPPORTED),
    "a form": (["Content-Type: application/x-www-form-urlencoded"], UNSUPPORTED),
    "a form of parts": ([f"Content-Type: multipart/form-data; boundary={MARK}"], UNSUPPORTED),
    "other JSON": (["Content-Type: application/merge-patch+json"], UNSUPPORTED),
    "an invalid type": (["Content-Type: \xff\xfe"], UNSUPPORTED),
    "packed with gzip": ([JSON, "Content-Encoding: gzip"], UNSUPPORTED),
}


@pytest.mark.parametrize(("headers", "expected"), CONTENT_TYPES.values(), ids=CONTENT_TYPES)
def test_a_content_type_gets_the_expected_answer(
    address: Address, headers: list[str], expected: Expected
) -> None:
    assert outcome(probe(address, log_in(*headers))) == expected


@pytest.mark.parametrize("path", ["/stripe/connect/", "/webhooks/test/"])
@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_an_empty_body_counts_as_no_body(
    address: Address, bearer: str, path: str, content_type: str | None
) -> None:
    headers = [f"Content-Type: {content_type}"] if content_type else []
    with Connection(address) as connection:
        connection.send(request("POST", f"{API}{path}", bearer, "Content-Length: 0", *headers))
        assert connection.receive().status not in (400, 415, 500)


# Framing -----------------------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
FRAMINGS: dict[str, tuple[bytes, Expected]] = {
    "chunks": (log_in(JSON, CHUNKED, body=chunked(LOGIN[:9], LOGIN[9:])), ARRIVED),
    "chunks of one byte": (log_in(JSON, CHUNKED, body=chunked(*(b"%c" % byte for byte in LOGIN))), ARRIVED),
    "chunks with extensions": (
        log_in(JSON, CHUNKED, body=b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(LOGIN), LOGIN)),
        ARRIVED,
    ),
    "a trailer": (
        log_in(JSON, CHUNKED, body=chunked(LOGIN)[:-2] + b"Content-Type: text/plain\r\n\r\n"),
        ARRIVED,
    ),
    "more chunks than 64 KiB": (log_in(JSON, CHUNKED, body=chunked(*[b" " * 8_192] * 9)), TOO_LARGE),
    "a chunk of an invalid size": (log_in(JSON, CHUNKED, body=b"hunter2\r\n"), INVALID),
    "a chunk of endless size": (log_in(JSON, CHUNKED, body=b"f" * 20 + b"\r\n"), INVALID),
    "a chunk longer than it says": (log_in(JSON, CHUNKED, body=b"2\r\n{}{}\r\n0\r\n\r\n"), INVALID),
    "chunks inside of gzip": (
        log_in(JSON, "Transfer-Encoding: gzip, chunked", body=chunked(LOGIN)),
        UNSUPPORTED,
    ),
    "both a length and chunks": (log_in(JSON, CHUNKED, "Content-Length: 4", body=chunked(LOGIN)), INVALID),
    "two lengths": (log_in(JSON, "Content-Length: 2", "Content-Length: 4"), INVALID),
    "a negative length": (log_in(JSON, "Content-Length: -1"), INVALID),
    "a length of letters": (log_in(JSON, "Content-Length: 0x10"), INVALID),
    "a length of 60 digits": (log_in(JSON, f"Content-Length: {'9' * 60}", body=b""), INVALID),
    "a header folded": (log_in(JSON + "\r\n folded: hunter2hunter2"), INVALID),
    "a blank before the colon": (log_in("Content-Type : application/json"), INVALID),
    "a header of no name": (log_in(f": {MARK}"), INVALID),
    "NUL in a header": (log_in(JSON, f"X-Other: {MARK}\0"), INVALID),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", INVALID),
    "two Hosts": (get("/", f"Host: {MARK}"), INVALID),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", INVALID),
    "HTTP/9.9": (request("GET", "/", version="9.9"), INVALID),
    "HTTP/0.9": (b"GET /\r\n\r\n", INVALID),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 32, INVALID),
    "nonsense": (b"hunter2hunter2\r\n\r\n", INVALID),
}


@pytest.mark.parametrize(("sent", "expected"), FRAMINGS.values(), ids=FRAMINGS)
def test_a_framing_gets_the_expected_answer(address: Address, sent: bytes, expected: Expected) -> None:
    assert outcome(probe(address, sent)) == expected


def test_an_upgrade_to_http_2_is_ignored_and_the_body_read(address: Address) -> None:
    """As Java's HttpClient sends every POST."""
    upgrade = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB"]
    assert outcome(probe(address, log_in(JSON, *upgrade))) == ARRIVED


def test_100_is_sent_before_the_body(address: Address) -> None:
    with Connection(address) as connection:
        connection.send(log_in(JSON, "Expect: 100-continue", f"Content-Length: {len(LOGIN)}", body=b""))
        assert connection.receive().status == 100
        connection.send(LOGIN)
        assert outcome(connection.receive()) == ARRIVED


def test_413_is_sent_instead_of_100(address: Address) -> None:
    sent = log_in(JSON, "Expect: 100-continue", f"Content-Length: {MAX_BODY + 1}", body=b"")
    with Connection(address) as connection:
        connection.send(sent)
        assert outcome(connection.receive()) == TOO_LARGE
        assert connection.is_closed_by_server()


def test_a_body_of_a_gigabyte_is_refused_unread(address: Address) -> None:
    with Connection(address) as connection:
        connection.send(log_in(JSON, "Content-Length: 1000000000", body=b""))
        answer = connection.receive()
    require_sound(answer)
    assert outcome(answer) == TOO_LARGE


def test_pipelined_requests_are_answered_in_order(address: Address) -> None:
    with Connection(address) as connection:
        connection.send(log_in(JSON) + get("/nothing/") + log_in() + get("/healthz"))
        answers = [connection.receive() for _ in range(4)]
    assert [answer.status for answer in answers] == [401, 404, 415, 200]


def test_http_1_0_is_answered_and_closed(address: Address) -> None:
    with Connection(address) as connection:
        connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.receive().status == 200
        assert connection.is_closed_by_server()


def test_a_slow_body_is_waited_for(address: Address) -> None:
    sent = log_in(JSON)
    with Connection(address) as connection:
        connection.send(sent[:20], sent[20:-9], sent[-9:-5], sent[-5:], pause_seconds=0.2)
        assert outcome(connection.receive()) == ARRIVED


def test_a_client_that_disconnects_does_not_disturb_others(address: Address) -> None:
    for sent in (log_in(JSON)[:-5], log_in(JSON)[:30], log_in(JSON)):
        with Connection(address) as connection:
            connection.send(sent)
    assert probe(address, get("/healthz")).status == 200


# Targets -----------------------------------------------------------------------------------------

ME = f"{API}/me/"
TARGETS: dict[str, tuple[str, Expected]] = {
    "an absolute form": (f"http://{MARK}.example{ME}", MISSING),
    "an absolute form to nowhere": (f"http://{MARK}.example/nothing/", NOT_FOUND),
    "an asterisk": ("*", NOT_FOUND),
    "no slash at the end": (ME[:-1], NOT_FOUND),
    "two slashes": (f"/{ME}", NOT_FOUND),
    "two slashes inside": (ME.replace("/me", "//me"), NOT_FOUND),
    "a dot": (f"/.{ME}", NOT_FOUND),
    "two dots": (f"{API}/../tenants/me/", NOT_FOUND),
    "two dots, encoded": (f"{API}/%2e%2e/tenants/me/", NOT_FOUND),
    "capitals": (ME.upper(), NOT_FOUND),
    "a slash, encoded": (f"{API}%2Fme/", NOT_FOUND),
    "a letter, encoded": (ME.replace("me", "%6De"), MISSING),
    "a semicolon": (f"{ME};{MARK}", NOT_FOUND),
    "NUL": (f"{ME}%00", NOT_FOUND),
    "invalid UTF-8": (f"{ME}%ff", NOT_FOUND),
    "a surrogate": (f"{ME}%ED%A0%80", NOT_FOUND),
    "bad percent-encoding": (f"{ME}%zz%", NOT_FOUND),
    "a backslash": (f"{ME}\\..", NOT_FOUND),
    "raw bytes": (f"{ME}\xff", INVALID),
    "a template": ("/{tenant}/{{7*7}}", NOT_FOUND),
    "40,000 letters": (f"/{'a' * 40_000}", HEADERS_TOO_LARGE),
    "a query of 40,000 letters": (f"{ME}?{'a' * 40_000}", HEADERS_TOO_LARGE),
    "a query with NUL": (f"{ME}?a=%00{MARK}", INVALID),
    "a query of invalid UTF-8": (f"{ME}?a=%ff{MARK}", INVALID),
    "a query with a surrogate": (f"{ME}?a=%ED%A0%80{MARK}", INVALID),
}


@pytest.mark.parametrize(("target", "expected"), TARGETS.values(), ids=TARGETS)
def test_a_target_gets_the_expected_answer_and_no_redirect(
    address: Address, target: str, expected: Expected
) -> None:
    answer = probe(address, get(target))
    assert outcome(answer) == expected
    assert answer["location"] is None


@pytest.mark.parametrize(
    "query", ["a=1", "a=1&a=2", MARK, "", "&", "&&==", "%zz", "a[]=1", f"X-API-Key={MARK}", "a=%F0%9F%94%91"]
)
def test_400_for_an_unknown_query_parameter(address: Address, bearer: str, query: str) -> None:
    answer = probe(address, get(f"{ME}?{query}", bearer))
    assert answer.status == (200 if query in ("", "&") else 400)


@pytest.mark.parametrize("query", ["state=a&state=b", "state=a&st%61te=a", "state=%00", f"state={MARK * 20}"])
def test_400_for_an_invalid_query_parameter(address: Address, query: str) -> None:
    assert outcome(probe(address, get(f"{API}/stripe/callback/?{query}"))) == INVALID


@pytest.mark.parametrize("host", ["evil.example", f"{MARK}.example", "a b", "", "[::1", "\xff"])
def test_no_redirect_is_made_from_a_forged_host(address: Address, host: str) -> None:
    sent = f"GET {ME[:-1]} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Host: evil.example\r\n\r\n"
    answer = probe(address, sent.encode("latin-1"))
    assert outcome(answer) in (NOT_FOUND, INVALID)
    assert answer["location"] is None
    assert b"evil" not in answer.body


# Methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["PUT", "PATCH", "POST", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE"]
)
def test_405_lists_the_allowed_methods(address: Address, method: str) -> None:
    answer = probe(address, request(method, ME, f"X-Other: {MARK}"))
    assert outcome(answer) == NOT_ALLOWED
    assert answer["allow"] == "GET, HEAD"


@pytest.mark.parametrize("method", ["HUNTER2HUNTER2", "get", "G\0T", "G{T", "CONNECT"])
def test_400_for_an_invalid_method(address: Address, method: str) -> None:
    answer = probe(address, request(method, ME))
    assert outcome(answer) == INVALID
    assert answer["connection"] == "close"


def test_head_is_answered_as_get_without_a_body(address: Address, bearer: str) -> None:
    assert probe(address, request("HEAD", ME)).status == 401
    assert probe(address, request("HEAD", ME, bearer)).status == 200


# Headers -----------------------------------------------------------------------------------------

HEADERS: dict[str, tuple[list[str], Expected]] = {
    "100 of them": ([f"X-{number}: {MARK}" for number in range(99)], MISSING),
    "101 of them": ([f"X-{number}: {MARK}" for number in range(100)], HEADERS_TOO_LARGE),
    "5,000 of them": ([f"X-{number}: a" for number in range(5_000)], HEADERS_TOO_LARGE),
    "one of 40,000 letters": (["X-Other: " + "a" * 40_000], HEADERS_TOO_LARGE),
    "a name of 40,000 letters": (["X-" + "a" * 40_000 + ": a"], HEADERS_TOO_LARGE),
    "bytes": (["X-Other: \xff\xfe"], MISSING),
    "an invalid request id": ([f"X-Request-Id: {MARK} {MARK}"], MISSING),
    "two request ids": ([f"X-Request-Id: {MARK}", f"X-Request-Id: {MARK}"], MISSING),
    "a long request id": ([f"X-Request-Id: {MARK * 9}"], MISSING),
    "two tokens": (["Authorization: Bearer a", "Authorization: Bearer b"], BAD_TOKEN),
    "an empty token": (["Authorization: Bearer "], BAD_TOKEN),
    "no token": (["Authorization: "], BAD_TOKEN),
    "a token of two words": ([f"Authorization: Bearer {MARK} {MARK}"], BAD_TOKEN),
    "a token of bytes": (["Authorization: Bearer \xff\xfe.\xff.\xff"], BAD_TOKEN),
    "a token of 8,000 letters": ([f"Authorization: Bearer {MARK}{'a' * 8_000}"], BAD_TOKEN),
    "a token of 40,000 letters": ([f"Authorization: Bearer {'a' * 40_000}"], HEADERS_TOO_LARGE),
    "a token of dots": ([f"Authorization: Bearer {'.' * 4_000}"], BAD_TOKEN),
    "a password": (["Authorization: Basic aHVudGVyMmh1bnRlcjI6"], BAD_TOKEN),
    "an unknown scheme": ([f"Authorization: {MARK}"], BAD_TOKEN),
    "a malformed key": ([f"Authorization: Bearer sk_live_{MARK}"], BAD_KEY),
    "a key of bytes": (["Authorization: Bearer sk_live_\xff"], BAD_KEY),
}


@pytest.mark.parametrize(("headers", "expected"), HEADERS.values(), ids=HEADERS)
def test_headers_get_the_expected_answer(address: Address, headers: list[str], expected: Expected) -> None:
    assert outcome(probe(address, get(ME, *headers))) == expected


KEYS: dict[str, list[str]] = {
    "empty": ["X-API-Key: "],
    "bytes": ["X-API-Key: \xff\xfe"],
    "long": [f"X-API-Key: sk_live_{MARK * 500}"],
    "a percent sign": [f"X-API-Key: %00{MARK}"],
    "two": [f"X-API-Key: {MARK}", f"X-API-Key: {MARK}"],
}


@pytest.mark.parametrize("headers", KEYS.values(), ids=KEYS)
def test_401_for_a_malformed_key(address: Address, headers: list[str]) -> None:
    assert outcome(probe(address, get(f"{API}/verify/", *headers))) == BAD_KEY


def test_two_valid_keys_are_refused(address: Address, owner: dict[str, Any]) -> None:
    key = f"X-API-Key: {owner['tenant']['api_key_secret']}"
    assert probe(address, get(f"{API}/verify/", key)).status == 200
    assert outcome(probe(address, get(f"{API}/verify/", key, key))) == BAD_KEY


def test_two_valid_tokens_are_refused(address: Address, bearer: str) -> None:
    assert outcome(probe(address, get(ME, bearer, bearer))) == BAD_TOKEN


# Forged tokens, signed with the server's key ------------------------------------------------------


class Forger:
    """Makes tokens with the server's own key, so that only their altered part can be refused."""

    def __init__(self, keys: Keyring, tokens: Mapping[str, str]) -> None:
        self.kid, self.key = keys.first
        self.claims = {
            typ: jwt.decode(tokens[name], options={"verify_signature": False})
            for typ, name in ((ACCESS, "access"), (REFRESH, "refresh"))
        }

    def token(self, typ: str, header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
        """A token with these members instead of its own; None takes one away."""
        payload = {name: value for name, value in {**self.claims[typ], **claims}.items() if value is not None}
        headers = {"typ": typ, "kid": self.kid, "alg": "HS256", **header}
        return signed(
            {name: value for name, value in headers.items() if value is not None}, payload, self.key
        )


def signed(header: Mapping[str, Any], payload: Any, key: bytes) -> str:
    """A token with any header: the library refuses to write most of those here."""
    hmac = jwt.get_algorithm_by_name("HS256")
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, payload)]
    signature = hmac.sign(b".".join(parts), hmac.prepare_key(key))
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


@pytest.fixture(scope="module")
def forger(owner: dict[str, Any], settings: Settings) -> Forger:
    return Forger(settings.jwt_keys, owner["tokens"])


def ask(address: Address, typ: str, token: str) -> Answer:
    """Use the token for the purpose of its type."""
    if typ == ACCESS:
        return probe(address, get(ME, f"Authorization: Bearer {token}"))
    body = json.dumps({"refresh": token}).encode()
    return probe(address, request("POST", f"{API}/token/refresh/", JSON, body=body))


def invalid_headers() -> Iterator[dict[str, Any]]:
    for value in (
        None,
        1,
        1.5,
        True,
        ["k1"],
        {"k1": "k1"},
        "",
        MARK,
        "../../dev/null",
        "k1' OR 1=1",
        "\0",
        "a" * 999,
    ):
        yield {"kid": value}
    for value in (None, 1, ["at+jwt"], {}, "JWT", "AT+JWT", MARK):
        yield {"typ": value}
    for value in (None, 1, ["HS256"], "none", "None", "hs256", "HS512", "RS256", "ES256", MARK):
        yield {"alg": value}
    yield {"crit": ["exp"]}
    yield {"crit": MARK}
    yield {"crit": ["b64"], "b64": False}


def invalid_claims() -> Iterator[dict[str, Any]]:
    for name in ("iss", "aud", "sub", "tid", "sid", "ver", "jti", "iat", "exp"):
        yield {name: None}
    for name in ("sub", "tid", "sid"):
        for value in (1, 10**30, [], {}, "", MARK, "0" * 31, "\0"):
            yield {name: value}
    for value in ("9999999999", MARK, [], {}, True, -1, 10**18, 10**400, 1e308):
        yield {"exp": value}
    for value in (MARK, [], {}, 10**30, -(2**63), "1e3"):
        yield {"ver": value}
    for name in ("iss", "aud"):
        for value in (1, [], {}, MARK, "https://evil.example"):
            yield {name: value}
    yield {"aud": ["billing-api", "billing-refresh"]}


def named(members: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {ascii(value)[:20]}" for name, value in members.items())


def test_an_unaltered_token_of_the_forger_is_accepted(address: Address, forger: Forger) -> None:
    assert ask(address, ACCESS, forger.token(ACCESS, {}, {})).status == 200
    assert ask(address, REFRESH, forger.token(REFRESH, {}, {})).status == 200


@pytest.mark.parametrize("typ", [ACCESS, REFRESH])
@pytest.mark.parametrize("header", list(invalid_headers()), ids=named)
def test_401_for_a_token_with_an_invalid_header(
    address: Address, forger: Forger, typ: str, header: dict[str, Any]
) -> None:
    assert outcome(ask(address, typ, forger.token(typ, header, {}))) == BAD_TOKEN


@pytest.mark.parametrize("typ", [ACCESS, REFRESH])
@pytest.mark.parametrize("claims", list(invalid_claims()), ids=named)
def test_401_for_a_token_with_an_invalid_claim(
    address: Address, forger: Forger, typ: str, claims: dict[str, Any]
) -> None:
    assert ask(address, typ, forger.token(typ, {}, claims)).status == 401


@pytest.mark.parametrize("payload", [[], MARK, 1, None, {}, [{}]], ids=ascii)
def test_401_for_a_token_with_an_invalid_payload(address: Address, forger: Forger, payload: Any) -> None:
    header = {"typ": ACCESS, "kid": forger.kid, "alg": "HS256"}
    assert outcome(ask(address, ACCESS, signed(header, payload, forger.key))) == BAD_TOKEN
