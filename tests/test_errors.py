"""The tree of errors: documented as it is, and each error presentable to a client."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from billing import errors
from billing.errors import BillingError, Fault, catalogue, settled
from billing.http.problems import STATUSES, status_of

LEAVES = sorted(catalogue(), key=lambda error: error.code())
EVERY = [
    error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, BillingError)
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: error.__name__)
def test_every_error_has_one_sentence_for_a_title(error: type[BillingError]) -> None:
    assert re.fullmatch(r"[A-Z][^.]+\.", (error.__doc__ and error.title()) or "")
    assert "\n" not in error.explanation()


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: error.__name__)
def test_every_leaf_has_the_status_of_its_family(error: type[BillingError]) -> None:
    families = [family for family in error.__mro__ if family in STATUSES]
    assert len(families) == 1
    assert status_of(error) == STATUSES[families[0]]
    assert 400 <= status_of(error) < 600


def test_every_code_is_kebab_case_and_unique() -> None:
    codes = [error.code() for error in LEAVES]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)
    assert len(set(codes)) == len(codes)


def test_codes_are_stable() -> None:
    # The contract names these; renaming a class must not rename a code that programs read.
    named = """state-missing state-unknown state-expired state-used access-denied code-rejected
    stripe-account-taken stripe-unavailable stripe-not-configured stripe-already-connected email-taken
    invalid-credentials refresh-token-reused wrong-password key-malformed key-unknown key-revoked
    key-expired tenant-disabled webhook-not-configured"""
    assert {error.code() for error in LEAVES} >= set(named.split())


# The drawing -------------------------------------------------------------------------------------

DRAWN = re.compile(r"(?P<indent>[│├└─ ]*)(?P<name>\w+)(?: +(?P<status>\d{3})\b.*)?")


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Name → parent and status, as the module's docstring draws them."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines()[2:]:
        match = DRAWN.fullmatch(line.rstrip())
        assert match, line
        depth = len(match["indent"]) // 4
        above[depth:] = [match["name"]]
        tree[match["name"]] = (above[depth - 1] if depth else None, match["status"])
    return tree


def test_the_docstring_draws_the_class_tree() -> None:
    parents = {error.__name__: error.__bases__[0].__name__ for error in EVERY if error is not BillingError}
    assert {name: parent for name, (parent, _) in drawn().items() if parent} == parents


def test_the_docstring_gives_the_statuses() -> None:
    statuses = {family.__name__: str(status) for family, status in STATUSES.items()}
    assert {name: status for name, (_, status) in drawn().items() if status} == statuses


def test_errors_are_defined_in_order_of_status() -> None:
    statuses = [status_of(error) for error in EVERY if error in STATUSES]
    assert statuses == sorted(statuses)
    assert Path(errors.__file__).name == "errors.py"


# One error ---------------------------------------------------------------------------------------


def test_the_detail_defaults_to_the_title() -> None:
    assert errors.PasswordTooWeak("Too short.").detail == "Too short."
    assert errors.KeyUnknown().detail == errors.KeyUnknown.title() == "The API key is unknown."
    assert str(errors.KeyUnknown()) == "The API key is unknown."


def test_an_error_may_have_a_retry_time() -> None:
    assert errors.Overloaded().retry_after_seconds == 2
    assert errors.Overloaded(retry_after_seconds=7).retry_after_seconds == 7
    assert errors.Overloaded(retry_after_seconds=0).retry_after_seconds == 0
    assert errors.NotFound().retry_after_seconds is None
    assert errors.Overloaded.retry_after_seconds == 2


def test_faults_cannot_be_changed() -> None:
    faults = [Fault("/a", "It is required.")]
    error = errors.InvalidRequest(faults=faults)
    faults.clear()
    assert error.faults == (Fault("/a", "It is required."),)


# Settled -----------------------------------------------------------------------------------------


def test_an_outcome_is_returned_and_a_refusal_is_raised() -> None:
    assert settled("fine") == "fine"
    assert settled(None) is None
    refusal = errors.RefreshTokenReused()
    with pytest.raises(errors.RefreshTokenReused) as caught:
        settled(refusal)
    assert caught.value is refusal


def test_other_exceptions_are_returned_as_outcomes() -> None:
    other = ValueError()
    assert settled(other) is other
