"""docs/sdk.md shows the code and the options that are really used."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from contract.sdks import SDKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/sdk.md").read_text(encoding="utf-8")
FLOWS = {"python": "flow.py", "ts": "flow.mts"}


def pieces(language: str) -> list[str]:
    """The parts between empty lines in the page's code blocks of that language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [piece.strip() for block in blocks for piece in block.split("\n\n")]


@pytest.mark.parametrize("language", FLOWS)
def test_snippets_are_parts_of_the_flows(language: str) -> None:
    flow = (ROOT / "contract/sdk_flows" / FLOWS[language]).read_text(encoding="utf-8").split("\n\n")
    whole = [piece.strip() for piece in flow]
    shown = pieces(language)
    assert len(shown) == 6
    # The last piece of a flow prints what came of it, too.
    assert [piece for piece in shown if not any(part.startswith(piece) for part in whole)] == []


def test_the_table_lists_the_generated_sdks() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| .+ \| `([^`]+)`(.*) \|$", PAGE, re.MULTILINE)
    assert [(name, judge + more) for name, judge, more in rows] == [(sdk.name, sdk.judged_by) for sdk in SDKS]


@pytest.mark.parametrize(
    "option", ["--default-non-nullable false", "enumClassPrefix=true", "useJakartaEe=true"]
)
def test_documented_options_are_those_we_use(option: str) -> None:
    assert option in PAGE
    source = (ROOT / "contract/sdks.py").read_text(encoding="utf-8")
    assert all(word in source for word in re.split(r"[ =]", option))


def test_the_pinned_typescript_has_the_documented_version() -> None:
    pinned = json.loads((ROOT / "contract/node/package.json").read_text(encoding="utf-8"))["dependencies"]
    documented = re.search(r"Pin TypeScript (\d+\.\d+)", PAGE)
    assert documented
    assert pinned["typescript"].startswith(f"{documented[1]}.")


@pytest.mark.parametrize("lock", ["contract/node/package-lock.json", "requirements-contract.lock"])
def test_locks_contain_no_download_urls(lock: str) -> None:
    # `npm install --omit-lockfile-registry-resolved` writes none but those of `funding`, which can be deleted.
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert '"resolved"' not in text
    assert "index-url" not in text
    assert "find-links" not in text
    assert "https://" not in text


def test_generators_are_not_locked_with_the_product() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    locked = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    assert any(one.startswith("openapi-generator-cli") for one in groups["contract"])
    assert "openapi-generator-cli" not in locked
