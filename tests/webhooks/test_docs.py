"""docs/webhooks.md: its tables match the code, and its snippets are run verbatim."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import requests

from billing.housekeeping import KEPT
from billing.ids import new_id
from billing.keys import TOLD_BEFORE
from billing.limits import STANDARD
from billing.webhooks.delivery import LONGEST_STRETCH, RETRY_DELAYS, Failure
from billing.webhooks.egress import Egress
from billing.webhooks.events import EventType, envelope
from billing.webhooks.signing import new_secret, signed_headers
from tests import live
from tests.answers import DOCUMENT
from tests.javascript import NODE_MODULES, node
from tests.webhooks.test_events import callback

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/webhooks.md").read_text()

NO_MATCH, UNTIMELY = "No matching signature found", "Message timestamp too"


# The page ----------------------------------------------------------------------------------------


def section(heading: str) -> str:
    """The text after a heading, up to the next one of any depth. A shell comment is not a heading."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ [A-Z]|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no heading {heading}"
    return found[1]


def snippets(heading: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(heading), re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table after a heading, without its header row."""
    lines = re.findall(r"^\| (.*) \|$", section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


# Tables ------------------------------------------------------------------------------------------


def test_the_events_table_matches_the_openapi_document() -> None:
    assert rows("Events") == [
        [f"`{name}`", callback(name)["summary"], f"`{schema_of(name)}`"] for name in get_args(EventType)
    ]


def schema_of(event_type: str) -> str:
    reference: str = callback(event_type)["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return reference.rpartition("/")[2]


def test_the_members_table_matches_the_envelope() -> None:
    body = envelope(**event("webhook.test", {}))
    assert [name.strip("`") for name, _ in rows("The envelope")] == list(json.loads(body))


def test_the_retries_table_matches_the_code() -> None:
    assert rows("Retries") == [[str(n), in_words(delay)] for n, delay in enumerate(RETRY_DELAYS, start=1)]
    total = sum(RETRY_DELAYS, timedelta())
    assert timedelta(days=3) < total < timedelta(days=3, hours=6), "a little over three days"
    assert total * LONGEST_STRETCH < KEPT, "for how long to keep ids"


def in_words(delay: timedelta) -> str:
    for unit in ("hours", "minutes", "seconds"):
        count = delay / timedelta(**{unit: 1})
        if count >= 1:
            return f"{count:g} {unit}"
    return "at once"


def test_the_stated_limits_match_the_code() -> None:
    limits = {name: given.default for name, given in signature(Egress).parameters.items()}
    said = " ".join(section("Retries").split())
    assert f"no connection within {limits['connect_seconds']} seconds" in said
    assert f"no whole response within {limits['total_seconds']}." in said
    assert f"{limits['read_bytes'] // 1024} KiB are read" in said
    assert f"answer 2xx within {limits['total_seconds']} seconds" in PAGE
    tests = STANDARD.costly["send_test_webhook"]
    assert f"may send {tests.quota} tests a minute" in " ".join(section("Events").split())


def test_the_failure_codes_match_the_openapi_document_and_the_code() -> None:
    listed = [word.strip("`") for word, _ in rows("Why a delivery failed")]
    assert listed == words_of("WebhookDelivery")
    # A test delivery is never pending, and so cannot be cancelled.
    assert [word for word in listed if word != "cancelled"] == words_of("WebhookTestReport")
    assert set(listed) == {*get_args(Failure), "bad_status", "cancelled"}


def words_of(schema: str) -> list[str]:
    words: list[str] = DOCUMENT["components"]["schemas"][schema]["properties"]["error"]["x-extensible-enum"]
    return words


def test_the_stated_durations_match_the_code() -> None:
    assert timedelta(days=30) == KEPT
    assert "deliveries are kept for 30 days." in section("Missed events")
    assert "Keep ids for at least 30 days." in section("The envelope")
    assert timedelta(hours=24) == TOLD_BEFORE
    assert "`api_key.expiring` comes 24 hours before the end" in section("Events")


def test_the_local_recipe_permits_loopback() -> None:
    opened = " ".join(f"{name}={value}" for name, value in live.OPEN_LOOPBACK.items())
    assert f"\nOPEN_LOOPBACK := {opened}\n" in (ROOT / "Makefile").read_text()
    assert snippets("On your own machine", "sh")[0] == "make serve WEBHOOKS=local\n"
    assert all(f"`{name}={value}`" in PAGE for name, value in live.OPEN_LOOPBACK.items())


def test_the_headers_table_matches_the_headers_sent() -> None:
    sent = signed_headers([new_secret()], id="1", at=datetime.now(UTC), body=b"")
    assert [name.strip("`") for name, _ in rows("Verify a signature")] == list(sent)


def test_the_grace_period_matches_the_openapi_document() -> None:
    grace = DOCUMENT["components"]["schemas"]["ConfigureWebhookRequest"]["properties"]["secret_grace_seconds"]
    assert (grace["default"], grace["maximum"]) == (24 * 3600, 7 * 24 * 3600)
    assert "(24 hours if you don't say, at most 7 days)" in section("Rotate the secret")


def test_the_test_vectors_match_the_code() -> None:
    said = {name.replace("`", ""): value.strip("`") for name, value in rows("Test vectors")}
    assert said["second secret"] == "whsec_`, and the base64 of the bytes 0 to 31"
    second = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    secrets = {"": [said["secret"]], " by both": [second, said["secret"]]}
    for whose, signers in secrets.items():
        at = datetime.fromtimestamp(int(said["webhook-timestamp"]), UTC)
        made = signed_headers(signers, id=said["webhook-id"], at=at, body=said["body"].encode())
        for name in ("webhook-signature", "X-Webhook-Signature"):
            assert said[name + whose] == made[name]


# A delivery --------------------------------------------------------------------------------------


def event(type: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": new_id(),
        "type": type,
        "created_at": datetime.now(UTC),
        "tenant_id": new_id(),
        "livemode": True,
        "sequence": 41,
        "data": data,
    }


@dataclass(frozen=True)
class Delivery:
    """What a receiver gets, and the secret it holds."""

    secret: str
    body: bytes
    headers: dict[str, str]


def delivered(*, age: timedelta = timedelta(0), secrets: tuple[str, ...] = (), holds: int = 0) -> Delivery:
    """A delivery made by our own code, to a receiver that holds one of the secrets."""
    said = event("user.password_changed", {"email": "zoë@acme.example"})
    secrets = secrets or (new_secret(),)
    body = envelope(**said)
    headers = signed_headers(secrets, id=str(said["id"]), at=datetime.now(UTC) - age, body=body)
    lower = {name.lower(): value for name, value in headers.items()}
    return Delivery(secrets[holds], body, lower | {"content-type": "application/json"})


@pytest.fixture
def good() -> Delivery:
    """Made for each test: a delivery is accepted for 5 minutes only."""
    return delivered()


def genuine(good: Delivery) -> dict[str, Delivery]:
    two = (new_secret(), new_secret())
    signature = good.headers["webhook-signature"]
    return {
        "one secret": good,
        "rotation, new": delivered(secrets=two),
        "rotation, old": delivered(secrets=two, holds=1),
        "a future scheme": with_header(good, "webhook-signature", f"v2,AAAA {signature}"),
    }


def forged(good: Delivery) -> dict[str, Delivery]:
    return {
        "changed body": replace(good, body=good.body.replace(b"acme", b"evil")),
        "longer body": replace(good, body=good.body + b" "),
        "other id": with_header(good, "webhook-id", "another"),
        "other signature": with_header(good, "webhook-signature", delivered().headers["webhook-signature"]),
        "shortened": with_header(good, "webhook-signature", good.headers["webhook-signature"][:-4]),
    }


def untimely(good: Delivery) -> dict[str, Delivery]:
    return {
        f"{minutes} minutes old": delivered(age=timedelta(minutes=minutes), secrets=(good.secret,))
        for minutes in (6, -6)
    }


def with_header(delivery: Delivery, name: str, value: str) -> Delivery:
    return replace(delivery, headers={**delivery.headers, name: value})


# Python and JavaScript ---------------------------------------------------------------------------


PYTHON = """
import sys
print(event_of(sys.stdin.buffer.read(), json.loads(sys.argv[1]))["data"]["email"])
"""
JAVASCRIPT = """
import { readFileSync } from "node:fs";
console.log(eventOf(readFileSync(0), JSON.parse(process.argv[2])).data.email);
"""
SNIPPETS = [
    ("Python, with `pip install standardwebhooks`", "python"),
    ("Python, by hand", "python"),
    ("JavaScript, with `npm install standardwebhooks`", "js"),
    ("JavaScript, by hand", "js"),
]
in_each_language = pytest.mark.parametrize(("heading", "language"), SNIPPETS, ids=[h for h, _ in SNIPPETS])


def command(heading: str, language: str, place: Path) -> list[str]:
    """The snippet as a program: the body on stdin and the headers as its argument."""
    (code,) = snippets(heading, language)
    if language == "python":
        return [sys.executable, "-c", f"import json\n{code}{PYTHON}"]
    program = [node(), str(place / "receiver.mjs")]
    (place / "receiver.mjs").write_text(code + JAVASCRIPT)
    (place / "node_modules").symlink_to(NODE_MODULES)
    return program


def received(program: list[str], delivery: Delivery) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*program, json.dumps(delivery.headers)],
        input=delivery.body,
        capture_output=True,
        env={**os.environ, "WEBHOOK_SECRET": delivery.secret, "PYTHONUTF8": "1"},
        timeout=60,
    )


@in_each_language
def test_each_snippet_accepts_genuine_and_rejects_forged_deliveries(
    heading: str, language: str, good: Delivery, tmp_path: Path
) -> None:
    program = command(heading, language, tmp_path)
    for name, delivery in genuine(good).items():
        done = received(program, delivery)
        assert done.stdout.decode() == "zoë@acme.example\n", (name, done.stderr.decode())
    for deliveries, reason in ((forged(good), NO_MATCH), (untimely(good), UNTIMELY)):
        for name, delivery in deliveries.items():
            done = received(program, delivery)
            assert (done.stdout, done.returncode != 0) == (b"", True), name
            assert reason in done.stderr.decode(), name


# A shell -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openssl() -> None:
    if os.environ.get("BILLING_TESTS_WITHOUT_OPENSSL") == "1":
        pytest.skip("BILLING_TESTS_WITHOUT_OPENSSL=1")
    if shutil.which("openssl") is None:
        pytest.fail("No openssl: `make openssl`, or BILLING_TESTS_WITHOUT_OPENSSL=1 to go without.")


def checked(given: str, place: Path) -> tuple[int, str, str]:
    """Check a delivery that other shell code has set up: the exit code, stdout and stderr."""
    _, check = snippets("A shell, with openssl", "sh")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", given + check],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.usefixtures("openssl")
def test_the_shell_snippet_accepts_the_published_vector(tmp_path: Path) -> None:
    given, _ = snippets("A shell, with openssl", "sh")
    assert checked(given, tmp_path) == (0, "good", "")
    assert given.count("2432232314") == 1
    assert checked(given.replace("2432232314", "2432232315"), tmp_path) == (1, "", NO_MATCH)


@pytest.mark.usefixtures("openssl")
def test_the_shell_snippet_accepts_genuine_and_rejects_forged_deliveries(
    good: Delivery, tmp_path: Path
) -> None:
    for name, delivery in genuine(good).items():
        assert checked(set_up(delivery, tmp_path), tmp_path) == (0, "good", ""), name
    for name, delivery in forged(good).items():
        assert checked(set_up(delivery, tmp_path), tmp_path) == (1, "", NO_MATCH), name


def set_up(delivery: Delivery, place: Path) -> str:
    (place / "body.json").write_bytes(delivery.body)
    names = {"id": "webhook-id", "timestamp": "webhook-timestamp", "signatures": "webhook-signature"}
    assigned = "".join(f"{name}='{delivery.headers[header]}'\n" for name, header in names.items())
    return f"WEBHOOK_SECRET='{delivery.secret}'\n{assigned}"


# On your own machine -----------------------------------------------------------------------------


@pytest.fixture
def receiver(good: Delivery) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The recipe's receiver, at a free port, with the secret of `good`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (code,) = snippets("On your own machine", "python")
    with subprocess.Popen(
        [sys.executable, "-c", code.replace("9000", str(port))],
        env={**os.environ, "WEBHOOK_SECRET": good.secret, "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}/", process
        finally:
            process.kill()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("the receiver does not listen")


def test_the_recipes_receiver_accepts_genuine_and_rejects_forged_deliveries(
    receiver: tuple[str, subprocess.Popen[str]], good: Delivery
) -> None:
    url, process = receiver
    bad = {**forged(good), **untimely(good), "no form": with_header(good, "webhook-signature", "v1")}
    for name, delivery in bad.items():
        answer = requests.post(url, data=delivery.body, headers=delivery.headers, timeout=10)
        assert answer.status_code == 400, name
    assert requests.post(url, data=good.body, headers=good.headers, timeout=10).status_code == 204
    assert process.stdout is not None
    assert process.stdout.readline() == "41 user.password_changed {'email': 'zoë@acme.example'}\n"


def test_every_snippet_of_the_page_has_a_test() -> None:
    """A block added to the page fails this until a test runs it.

    The recipe that calls the server is run by tests/e2e/test_tour.py, the operator's command by tests/test_cli.py.
    """
    languages = re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)
    assert sorted(languages) == ["js"] * 2 + ["python"] * 3 + ["sh"] * 5
