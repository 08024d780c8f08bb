"""Linters of the document, which must find no error and no warning by the rules in `contract/lint`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openapi_spec_validator import OpenAPIV30SpecValidator
from openapi_spec_validator.readers import read_from_filename

from contract.programs import DOCUMENT, ROOT, ran

CONFIGURATION = ROOT / "contract/lint"
PATIENCE_SECONDS = 180
SHOWN = 5


def checks() -> list[tuple[str, Callable[[], str]]]:
    """The checks by name; each returns a summary or raises `AssertionError`."""
    return [
        ("lint openapi-spec-validator", specification),
        ("lint spectral, oas and owasp", spectral),
        ("lint redocly, recommended-strict", redocly),
    ]


def specification(document: Path = DOCUMENT) -> str:
    text, base_uri = read_from_filename(str(document))
    found = [fault.message for fault in OpenAPIV30SpecValidator(text, base_uri=base_uri).iter_errors()]
    assert not found, _told(found)
    return "valid OpenAPI 3.0"


def spectral(document: Path = DOCUMENT) -> str:
    """Lint with all rules of the rule sets: even a hint is a failure."""
    done = ran(
        "spectral",
        "lint",
        str(document),
        *("--ruleset", str(CONFIGURATION / ".spectral.yaml")),
        *("--format", "json", "--fail-severity", "hint", "--verbose"),
        seconds=PATIENCE_SECONDS,
    )
    counted = re.search(r"Found \d+ rules \((\d+) enabled\)", done.stdout)
    assert counted, done.stderr[-500:] or done.stdout[-500:]
    # The JSON list of findings is surrounded by text.
    found = [f"{one['code']} at {'/'.join(map(str, one['path']))}" for one in _first_list(done.stdout)]
    assert done.returncode == 0 and not found, _told(found)
    return f"{counted[1]} rules, 0 errors, 0 warnings"


def redocly(document: Path = DOCUMENT) -> str:
    done = ran(
        "redocly",
        *("lint", str(document)),
        *("--config", str(CONFIGURATION / "redocly.yaml"), "--format", "json"),
        seconds=PATIENCE_SECONDS,
    )
    assert done.stdout.startswith("{"), done.stderr[-500:]
    report = json.loads(done.stdout)
    found = [f"{one['ruleId']}: {one['message']}" for one in report["problems"]]
    assert done.returncode == 0 and not found, _told(found)
    return f"{report['totals']['errors']} errors, {report['totals']['warnings']} warnings"


def _first_list(output: str) -> list[dict[str, Any]]:
    for line in re.finditer(r"^\[", output, re.MULTILINE):
        return list(json.JSONDecoder().raw_decode(output[line.start() :])[0])
    return []


def _told(found: list[str]) -> str:
    return f"{len(found)} found: " + "; ".join(found[:SHOWN])
