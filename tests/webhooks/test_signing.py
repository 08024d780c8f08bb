"""The webhook secret and the headers signed with it, as Standard Webhooks 1.0 specifies them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from billing.webhooks import signing
from billing.webhooks.signing import new_secret, signed_headers
from tests.answers import DOCUMENT

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# The vector that Standard Webhooks publishes.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
AT = datetime.fromtimestamp(1614265330, UTC)
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# The secret --------------------------------------------------------------------------------------


def test_a_secret_is_the_prefix_and_the_base64_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "token_bytes", lambda count: bytes(range(count)))
    assert new_secret() == "whsec_" + base64.b64encode(bytes(range(32))).decode()


def test_a_secret_decodes_to_32_bytes_and_is_new_each_time() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    for secret in made:
        assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


# The headers -------------------------------------------------------------------------------------


def test_the_published_vector() -> None:
    digest = base64.b64decode(SIGNATURE.removeprefix("v1,"))
    assert signed_headers([SECRET], id=ID, at=AT, body=BODY) == {
        "webhook-id": ID,
        "webhook-timestamp": "1614265330",
        "webhook-signature": SIGNATURE,
        "X-Webhook-Signature": f"t=1614265330,v1={digest.hex()}",
    }


def test_both_secrets_of_a_rotation_sign_and_the_newest_comes_first() -> None:
    new, old = new_secret(), new_secret()
    both, by_new, by_old = (
        signed_headers(secrets, id=ID, at=AT, body=BODY) for secrets in ([new, old], [new], [old])
    )
    name = "webhook-signature"
    assert both[name] == f"{by_new[name]} {by_old[name]}"
    hexadecimal = by_old["X-Webhook-Signature"].partition(",")[2]
    assert both["X-Webhook-Signature"] == f"{by_new['X-Webhook-Signature']},{hexadecimal}"


@pytest.mark.parametrize("microsecond", [0, 1, 500_000, 999_999])
def test_the_timestamp_is_truncated_to_whole_seconds(microsecond: int) -> None:
    at = AT.replace(microsecond=microsecond)
    assert signed_headers([SECRET], id=ID, at=at, body=BODY)["webhook-timestamp"] == "1614265330"


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_MfK", "whsec_MfKQ-r8G", "whsec_MfKQ 9r8G"],
)
def test_an_invalid_secret_raises(secret: str) -> None:
    with pytest.raises(ValueError):
        signed_headers([secret], id=ID, at=AT, body=BODY)


@UNHURRIED
@given(body=st.text(alphabet=st.characters(codec="utf-8")).map(str.encode), age=st.integers(-290, 290))
def test_the_standard_webhooks_library_accepts_each_secret(body: bytes, age: int) -> None:
    secrets = [new_secret(), new_secret()]
    at = datetime.now(UTC) - timedelta(seconds=age)
    headers = signed_headers(secrets, id=ID, at=at, body=body)
    for secret in secrets:
        Webhook(secret).verify(body, headers, json_parse=False)


def test_the_library_rejects_any_change() -> None:
    secret, now = new_secret(), datetime.now(UTC)
    headers = signed_headers([secret], id=ID, at=now, body=BODY)
    later = str(int(now.timestamp()) + 1)
    assert Webhook(secret).verify(BODY, headers) == {"test": 2432232314}
    for key, body, said in [
        (secret, BODY + b" ", headers),
        (secret, BODY, {**headers, "webhook-id": "msg_another"}),
        (secret, BODY, {**headers, "webhook-timestamp": later}),
        (new_secret(), BODY, headers),
    ]:
        with pytest.raises(WebhookVerificationError, match="No matching signature"):
            Webhook(key).verify(body, said)


@UNHURRIED
@given(
    body=st.binary(), at=st.integers(0, 2**40).map(lambda seconds: datetime.fromtimestamp(seconds / 16, UTC))
)
def test_both_headers_carry_the_same_signatures_for_any_body(body: bytes, at: datetime) -> None:
    secrets = [new_secret(), new_secret()]
    headers = signed_headers(secrets, id=ID, at=at, body=body)
    time, *old = headers["X-Webhook-Signature"].split(",")
    new = [
        base64.b64decode(part.removeprefix("v1,")).hex() for part in headers["webhook-signature"].split(" ")
    ]
    assert time == f"t={headers['webhook-timestamp']}"
    assert [part.removeprefix("v1=") for part in old] == new
    assert new == [by_hand(secret, headers, body) for secret in secrets]


def by_hand(secret: str, headers: dict[str, str], body: bytes) -> str:
    signed = f"{ID}.{headers['webhook-timestamp']}.".encode() + body
    return hmac.new(base64.b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("how_many", [1, 2])
def test_the_headers_match_the_openapi_document(how_many: int) -> None:
    secrets = [new_secret() for _ in range(how_many)]
    headers = signed_headers(secrets, id=ID, at=datetime.now(UTC), body=BODY)
    parameters = [
        DOCUMENT["components"]["parameters"][name]
        for name in ("WebhookId", "WebhookTimestamp", "WebhookSignature", "XWebhookSignature")
    ]
    assert list(headers) == [parameter["name"] for parameter in parameters]
    for parameter in parameters:
        value, schema = headers[parameter["name"]], parameter["schema"]
        assert re.fullmatch(schema.get("pattern", r"[0-9]+"), value)
        assert len(value) <= schema.get("maxLength", 10)
