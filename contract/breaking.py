"""Changes to the document that break a client written for an earlier one.

`python -m contract.breaking REVISION` compares the working tree with a revision. Redocly judges all changes but those
of access: the roles, which are in an extension of ours (`x-roles`), and which alternative credentials still work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from billing.http.document import load
from contract.programs import DOCUMENT, ROOT, ran

PATIENCE_SECONDS = 120
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
ANYBODY = frozenset[str]()

Json = dict[str, Any]


class NoBase(Exception):
    """There is no earlier document to compare with."""


def breaks_between(base: Path, revision: Path) -> list[str]:
    """The breaking changes, a sentence each."""
    before, after = load(base), load(revision)
    return sorted({*_of_redocly(base, revision), *_of_access(before, after)})


# Redocly's rules -----------------------------------------------------------------------------------


def _of_redocly(base: Path, revision: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        arguments = ("--format", "json", "--fail-on", "none", "--output", str(report))
        done = ran("redocly", "diff", str(base), str(revision), *arguments, seconds=PATIENCE_SECONDS)
        assert done.returncode == 0 and report.exists(), f"redocly diff failed:\n{done.stdout}{done.stderr}"
        changes = json.loads(report.read_bytes())["changes"]
    for change in changes:
        where = change["path"].removeprefix("#/").replace("~1", "/").replace("paths//", "/")
        for verdict in change["verdicts"]:
            # Access is judged below, for all operations alike.
            if verdict["impact"] == "major" and verdict["ruleId"] != "security-requirement-changed":
                yield f"{where}: {verdict['message']}"


# Who may call --------------------------------------------------------------------------------------


def _of_access(before: Json, after: Json) -> Iterator[str]:
    now = dict(_operations(after))
    for name, operation in _operations(before):
        if name in now:
            yield from (f"{name}: {text}" for text in _access_lost(operation, now[name], before, after))


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    """The operations under `METHOD /path/`, by which a client calls them."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield f"{method.upper()} {path}", item[method]


def _access_lost(operation: Json, now: Json, before: Json, after: Json) -> Iterator[str]:
    old, new = _ways_in(operation, before), _ways_in(now, after)
    if ANYBODY in old and ANYBODY not in new:
        yield "it needs credentials now."
    else:
        # A new way in that needs a subset of an old one's schemes still works for its clients.
        lost = [way for way in old if not any(other <= way for other in new)]
        yield from (f"it no longer takes {' with '.join(sorted(way))}." for way in lost)
    if roles := _roles(operation) - _roles(now):
        yield f"it is closed to {', '.join(sorted(roles))}."


def _ways_in(operation: Json, document: Json) -> list[frozenset[str]]:
    """The alternative sets of security schemes; the empty set lets anybody in."""
    security: list[Json] = (operation if "security" in operation else document).get("security", [])
    return [frozenset(way) for way in security] or [ANYBODY]


def _roles(operation: Json) -> set[str]:
    return set(operation.get("x-roles", ()))


# The check -----------------------------------------------------------------------------------------


def check() -> str:
    """Raise `AssertionError` unless the tests' breaking changes are all reported, and their harmless ones are not."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/contract/test_breaking.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0 and "skipped" not in lines[-1], done.stdout[-3000:]
    return lines[-1].partition(" in ")[0]


# The command ---------------------------------------------------------------------------------------


def document_of(revision: str) -> bytes:
    """The document at that revision; raises `NoBase`."""
    command = ["git", "show", f"{revision}:{DOCUMENT.relative_to(ROOT)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise NoBase(done.stderr.decode().strip())
    return done.stdout


def main(arguments: list[str]) -> int:
    """Return 1 if something breaks, 2 if there is nothing to compare with."""
    if len(arguments) != 1 or not arguments[0]:
        print("usage: make diff BASE=<revision>", file=sys.stderr)
        return 2
    try:
        earlier = document_of(arguments[0])
    except NoBase as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "billing.yaml"
        base.write_bytes(earlier)
        breaks = breaks_between(base, DOCUMENT)
    print("\n".join([*breaks, f"{len(breaks)} breaking changes since {arguments[0]}"]))
    return 1 if breaks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
