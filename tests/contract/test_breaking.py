"""Breaking changes are reported, and harmless ones are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contract import breaking
from contract.breaking import breaks_between
from contract.programs import BIN, DOCUMENT

Edit = tuple[str, str, str]
"""The text before the edit, the text to replace, and its replacement."""


@pytest.fixture(autouse=True)
def needs_node() -> None:
    if os.environ.get("BILLING_TESTS_WITHOUT_NODE") == "1":
        pytest.skip("BILLING_TESTS_WITHOUT_NODE=1")
    if not (BIN / "redocly").exists():
        pytest.skip("The tools of contract/node are not installed: `make contract` does that.")


BREAKS: dict[str, tuple[Edit, str]] = {
    "a member of an answer is gone": (
        (
            "    KeyVerification:",
            "        key: {$ref: '#/components/schemas/VerifiedKey'}\n",
            "",
        ),
        "Property `key` of `KeyVerification` was removed.",
    ),
    "a value of a request is gone": (
        ("", "enum: [live, test, all]", "enum: [live, all]"),
        "Enum of `key_type` lost values: 'test'.",
    ),
    "a member of a request became required": (
        (
            "    RevokeKeysRequest:",
            "required: [key_type, confirm]",
            "required: [key_type, confirm, reason]",
        ),
        "Properties of `RevokeKeysRequest` became required: `reason`.",
    ),
    "a member of an answer is no longer required": (
        ("    KeyVerification:", "required: [valid, tenant]", "required: [tenant]"),
        "Properties of `KeyVerification` are no longer required: `valid`.",
    ),
    "a status is gone": (
        ("", "        '409': {$ref: '#/components/responses/EmailTaken'}\n", ""),
        "Response `409` was removed.",
    ),
    "an operation needs credentials": (
        (
            "operationId: log_in\n      tags",
            "      security: []\n",
            "      security:\n        - bearerAuth: []\n",
        ),
        "POST /api/v1/auth/tenants/login/: it needs credentials now.",
    ),
    "an operation takes no keys": (
        ("operationId: verify_api_key\n      tags", "        - apiKeyAuth: []\n", ""),
        "GET /api/v1/auth/tenants/verify/: it no longer takes apiKeyAuth.",
    ),
    "a role may do less": (
        ("operationId: list_api_keys\n      tags", "x-roles: [admin, owner]", "x-roles: [owner]"),
        "GET /api/v1/auth/tenants/api-keys/: it is closed to admin.",
    ),
    "a bound is tighter": (
        ("    CompanyName:", "maxLength: 255", "maxLength: 200"),
        "`maxLength` of `company_name` changed from '255' to '200'.",
    ),
    "an answer has a new enum value": (
        (
            "",
            "enum: [active, expiring, revoked, expired]",
            "enum: [active, expiring, revoked, expired, suspended]",
        ),
        "Enum of `status` gained values: 'suspended'.",
    ),
    "an operation has moved": (
        ("", "/api/v1/auth/tenants/me/:", "/api/v1/auth/tenants/whoami/:"),
        "was removed.",
    ),
}

NEW_MEMBER = "note:\n          type: string\n          description: New.\n          maxLength: 9\n        "
HARMLESS: tuple[Edit, ...] = (
    ("", "summary: Log in\n", "summary: Log in with a password\n"),
    ("    KeyVerification:", "key: {$ref", f"{NEW_MEMBER}key: {{$ref"),
    ("    RevokeKeysRequest:", "reason:\n", f"{NEW_MEMBER}reason:\n"),
    (
        "operationId: list_api_keys\n      tags",
        "x-roles: [admin, owner]",
        "x-roles: [developer, admin, owner]",
    ),
    (
        "operationId: get_current_user\n      tags",
        "        - bearerAuth: []\n",
        "        - bearerAuth: []\n        - apiKeyAuth: []\n",
    ),
    ("    RegisterRequest:", "maxLength: 150", "maxLength: 200"),
    ("    EmailTaken:", "The email is in use.", "The email is taken."),
)


def changed(edits: list[Edit], place: Path) -> Path:
    text = DOCUMENT.read_text()
    for after, old, new in edits:
        before, anchor, rest = text.partition(after) if after else ("", "", text)
        assert old in rest, f"{old!r} is not behind {after!r}"
        text = before + anchor + rest.replace(old, new, 1)
    revision = place / "billing.yaml"
    revision.write_text(text)
    return revision


def test_each_breaking_change_is_reported(tmp_path: Path) -> None:
    # All in one run, because the tool takes five seconds to start.
    found = breaks_between(DOCUMENT, changed([edit for edit, _ in BREAKS.values()], tmp_path))
    missing = [name for name, (_, sentence) in BREAKS.items() if not any(sentence in one for one in found)]
    assert missing == [], found


def test_harmless_changes_are_not_reported(tmp_path: Path) -> None:
    assert breaks_between(DOCUMENT, changed(list(HARMLESS), tmp_path)) == []


def test_the_command_needs_a_revision(capsys: pytest.CaptureFixture[str]) -> None:
    assert breaking.main([]) == 2
    assert breaking.main(["no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err


def test_the_document_has_no_breaking_changes_from_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaking, "document_of", lambda _: DOCUMENT.read_bytes())
    assert breaking.main(["here"]) == 0
    assert capsys.readouterr().out == "0 breaking changes since here\n"
