"""Tenants: slugs, and the own words of an account, of which its passwords must not be made."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.ids import new_id
from billing.tenants import LONGEST_SLUG, Account, Tenant, own_words, slugs, words_of
from billing.users import new_user

# A slow example on a busy machine is not a failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
ACME = Tenant(
    id=new_id(),
    company_name="Acme Industries",
    slug="acme-industries",
    email="ada@acme.example",
    domain="acme.example",
    webhook_url=None,
    stripe_account_id=None,
    stripe_status="not_connected",
    tier="free",
    is_active=True,
    created_at=NOW,
    updated_at=NOW,
)
ADA = new_user(ACME.id, {"email": "Ada@Acme.example", "first_name": "Ada"}, role="owner", now=NOW)


# Slugs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Acme Inc.", "acme-inc"),
        ("  Acme   &  Sons ", "acme-sons"),
        ("Müller & Söhne", "muller-sohne"),
        ("Ørsted", "orsted"),
        ("北京", "bei-jing"),
        ("Москва", "moskva"),
        ("O'Reilly", "o-reilly"),
        ("../../etc/passwd", "etc-passwd"),
        ("<script>", "script"),
        ("ACME_INC", "acme-inc"),
        ("1&1", "1-1"),
        ("", "tenant"),
        ("   ", "tenant"),
        ("!!!", "tenant"),
        ("😀", "tenant"),
        ("\0\n", "tenant"),
        ("a" * 255, "a" * LONGEST_SLUG),
        ("word " * 51, "-".join(["word"] * 12)),
        ("x" * 50 + " " + "y" * 50, "x" * 50),
    ],
)
def test_the_first_slug_has_no_suffix(name: str, slug: str) -> None:
    assert next(slugs(name)) == slug


@UNHURRIED
@given(name=st.text(max_size=255))
def test_every_slug_is_safe_in_a_url(name: str) -> None:
    for slug in islice(slugs(name), 3):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
        assert len(slug) <= LONGEST_SLUG + 7


def test_further_slugs_have_distinct_random_suffixes() -> None:
    plain, *others = islice(slugs("Acme"), 50)
    assert plain == "acme"
    assert all(re.fullmatch(r"acme-[0-9a-f]{6}", other) for other in others)
    assert len(set(others)) == 49


# Own words ---------------------------------------------------------------------------------------

WORDS = {"ada@acme.example", "Acme Industries", "Ada", "Lovelace", "acme.example"}


def test_own_words_come_from_the_registration() -> None:
    details = {
        "company_name": "Acme Industries",
        "email": "ada@acme.example",
        "first_name": "Ada",
        "last_name": "Lovelace",
        "domain": "acme.example",
        "password": "hunter2",
    }
    assert set(own_words(details)) == WORDS


def test_omitted_details_add_no_own_words() -> None:
    assert own_words({"email": "ada@acme.example", "company_name": "Acme"}) == ["ada@acme.example", "Acme"]


def test_an_existing_account_has_the_same_own_words() -> None:
    assert set(words_of(replace(ADA, last_name="Lovelace"), ACME)) == WORDS
    assert "None" not in "".join(words_of(ADA, replace(ACME, domain=None)))


def test_a_password_hash_is_not_in_a_representation() -> None:
    assert "the-hash" not in repr(Account(ACME, ADA, "the-hash"))
