"""What the README and the docs tell a newcomer to paste, word for word."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from billing import settings

ROOT = Path(__file__).parents[2]
LOCAL = "http://127.0.0.1:8000"


def block_of(page: str, heading: str, language: str) -> str:
    """The first block of code of that language behind a heading."""
    section = (ROOT / page).read_text().partition(f"## {heading}")[2]
    match = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert match is not None, f"{page} has no {language} block behind {heading}"
    return match[1]


def test_the_tour_of_the_readme(live_server_url: str) -> None:
    script = block_of("README.md", "Five steps", "sh").replace(LOCAL, live_server_url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    registered, listed, verified = [json.loads(line) for line in done.stdout.splitlines()]
    assert registered["tenant"]["slug"].startswith("acme-inc")
    assert len(listed["keys"]) == 4
    assert (verified["valid"], verified["key"]["type"]) == (True, "test_secret")


def test_the_landing_page_has_the_same_tour(live_server_url: str) -> None:
    tour = block_of("README.md", "Five steps", "sh").replace(LOCAL, live_server_url)
    page = html.unescape(requests.get(live_server_url, timeout=10).text)
    missing = [line for line in tour.splitlines() if line and not line.startswith("#") and line not in page]
    assert missing == []


def test_the_python_quickstart(live_server_url: str) -> None:
    program = block_of("docs/quickstart.md", "Python", "python").replace(LOCAL, live_server_url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["test", "test", "401 key-revoked"]


def test_the_first_call_of_existing_clients(live_server_url: str) -> None:
    command = (
        f"curl -s -X POST {live_server_url}/api/v1/auth/tenants/register/ "
        '-H "Content-Type: application/json" '
        """-d '{"company_name": "My Company", "email": "me@mycompany.com", "password": "SecurePass123!", """
        """"first_name": "John", "last_name": "Doe", "domain": "mycompany.com"}'"""
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout).keys() == {"message", "tenant", "user", "tokens"}


def names_in(page: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "pattern"),
    [("docs/settings.md", r"^\| `([A-Z_]+)` \| .* \| .* \|$"), (".env.example", r"^([A-Z_]+)=")],
)
def test_every_setting_is_documented_and_no_other(page: str, pattern: str) -> None:
    source = Path(settings.__file__).read_text()
    read = set(re.findall(r'"([A-Z][A-Z_]{3,})"', source)) - {"XDG_STATE_HOME", "HOME"}
    assert names_in(page, pattern) - set(settings.KEYRINGS) == read - set(settings.KEYRINGS)
    assert set(settings.KEYRINGS) <= names_in(page, pattern)
