"""Tokens: only ours, unexpired and of the right kind, are good; anything else is refused, whatever it is."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.errors import TokenExpired, TokenInvalid
from billing.ids import new_id
from billing.keyrings import Keyring
from billing.tokens import (
    ACCESS_LIFETIME,
    ALGORITHM,
    LONGEST,
    REFRESH_IDLE_LIFETIME,
    Holder,
    TokenPair,
    Tokens,
)

# A slow example on a busy machine is not a failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
OLD, NEW = bytes(range(32)), bytes(range(32, 64))
ISSUER = "https://billing.example"
TOKENS = Tokens(Keyring({"old": OLD}), ISSUER)
HOLDER = Holder(new_id(), new_id(), new_id(), 3, "owner")
FAMILY_ENDS = NOW + timedelta(days=30)
HEADER = {"typ": "at+jwt", "kid": "old"}
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": "billing-api",
    "sub": str(HOLDER.user_id),
    "tid": str(HOLDER.tenant_id),
    "sid": str(HOLDER.session_id),
    "ver": 3,
    "role": "owner",
    "jti": "a-jti",
    "iat": int(NOW.timestamp()),
    "exp": int(NOW.timestamp()) + 900,
}


def refresh_token(tokens: Tokens = TOKENS, jti: str = "a-jti") -> str:
    return tokens.refresh(HOLDER, jti, NOW, FAMILY_ENDS)


def signed(header: dict[str, Any] | None = None, key: bytes = OLD, **claims: Any) -> str:
    return raw_signed(json.dumps(CLAIMS | claims).encode(), header, key)


def raw_signed(body: bytes, header: dict[str, Any] | None = None, key: bytes = OLD) -> str:
    """A token as PyJWT would sign it without any validation."""
    return jwt.PyJWS().encode(body, key, algorithm=ALGORITHM, headers=header or HEADER)


def encoded(part: object) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def outcome(text: str, now: datetime = NOW) -> str:
    """`good`, `invalid` or `expired`, by either reader; any other exception fails the test."""
    outcomes = []
    for read in (TOKENS.read_access, TOKENS.read_refresh):
        try:
            read(text, now)
        except TokenInvalid:
            outcomes.append("invalid")
        except TokenExpired:
            outcomes.append("expired")
        else:
            outcomes.append("good")
    return next((said for said in outcomes if said != "invalid"), "invalid")


# Contents of a good token ------------------------------------------------------------------------


def test_an_access_token_identifies_its_holder() -> None:
    claims = TOKENS.read_access(TOKENS.access(HOLDER, NOW), NOW)
    assert (claims.tenant_id, claims.user_id, claims.session_id, claims.token_version) == (
        HOLDER.tenant_id,
        HOLDER.user_id,
        HOLDER.session_id,
        3,
    )
    assert claims.signed_by == "old"


def test_the_unmodified_token_of_these_tests_is_good() -> None:
    assert outcome(signed()) == "good"


def test_the_header_and_the_claims_are_those_of_rfc_9068() -> None:
    text = TOKENS.access(HOLDER, NOW)
    assert jwt.get_unverified_header(text) == {"alg": "HS256", "typ": "at+jwt", "kid": "old"}
    claims = jwt.decode(text, options={"verify_signature": False})
    assert claims | {"jti": "a-jti"} == CLAIMS


def test_every_access_token_has_a_jti_of_its_own() -> None:
    texts = [TOKENS.access(HOLDER, NOW) for _ in range(100)]
    assert len({TOKENS.read_access(text, NOW).jti for text in texts}) == 100


def test_a_refresh_token_is_deterministic() -> None:
    assert refresh_token() == refresh_token()
    assert refresh_token() != refresh_token(jti="another")
    assert TOKENS.read_refresh(refresh_token(), NOW).jti == "a-jti"


# Time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-3600, "good"), (0, "good"), (899, "good"), (900, "expired"), (10**6, "expired")],
)
def test_an_access_token_is_good_for_fifteen_minutes(seconds: int, expected: str) -> None:
    assert timedelta(minutes=15) == ACCESS_LIFETIME
    assert outcome(TOKENS.access(HOLDER, NOW), NOW + timedelta(seconds=seconds)) == expected


@pytest.mark.parametrize(
    ("days_left", "good_for"),
    [(30, REFRESH_IDLE_LIFETIME), (7, timedelta(days=7)), (2, timedelta(days=2))],
)
def test_a_refresh_token_expires_when_idle_or_with_its_family(days_left: int, good_for: timedelta) -> None:
    text = TOKENS.refresh(HOLDER, "j", NOW, NOW + timedelta(days=days_left))
    assert outcome(text, NOW + good_for - timedelta(seconds=1)) == "good"
    assert outcome(text, NOW + good_for) == "expired"


# Confusion ---------------------------------------------------------------------------------------


def test_access_and_refresh_tokens_are_not_interchangeable() -> None:
    with pytest.raises(TokenInvalid):
        TOKENS.read_refresh(TOKENS.access(HOLDER, NOW), NOW)
    with pytest.raises(TokenInvalid):
        TOKENS.read_access(refresh_token(), NOW)


CONFUSED: dict[str, str] = {
    "typ of the other kind": signed(HEADER | {"typ": "rt+jwt"}),
    "typ JWT": signed(HEADER | {"typ": "JWT"}),
    "typ in capitals": signed(HEADER | {"typ": "AT+JWT"}),
    "typ with its prefix": signed(HEADER | {"typ": "application/at+jwt"}),
    "no typ": signed({"typ": None, "kid": "old"}),
    "audience of the other kind": signed(aud="billing-refresh"),
    "audience in a list": signed(aud=["billing-api"]),
    "two audiences": signed(aud=["billing-api", "billing-refresh"]),
    "another issuer": signed(iss="https://evil.example"),
    "issuer with a slash": signed(iss=ISSUER + "/"),
    "issuer in a list": signed(iss=[ISSUER]),
    "no kid": signed({"typ": "at+jwt"}),
    "an unknown kid": signed(HEADER | {"kid": "new"}),
    "an empty kid": signed(HEADER | {"kid": ""}),
    "a path as kid": signed(HEADER | {"kid": "/dev/null"}),
    "another key under our kid": signed(key=NEW),
    "a key of its own": signed(HEADER | {"jwk": {"kty": "oct", "k": encoded(NEW)}, "jku": ISSUER}, key=NEW),
    "alg none": f"{encoded(HEADER | {'alg': 'none'})}.{encoded(CLAIMS)}.",
    "alg None": f"{encoded(HEADER | {'alg': 'None'})}.{encoded(CLAIMS)}.",
    "HS384 with our key": f"{encoded(HEADER | {'alg': 'HS384'})}.{encoded(CLAIMS)}.{encoded(OLD)}",
    "RS256": f"{encoded(HEADER | {'alg': 'RS256'})}.{encoded(CLAIMS)}.{encoded(OLD)}",
    "an unknown critical header": signed(HEADER | {"crit": ["exp"], "exp": 1}),
    "an unencoded payload": signed(HEADER | {"crit": ["b64"], "b64": False}),
    "no signature": signed().rpartition(".")[0] + ".",
    "two parts": signed().rpartition(".")[0],
    "four parts": signed() + ".x",
    "encrypted": f"{encoded({'alg': 'dir', 'enc': 'A256GCM'})}....",
}


@pytest.mark.parametrize("how", CONFUSED)
def test_a_token_of_another_type_issuer_audience_key_or_form_is_invalid(how: str) -> None:
    assert outcome(CONFUSED[how]) == "invalid"


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_another_algorithm_is_invalid_even_with_our_key(algorithm: str) -> None:
    key = bytes(range(64))
    tokens = Tokens(Keyring({"old": key}), ISSUER)
    assert tokens.read_access(signed(key=key), NOW).signed_by == "old"
    with pytest.raises(TokenInvalid):
        tokens.read_access(jwt.encode(CLAIMS, key, algorithm=algorithm, headers=HEADER), NOW)


@pytest.mark.parametrize("claim", [name for name in CLAIMS if name != "role"])
def test_every_claim_is_required(claim: str) -> None:
    left = {name: value for name, value in CLAIMS.items() if name != claim}
    assert outcome(jwt.encode(left, OLD, algorithm=ALGORITHM, headers=HEADER)) == "invalid"


def test_changing_any_character_makes_a_token_invalid() -> None:
    text = signed()
    for at in range(len(text) - 1):  # The last one has two unused bits.
        changed = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        assert outcome(changed) == "invalid", at


@pytest.mark.parametrize(("length", "expected"), [(LONGEST, "good"), (LONGEST + 1, "invalid")])
def test_a_token_over_the_maximum_length_is_invalid(length: int, expected: str) -> None:
    texts = (signed(pad="x" * pad) for pad in range(length // 2, length))
    text = next(text for text in texts if len(text) >= length)
    assert len(text) == length
    assert outcome(text) == expected


def test_an_expired_token_of_another_key_or_issuer_is_invalid() -> None:
    assert outcome(signed(key=NEW, exp=1)) == "invalid"
    assert outcome(signed(iss="https://evil.example", exp=1)) == "invalid"
    assert outcome(signed(exp=1)) == "expired"


# Key rotation ------------------------------------------------------------------------------------


def test_a_new_key_signs_and_the_old_one_still_verifies() -> None:
    turned = Tokens(Keyring({"new": NEW, "old": OLD}), ISSUER)
    assert turned.read_access(TOKENS.access(HOLDER, NOW), NOW).signed_by == "old"
    assert turned.read_access(turned.access(HOLDER, NOW), NOW).signed_by == "new"
    assert outcome(turned.access(HOLDER, NOW)) == "invalid"


def test_removing_a_key_from_the_ring_invalidates_its_tokens() -> None:
    with pytest.raises(TokenInvalid):
        Tokens(Keyring({"new": NEW}), ISSUER).read_access(TOKENS.access(HOLDER, NOW), NOW)


def test_a_successor_survives_a_key_rotation() -> None:
    turned = Tokens(Keyring({"new": NEW, "old": OLD}), ISSUER)
    before, after = (tokens.read_refresh(refresh_token(), NOW) for tokens in (TOKENS, turned))
    assert TOKENS.successor(before) == turned.successor(after)


def test_a_successor_is_deterministic_and_depends_on_the_key() -> None:
    one, other = (TOKENS.read_refresh(refresh_token(jti=jti), NOW) for jti in ("one", "other"))
    strange = Tokens(Keyring({"old": NEW}), ISSUER)
    assert TOKENS.successor(one) == TOKENS.successor(one)
    assert len({TOKENS.successor(one), TOKENS.successor(other), strange.successor(one), "one"}) == 4


def test_tokens_are_not_shown_in_representations() -> None:
    assert repr(TokenPair("an-access-token", "a-refresh-token")) == "TokenPair()"


# Arbitrary input ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KNOWN = st.sampled_from([*CLAIMS, "nbf", "alg", "kid", "typ", "crit", "b64", "jwk", "zip", "cty"])
TIMES = st.sampled_from([10**exponent * sign for exponent in range(8, 40) for sign in (1, -1)])


@UNHURRIED
@given(claims=st.dictionaries(KNOWN, JSON | TIMES, max_size=4))
def test_claims_of_any_type_raise_no_other_error(claims: dict[str, Any]) -> None:
    assert outcome(signed(**claims)) in ("invalid", "expired", "good")


@pytest.mark.parametrize(
    "exp", [10**17, 10**18, -(10**18), 10**400, 1e300, float("nan"), float("inf"), "1", None, [], {}]
)
def test_an_expiry_that_is_not_a_valid_time_is_invalid(exp: object) -> None:
    assert outcome(signed(exp=exp)) == "invalid"


@UNHURRIED
@given(header=st.dictionaries(KNOWN, JSON, max_size=4), signature=st.binary(max_size=40))
def test_arbitrary_headers_and_signatures_are_invalid(header: dict[str, Any], signature: bytes) -> None:
    assert (
        outcome(f"{encoded(HEADER | {'alg': 'HS256'} | header)}.{encoded(CLAIMS)}.{encoded(signature)}")
        == "invalid"
    )


@UNHURRIED
@given(parts=st.lists(st.binary(max_size=60) | JSON, max_size=5))
def test_arbitrary_parts_are_invalid(parts: list[object]) -> None:
    assert outcome(".".join(encoded(part) for part in parts)) == "invalid"


@UNHURRIED
@given(text=st.text() | st.text(alphabet="eyJhbGciOi.=_-", max_size=200))
def test_arbitrary_text_is_invalid(text: str) -> None:
    assert outcome(text) == "invalid"


@pytest.mark.parametrize(
    "part", [b"[" * 1500, b'{"a":' * 500, b"1" * 2000, b'"\\ud800"', b"\xff\xfe", b"null"]
)
def test_a_hostile_part_is_invalid(part: bytes) -> None:
    assert outcome(f"{encoded(part)}.{encoded(CLAIMS)}.AA") == "invalid"
    assert outcome(raw_signed(part)) == "invalid"


def test_a_cached_token_is_checked_again_for_expiry_and_type() -> None:
    tokens = Tokens(Keyring({"old": OLD}), ISSUER)
    text = tokens.access(HOLDER, NOW)
    assert tokens.read_access(text, NOW) is tokens.read_access(text, NOW)
    with pytest.raises(TokenExpired):
        tokens.read_access(text, NOW + ACCESS_LIFETIME)
    with pytest.raises(TokenInvalid):
        tokens.read_refresh(text, NOW)
