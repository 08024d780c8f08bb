"""Webhook endpoints: URLs must be public names over https, however written; and when an endpoint is disabled."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.errors import WebhookNotConfigured, WebhookUrlRefused
from billing.ids import new_id
from billing.webhooks.endpoints import (
    LONGEST,
    TOO_LONG,
    TOO_MANY,
    Endpoint,
    Secret,
    UrlPolicy,
    previous_expiry,
    reason_to_disable,
    require_url,
)

# A busy machine must not fail a test.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PRODUCTION = UrlPolicy()
DEVELOPMENT = UrlPolicy(allow_http=True, allow_localhost=True)


def refusal(url: str, policy: UrlPolicy = PRODUCTION) -> str | None:
    """Why the URL is refused, None where it is not."""
    try:
        assert policy.check(url) == url
    except WebhookUrlRefused as refused:
        return refused.detail
    return None


GOOD = [
    "https://hooks.acme.example/",
    "https://hooks.acme.example",
    "https://hooks.acme.example/in?token=a%20b&x=@#"[:-1],
    "https://hooks.acme.example:443/",
    "https://hooks.acme.example:8443/in",
    "https://hooks.acme.example:/",
    "HTTPS://Hooks.Acme.Example/",
    "https://hooks.acme.example./",
    "https://xn--mller-kva.example/",
    "https://a_b.acme.example/",
    "https://1a.acme.example/",
    "https://127.0.0.1.nip.example/",
    "https://a.example/http://127.0.0.1/",
    "https://a.example/in@127.0.0.1/",
    "https://localhost.example/",
    "https://internal.acme.example/",
    "https://0x7f.acme.example/",
    "https://" + "a" * 63 + ".example/",
]


@pytest.mark.parametrize("url", GOOD)
def test_a_public_name_over_https_is_accepted(url: str) -> None:
    assert refusal(url) is None


ADDRESSES = [
    "https://127.0.0.1/",
    "https://127.0.0.1./",
    "https://127.1/",
    "https://127.0.1/",
    "https://2130706433/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://0x7f000001/",
    "https://0X7F.0.0.1/",
    "https://0x7f.1/",
    "https://127.0.0.0x1/",
    "https://10.0.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://8.8.8.8/",
    "https://0/",
    "https://0.0.0.0/",
    "https://256.256.256.256/",
    "https://1.2.3.4.5/",
    "https://a.example.1/",
    "https://a.0x/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[fe80::1%25eth0]/",
    "https://[fd00:ec2::254]/",
    "https://[2001:4860:4860::8888]/",
]
LOCAL = [
    "https://localhost/",
    "https://LOCALHOST/",
    "https://localhost./",
    "https://localhost:8443/",
    "https://a.localhost/",
    "https://a.localhost./",
    "https://printer.local/",
    "https://metadata.google.internal/",
    "https://vault.internal./",
    "https://intranet/",
    "https://com/",
]
ODD_NAMES = [
    "https:///in",
    "https://",
    "https://:443/",
    "https://./",
    "https://../",
    "https://.a.example/",
    "https://a..example/",
    "https://a.example../",
    "https://a.local../",
    "https://exa%6dple.example/",
    "https://%31%32%37.0.0.1/",
    "https://127.0.0.1%2f.example/",
    "https://127.0.0.1%00.example/",
    "https://a.example%2elocal/",
    "https://-a.example/",
    "https://a-.example/",
    "https://a,b.example/",
    "https://$(id).example/",
    "https://a*.example/",
    "https://[v1.a.example]/",
    "https://" + "a" * 64 + ".example/",
    "https://" + "a." * 126 + "ab/",
]


@pytest.mark.parametrize("url", [*ADDRESSES, *LOCAL, *ODD_NAMES])
@pytest.mark.parametrize("policy", [PRODUCTION, UrlPolicy(allow_http=True)])
def test_a_host_that_is_not_a_public_name_is_refused(url: str, policy: UrlPolicy) -> None:
    assert refusal(url, policy) == "The webhook URL must name a public host."


@pytest.mark.parametrize("url", [*ADDRESSES, *ODD_NAMES, "https://a.localhost/", "https://printer.local/"])
def test_development_permits_no_private_host_but_localhost(url: str) -> None:
    assert refusal(url, DEVELOPMENT) == "The webhook URL must name a public host."


USERINFO = "The webhook URL must not have a user name, a password or a fragment."
SCHEME = "The webhook URL must begin with https://."
PORT = "The webhook URL must use port 443 or 8443."
CHARACTERS = f"The webhook URL must be printable ASCII, at most {LONGEST} characters."
UNREADABLE = "The webhook URL cannot be parsed."


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://ada@a.example/", USERINFO),
        ("https://ada:hunter2@a.example/", USERINFO),
        ("https://@a.example/", USERINFO),
        ("https://a.example@127.0.0.1/", USERINFO),
        ("https://127.0.0.1:443@a.example/", USERINFO),
        ("https://a.example/#", USERINFO),
        ("https://a.example/#@127.0.0.1/", USERINFO),
        ("https://a.example#@127.0.0.1/", USERINFO),
        ("http://a.example/", SCHEME),
        ("ftp://a.example/", SCHEME),
        ("file:///etc/passwd", SCHEME),
        ("gopher://a.example/", SCHEME),
        ("javascript:alert(1)", SCHEME),
        ("httpsx://a.example/", SCHEME),
        ("//a.example/", SCHEME),
        ("a.example/", SCHEME),
        ("", SCHEME),
        ("https:a.example", "The webhook URL must name a public host."),
        ("https:/a.example/", "The webhook URL must name a public host."),
        ("https://a.example:80/", PORT),
        ("https://a.example:0/", PORT),
        ("https://a.example:22/", PORT),
        ("https://a.example:65535/", PORT),
        ("https://a.example:65536/", UNREADABLE),
        ("https://a.example:-443/", UNREADABLE),
        ("https://a.example:+443/", UNREADABLE),
        ("https://a.example:4 43/", UNREADABLE),
        ("https://a.example:0x1bb/", UNREADABLE),
        ("https://a.example:443:443/", UNREADABLE),
        ("https://a.example:٤٤٣/", UNREADABLE),
        ("https://[::1/", UNREADABLE),
        ("https://::1]/", UNREADABLE),
        ("https://a.example℀.example/", UNREADABLE),
        ("https://１２７.0.0.1/", CHARACTERS),
        ("https://①②⑦.0.0.1/", CHARACTERS),
        ("https://127。0。0。1/", CHARACTERS),
        ("https://lоcalhost.example/", CHARACTERS),
        ("https://müller.example/", CHARACTERS),
        ("https://a.example/\u202e", CHARACTERS),
        ("https://a.example/ x", CHARACTERS),
        (" https://a.example/", CHARACTERS),
        ("https://a.example/\n", CHARACTERS),
        ("https://a.example/\r\nX-Injected: 1", CHARACTERS),
        ("https://a.exa\tmple/", CHARACTERS),
        ("https://a.example/\0", CHARACTERS),
        ("https://a.example/\x7f", CHARACTERS),
        ("\x01https://a.example/", CHARACTERS),
        ("https://a.example\\@127.0.0.1/", CHARACTERS),
        ("https:\\\\a.example\\", CHARACTERS),
        ("https://a.example/" + "x" * LONGEST, CHARACTERS),
    ],
)
def test_any_other_invalid_url_is_refused_with_its_reason(url: str, reason: str) -> None:
    assert refusal(url) == reason


@pytest.mark.parametrize(("length", "passes"), [(LONGEST, True), (LONGEST + 1, False)])
def test_the_maximum_url_length(length: int, passes: bool) -> None:
    url = "https://a.example/"
    assert (refusal(url + "x" * (length - len(url))) is None) is passes


@pytest.mark.parametrize(
    ("url", "policy", "passes"),
    [
        ("http://a.example/", UrlPolicy(allow_http=True), True),
        ("http://a.example:8080/", UrlPolicy(allow_http=True), False),
        ("http://localhost/", UrlPolicy(allow_http=True), False),
        ("https://localhost:9000/", UrlPolicy(allow_localhost=True), True),
        ("https://localhost./", UrlPolicy(allow_localhost=True), True),
        ("https://localhost../", UrlPolicy(allow_localhost=True), False),
        ("http://localhost:9000/", UrlPolicy(allow_localhost=True), False),
        ("https://a.example:9000/", UrlPolicy(allow_localhost=True), True),
        ("http://localhost:9000/in", DEVELOPMENT, True),
        ("ftp://localhost/", DEVELOPMENT, False),
        ("http://ada@localhost/", DEVELOPMENT, False),
    ],
)
def test_each_development_option_permits_its_urls(url: str, policy: UrlPolicy, passes: bool) -> None:
    assert (refusal(url, policy) is None) is passes


def test_the_url_is_optional() -> None:
    PRODUCTION.check_optional(None)
    with pytest.raises(WebhookUrlRefused):
        PRODUCTION.check_optional("")


@UNHURRIED
@given(url=st.text() | st.text(alphabet="https:/.@[]#%\\x0127", max_size=40).map("https://".__add__))
def test_any_text_is_accepted_or_refused_without_being_echoed(url: str) -> None:
    said = refusal(url)
    assert said in (
        None,
        USERINFO,
        SCHEME,
        PORT,
        CHARACTERS,
        UNREADABLE,
        "The webhook URL must name a public host.",
    )


# Endpoint health ---------------------------------------------------------------------------------

URL = "https://hooks.acme.example/"
NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
DAY = timedelta(days=1)
EARLIER = NOW - timedelta(hours=1)
HEALTHY = Endpoint(URL)
FAILING = Endpoint(URL, failing_since=EARLIER, failed_events=3)


@pytest.mark.parametrize(
    ("before", "delivered", "failed", "first_failures", "since", "events"),
    [
        (HEALTHY, 1, 0, 0, None, 0),
        (HEALTHY, 0, 0, 0, None, 0),
        # A failure after a success counts, first attempt or not.
        (HEALTHY, 0, 1, 1, NOW, 1),
        (HEALTHY, 0, 2, 0, NOW, 2),
        (HEALTHY, 0, 16, 16, NOW, 16),
        # After that an event counts once: at its first attempt.
        (FAILING, 0, 1, 1, EARLIER, 4),
        (FAILING, 0, 1, 0, EARLIER, 3),
        (FAILING, 0, 5, 2, EARLIER, 5),
        (FAILING, 0, 0, 0, EARLIER, 3),
        # One success clears the failures, those of the same batch too.
        (FAILING, 1, 0, 0, None, 0),
        (FAILING, 1, 15, 15, None, 0),
        (HEALTHY, 1, 15, 15, None, 0),
    ],
)
def test_attempts_update_the_failure_count(
    before: Endpoint, delivered: int, failed: int, first_failures: int, since: datetime | None, events: int
) -> None:
    after = before.after(delivered=delivered, failed=failed, first_failures=first_failures, now=NOW)
    assert after == Endpoint(URL, failing_since=since, failed_events=events)


def test_attempts_leave_the_configuration_unchanged() -> None:
    endpoint = Endpoint(URL, ("webhook.test",), "gone", EARLIER, 3)
    for delivered, failed in ((1, 0), (0, 1), (0, 0)):
        after = endpoint.after(delivered=delivered, failed=failed, first_failures=failed, now=NOW)
        assert (after.url, after.event_types, after.disabled_reason) == (URL, ("webhook.test",), "gone")


@pytest.mark.parametrize(
    ("since", "events", "gone", "reason"),
    [
        (None, 0, False, None),
        (None, 0, True, "gone"),
        (NOW - TOO_LONG, TOO_MANY, False, "failing"),
        (NOW - TOO_LONG, TOO_MANY, True, "gone"),
        (NOW - TOO_LONG, TOO_MANY - 1, False, None),
        (NOW - TOO_LONG, TOO_MANY - 1, True, "gone"),
        (NOW - TOO_LONG + timedelta(microseconds=1), TOO_MANY, False, None),
        (NOW - 100 * TOO_LONG, 100 * TOO_MANY, False, "failing"),
        (NOW, 1000 * TOO_MANY, False, None),
    ],
)
def test_the_reason_to_disable_an_endpoint(
    since: datetime | None, events: int, gone: bool, reason: str | None
) -> None:
    endpoint = Endpoint(URL, failing_since=since, failed_events=events)
    assert reason_to_disable(endpoint, gone=gone, now=NOW) == reason


@pytest.mark.parametrize(
    ("asked_for", "wanted"),
    [
        ((), ()),
        (("webhook.test",), ("webhook.test", "webhook.disabled")),
        (("api_key.revoked", "webhook.test"), ("api_key.revoked", "webhook.test", "webhook.disabled")),
    ],
)
def test_an_empty_filter_means_all_and_webhook_disabled_is_always_included(
    asked_for: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    assert Endpoint(URL, asked_for).wanted == wanted


@pytest.mark.parametrize(
    ("endpoint", "is_active"),
    [
        (Endpoint(URL), True),
        (FAILING, True),
        (Endpoint(None), False),
        (Endpoint(URL, (), "gone"), False),
        (Endpoint(URL, (), "failing"), False),
    ],
)
def test_an_endpoint_is_active_with_a_url_and_not_disabled(endpoint: Endpoint, is_active: bool) -> None:
    assert endpoint.is_active is is_active


def test_sending_requires_a_url() -> None:
    assert require_url(HEALTHY) == URL
    assert require_url(Endpoint(URL, (), "gone")) == URL
    with pytest.raises(WebhookNotConfigured):
        require_url(Endpoint(None))


def test_previous_expiry_is_that_of_the_previous_secret() -> None:
    current, previous = Secret(new_id(), "aaaa", None), Secret(new_id(), "bbbb", NOW)
    assert previous_expiry([]) is None
    assert previous_expiry([current]) is None
    assert previous_expiry([current, previous]) == NOW


# Failing for too long ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "too_long"),
    [
        ({"failing_since": None, "failed_events": 1000}, False),
        ({"failing_since": NOW, "failed_events": 1000}, False),
        ({"failing_since": NOW - 5 * DAY + timedelta(seconds=1), "failed_events": 1000}, False),
        ({"failing_since": NOW - 5 * DAY, "failed_events": 9}, False),
        ({"failing_since": NOW - 365 * DAY, "failed_events": 9}, False),
        ({"failing_since": NOW - 5 * DAY, "failed_events": 10}, True),
        ({"failing_since": NOW - 6 * DAY, "failed_events": 1000}, True),
    ],
)
def test_failing_too_long_means_five_days_and_ten_events(failures: dict[str, Any], too_long: bool) -> None:
    assert Endpoint("https://hooks.acme.example/", **failures).is_failing_too_long(NOW) is too_long
