"""docs/security.md: every file and test that it names exists, and no requirement is left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())
CHECKLIST = PAGE.partition("\n### V1 ")[2]

# How many requirements of levels 1 and 2 each section of ASVS 5.0.0 has; they come first in each.
LEVELS_1_AND_2 = """
1.1:2 1.2:9 1.3:11 1.4:3 1.5:2
2.1:3 2.2:3 2.3:4 2.4:1
3.2:2 3.3:4 3.4:6 3.5:5 3.7:2
4.1:3 4.2:1 4.3:2 4.4:4
5.1:1 5.2:3 5.3:2 5.4:3
6.1:3 6.2:12 6.3:4 6.4:4 6.5:5 6.6:3 6.8:4
7.1:3 7.2:4 7.3:2 7.4:5 7.5:2 7.6:2
8.1:2 8.2:3 8.3:1 8.4:1
9.1:3 9.2:4
10.1:2 10.2:2 10.3:4 10.4:11 10.5:5 10.6:2 10.7:3
11.1:2 11.2:3 11.3:3 11.4:4 11.5:1 11.6:1
12.1:3 12.2:2 12.3:4
13.1:1 13.2:5 13.3:2 13.4:5
14.1:2 14.2:4 14.3:3
15.1:3 15.2:3 15.3:7
16.1:1 16.2:5 16.3:4 16.4:3 16.5:3
17.1:1 17.2:4 17.3:2
"""
REQUIREMENTS = {section: int(most) for section, most in (part.split(":") for part in LEVELS_1_AND_2.split())}
TOTALS = {
    "met": r"(\d+) are met",
    "partly": r"(\d+) partly",
    "not met": r"(\d+) not;",
    "installation": r"(\d+) are for the installation",
    "–": r"(\d+) do not apply",
}

NAMED = sorted(set(re.findall(r"`(\.?[\w-]+(?:/[\w.-]+)+|[\w-]+\.(?:py|toml|lock|md))(?=::|`)", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ROWS = re.findall(
    r"^\| V(\d+\.\d+)\.(\d+)(?:–(\d+))? \| ([^|]+) \| ([^|]+) \| (.+) \|$", CHECKLIST, re.MULTILINE
)


@pytest.mark.parametrize("path", NAMED)
def test_every_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_every_named_test_exists(path: str, name: str) -> None:
    assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_test_is_named_as_path_and_function() -> None:
    assert len(NAMED) > 80
    assert len(TESTS) > 150
    assert PAGE.count("::") == len(re.findall(r"`tests/[\w/]+\.py::\w+`", PAGE))


def test_each_requirement_is_listed_once() -> None:
    listed = Counter(f"{section}.{number}" for section, number in numbers())
    wanted = [
        f"{section}.{number}" for section, most in REQUIREMENTS.items() for number in range(1, most + 1)
    ]
    assert listed == Counter(wanted)


def test_every_met_requirement_names_its_evidence() -> None:
    assert [row[3] for row in ROWS if row[4] == "met" and not re.search(r"`[\w/.-]+|\]\(", row[5])] == []


def test_the_totals_match_the_table() -> None:
    counted = Counter(state for *_, state in states())
    said = {state: int(re.search(pattern, PROSE)[1]) for state, pattern in TOTALS.items()}  # type: ignore[index]
    assert said == counted
    assert f"levels 1 and 2 ({sum(counted.values())})" in PROSE


def test_unmet_requirements_are_listed_at_the_top() -> None:
    told = re.findall(
        r"^\| (V[\d.–]+) \|", PAGE.partition("### Not met")[2].partition("\n### ")[0], re.MULTILINE
    )
    assert told == re.findall(r"^\| (V[\d.–]+) \| [^|]+ \| (?:partly|not met) \|", CHECKLIST, re.MULTILINE)


def numbers() -> list[tuple[str, int]]:
    return [(section, number) for section, number, _ in states()]


def states() -> list[tuple[str, int, str]]:
    """Each requirement with its state; one row may cover several consecutive ones."""
    return [
        (section, number, state)
        for section, first, last, _, state, _ in ROWS
        for number in range(int(first), int(last or first) + 1)
    ]
