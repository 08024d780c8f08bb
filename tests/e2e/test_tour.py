"""What the README and the docs offer to paste works as written, but for addresses and ports."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import requests

from billing import settings
from billing.http.document import resolve
from billing.stripe_connect import MESSAGES
from billing.stripe_connections import CALLBACK
from tests import live
from tests.answers import DOCUMENT
from tests.conftest import API
from tests.e2e.places import Place

ROOT = Path(__file__).parents[2]
LOCAL = "http://127.0.0.1:8000"


def block_of(page: str, heading: str, language: str, which: int = 0) -> str:
    """A code block of that language after a heading, by default the first."""
    section = (ROOT / page).read_text().partition(f"## {heading}")[2]
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert len(blocks) > which, f"{page} has no {language} block behind {heading}"
    return blocks[which]


def test_the_readme_tour_works(live_server_url: str) -> None:
    script = block_of("README.md", "Five steps", "sh").replace(LOCAL, live_server_url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    registered, listed, verified = [json.loads(line) for line in done.stdout.splitlines()]
    assert registered["tenant"]["slug"].startswith("acme-inc")
    assert len(listed["keys"]) == 4
    assert (verified["valid"], verified["key"]["type"]) == (True, "test_secret")


def test_the_landing_page_shows_the_readme_tour(live_server_url: str) -> None:
    tour = block_of("README.md", "Five steps", "sh").replace(LOCAL, live_server_url)
    page = html.unescape(requests.get(live_server_url, timeout=10).text)
    missing = [line for line in tour.splitlines() if line and not line.startswith("#") and line not in page]
    assert missing == []


def test_the_python_quickstart_works(live_server_url: str) -> None:
    program = block_of("docs/quickstart.md", "Python", "python").replace(LOCAL, live_server_url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["test", "test", "401 key-revoked"]


@pytest.mark.parametrize(
    ("heading", "statuses"),
    [
        ("Connect with OAuth", ["active", "active", "disconnected"]),
        ("Connect with an account link", ["pending", "active"]),
    ],
)
def test_the_documented_ways_to_connect_stripe_work(place: Place, heading: str, statuses: list[str]) -> None:
    tour = block_of("README.md", "Five steps", "sh").partition("# 3.")[0].replace("ada@", f"{uuid4()}@")
    script = tour + block_of("docs/stripe-connect.md", heading, "sh")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(LOCAL, place.api)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, *said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.get("status") or one["tenant"]["stripe_connect_status"] for one in said] == statuses


def test_the_recipe_for_local_webhooks_works(place: Place, tmp_path: Path) -> None:
    page, heading, port = "docs/webhooks.md", "On your own machine", str(live.free_port())
    (tmp_path / "receiver.py").write_text(block_of(page, heading, "python").replace("9000", port))
    tour = block_of("README.md", "Five steps", "sh").partition("# 3.")[0].replace("ada@", f"{uuid4()}@")
    recipe = block_of(page, heading, "sh", which=1).replace("9000", port).replace(LOCAL, place.api)
    # The library is installed already; and a busy machine takes longer than a second.
    recipe = recipe.replace("pip install standardwebhooks\n", "")
    recipe = recipe.replace(
        "sleep 1", f"until curl -s -o answer http://127.0.0.1:{port}/; do sleep 0.1; done"
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", tour.replace(LOCAL, place.api) + recipe],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, received, report = done.stdout.splitlines()
    assert received == "2 webhook.test {}"
    assert (json.loads(report)["success"], json.loads(report)["status_code"]) == (True, 204)


def test_the_registration_call_of_existing_clients_works(live_server_url: str) -> None:
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
def test_exactly_the_existing_settings_are_documented(page: str, pattern: str) -> None:
    source = Path(settings.__file__).read_text()
    read = set(re.findall(r'"([A-Z][A-Z_]{3,})"', source)) - {"XDG_STATE_HOME", "HOME"}
    assert names_in(page, pattern) - set(settings.KEYRINGS) == read - set(settings.KEYRINGS)
    assert set(settings.KEYRINGS) <= names_in(page, pattern)


# What docs/stripe-connect.md lists ---------------------------------------------------------------


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its header row."""
    section = (ROOT / page).read_text().partition(f"## {heading}\n")[2]
    table = re.search(r"((?:^\|.*\|\n)+)", section, re.MULTILINE)
    assert table is not None, f"{page} has no table behind {heading}"
    return [line.strip("| ").split(" | ") for line in table[1].splitlines()[2:]]


def test_exactly_the_existing_account_statuses_are_explained() -> None:
    listed = {
        status.strip("`"): message for status, message, _ in rows_of("docs/stripe-connect.md", "Status")
    }
    assert listed == MESSAGES


def test_exactly_the_stripe_specific_problems_are_explained() -> None:
    listed = {
        code.strip("`"): int(status) for code, status, _ in rows_of("docs/stripe-connect.md", "Problems")
    }
    # Codes that other operations return too are not about Stripe.
    ours, neighbours = (
        codes_of("/stripe/connect/", "/stripe/callback/"),
        codes_of("/stripe/status/", "/login/", "/api-keys/revoke/"),
    )
    assert listed == {code: status for code, status in ours.items() if code not in neighbours}


def codes_of(*actions: str) -> dict[str, int]:
    """The error codes that the OpenAPI document lists for these operations, with their statuses."""
    found = {}
    for action in actions:
        for operation in DOCUMENT["paths"][f"{API}{action}"].values():
            for status, response in operation["responses"].items():
                said = resolve(DOCUMENT, response)["description"]
                codes = re.search(r"^Codes?: (.*?)\.", said, re.MULTILINE | re.DOTALL)
                found |= dict.fromkeys(re.findall(r"`([a-z-]+)`", codes[1] if codes else ""), int(status))
    return found


def test_the_documented_redirect_uri_is_the_callback() -> None:
    assert f"\n   {CALLBACK}\n" in (ROOT / "docs/stripe-connect.md").read_text()
