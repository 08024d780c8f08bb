"""Webhooks end to end: a running server with its worker, and receivers built with the public libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from billing.webhooks.events import EventType
from tests import answers
from tests.e2e.places import Place
from tests.e2e.tenants import RECEIVERS, Arrival, Receiver, Tenant, receiving


@pytest.fixture(params=RECEIVERS)
def receiver_in_each_language(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    with receiving(request.param) as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving("python") as running:
        yield running


def listening(place: Place, receiver: Receiver) -> Tenant:
    """A tenant whose receiver has got the event of its registration."""
    tenant = Tenant(place.api, webhook_url=receiver.url)
    receiver.hold(tenant.secret)
    assert checked(receiver.next()) == ("tenant.registered", 1)
    return tenant


def checked(arrival: Arrival) -> tuple[str, int]:
    """The type and sequence of an event, once it is verified and matches the OpenAPI document."""
    assert all(arrival.verified) and arrival.status in (204, 410)
    answers.check_event(arrival.event)
    assert arrival.event["id"] == arrival.headers["webhook-id"]
    return arrival.event["type"], arrival.event["sequence"]


def test_an_event_arrives_and_its_signature_verifies(
    place: Place, receiver_in_each_language: Receiver
) -> None:
    tenant = listening(place, receiver_in_each_language)
    tenant.regenerate()
    arrival = receiver_in_each_language.next()
    assert checked(arrival) == ("api_key.regenerated", 2)
    assert (arrival.signatures, arrival.event["data"]["key_type"]) == (1, "test")


def test_after_a_rotation_both_secrets_verify(place: Place, receiver_in_each_language: Receiver) -> None:
    receiver = receiver_in_each_language
    tenant = listening(place, receiver)
    old, new = tenant.secret, tenant.configure(receiver.url, regenerate_secret=True)["webhook_secret"]
    receiver.hold(old, new)
    tenant.regenerate()
    arrival = receiver.next()
    assert (arrival.signatures, arrival.verified) == (2, [True, True])
    assert checked(arrival) == ("api_key.regenerated", 2)


def test_after_a_rotation_without_grace_only_the_new_secret_verifies(
    place: Place, receiver_in_each_language: Receiver
) -> None:
    receiver = receiver_in_each_language
    tenant = listening(place, receiver)
    answer = tenant.configure(receiver.url, regenerate_secret=True, secret_grace_seconds=0)
    receiver.hold(tenant.secret, answer["webhook_secret"])
    tenant.regenerate()
    arrival = receiver.next()
    assert (arrival.signatures, arrival.verified) == (1, [False, True])
    assert arrival.event["sequence"] == 2


def test_every_event_type_arrives_without_a_gap_in_sequence(place: Place, receiver: Receiver) -> None:
    tenant = listening(place, receiver)
    tenant.change_password()
    # An expiry event for each of the two old keys is sent when half of the grace period is over.
    tenant.regenerate(grace_period_seconds=6)
    found = [checked(receiver.next()) for _ in range(4)]
    tenant.revoke()
    tenant.visit_stripe("leave")
    tenant.visit_stripe("finish")
    tenant.delete("/stripe/disconnect/")
    assert tenant.post("/webhooks/test/")["success"]
    found += [checked(receiver.next()) for _ in range(5)]
    tenant.configure(receiver.gone_url)
    tenant.regenerate()
    found += [checked(receiver.next()) for _ in range(2)]
    assert sorted(number for _, number in found) == list(range(2, 13))
    assert {name for name, _ in found} | {"tenant.registered"} == {*get_args(EventType)}
    assert tenant.get("/webhooks/config/")["disabled_reason"] == "gone"


def test_a_test_is_sent_despite_a_filter_or_a_disabled_webhook(place: Place, receiver: Receiver) -> None:
    tenant = listening(place, receiver)
    tenant.configure(receiver.gone_url, event_types=["api_key.revoked"])
    assert tenant.post("/webhooks/test/")["status_code"] == 410
    assert checked(receiver.next()) == ("webhook.test", 2)
    assert tenant.get("/webhooks/config/")["status"] == "active", "a test has disabled it"
    tenant.revoke()
    assert {checked(receiver.next()), checked(receiver.next())} == {
        ("api_key.revoked", 3),
        ("webhook.disabled", 4),
    }
    assert tenant.post("/webhooks/test/")["status_code"] == 410
    assert checked(receiver.next()) == ("webhook.test", 5)
    assert tenant.delivered().count("webhook.test") == 2


def test_event_types_not_chosen_are_not_sent(place: Place, receiver: Receiver) -> None:
    tenant = listening(place, receiver)
    tenant.configure(receiver.url, event_types=["api_key.revoked"])
    tenant.regenerate()
    tenant.revoke()
    assert checked(receiver.next()) == ("api_key.revoked", 3)
    assert "api_key.regenerated" not in tenant.delivered()


def test_a_removed_webhook_gets_no_events_until_configured_again(place: Place, receiver: Receiver) -> None:
    tenant = listening(place, receiver)
    tenant.delete("/webhooks/config/")
    tenant.regenerate()
    assert "webhook_secret" not in tenant.configure(receiver.url)
    tenant.revoke()
    assert checked(receiver.next()) == ("api_key.revoked", 3)
    assert "api_key.regenerated" not in tenant.delivered()
