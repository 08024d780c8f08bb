"""Tenants as external clients: their API calls, and the programs that receive their events."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any
from uuid import uuid4

import requests

from tests.conftest import API, PASSWORD, bearer
from tests.javascript import PLACE, node

Json = dict[str, Any]

# Ample for a busy machine: normally a second or two is enough.
PATIENCE_SECONDS = 30
RECEIVERS = ("python", "javascript")


class Tenant:
    """A newly registered tenant, and its owner's calls."""

    def __init__(self, api: str, **more: Any) -> None:
        self._api = api
        body = {"company_name": "Acme Inc.", "email": f"{uuid4()}@acme.example", "password": PASSWORD, **more}
        registered = _json_of(requests.post(f"{api}{API}/register/", json=body, timeout=10))
        self.secret: str = registered["tenant"]["webhook_secret"]
        self.access: str = registered["tokens"]["access"]

    def get(self, path: str) -> Json:
        return self._called("GET", path)

    def post(self, path: str, **body: Any) -> Json:
        return self._called("POST", path, json=body)

    def delete(self, path: str) -> Json:
        return self._called("DELETE", path)

    def configure(self, url: str, **more: Any) -> Json:
        return self.post("/webhooks/config/", webhook_url=url, **more)

    def regenerate(self, **more: Any) -> Json:
        return self.post("/api-keys/regenerate/", key_type="test", confirm=True, **more)

    def revoke(self) -> Json:
        return self.post("/api-keys/revoke/", key_type="test", confirm=True)

    def change_password(self) -> None:
        body = {"old_password": PASSWORD, "new_password": "correct horse battery staple"}
        self.access = self.post("/change-password/", **body)["tokens"]["access"]

    def visit_stripe(self, decision: str) -> None:
        """Follow an account link as a browser would, decide, and return to the callback."""
        url = self.post("/stripe/connect/", flow="account_link")["url"]
        form = {"decision": decision, "account": "active"}
        back = requests.post(url, form, allow_redirects=False, timeout=10).headers["Location"]
        _json_of(requests.get(back, timeout=10))

    def delivered(self) -> list[str]:
        """The event types of the recent deliveries, pending ones included, newest first."""
        return [one["event_type"] for one in self.get("/webhooks/config/")["recent_deliveries"]]

    def _called(self, method: str, path: str, **more: Any) -> Json:
        return _json_of(
            requests.request(
                method, f"{self._api}{API}{path}", headers=bearer(self.access), timeout=20, **more
            )
        )


def _json_of(answer: requests.Response) -> Json:
    assert answer.ok, answer.text
    parsed: Json = answer.json()
    return parsed


# Receivers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request as received: for each secret the event that it verified, or None."""

    events: Sequence[Json | None]
    headers: dict[str, str]
    status: int

    @property
    def event(self) -> Json:
        """The event, the same for every secret that verified it."""
        first, *others = [event for event in self.events if event is not None]
        assert others == [first] * len(others)
        return first

    @property
    def verified(self) -> list[bool]:
        return [event is not None for event in self.events]

    @property
    def signatures(self) -> int:
        return len(self.headers["webhook-signature"].split())


class Receiver:
    """A tenant's receiver program. Its host name, `localhost`, is one that a development server may call."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._replies: queue.Queue[Json] = queue.Queue()
        self._arrived: queue.Queue[Json] = queue.Queue()
        Thread(target=self._listen, args=(_pipe(process.stdout),), daemon=True).start()
        self._base = f"http://localhost:{self._replies.get(timeout=PATIENCE_SECONDS)['port']}"
        self.url = f"{self._base}/events"
        # Answers 410.
        self.gone_url = f"{self._base}/gone"

    def hold(self, *secrets: str) -> None:
        """Verify with these secrets from now on."""
        print(*secrets, file=_pipe(self._process.stdin), flush=True)
        assert self._replies.get(timeout=PATIENCE_SECONDS) == {"holds": len(secrets)}

    def next(self) -> Arrival:
        return Arrival(**self._arrived.get(timeout=PATIENCE_SECONDS))

    def _listen(self, output: IO[str]) -> None:
        for line in output:
            parsed = json.loads(line)
            (self._arrived if "events" in parsed else self._replies).put(parsed)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def receiving(language: str) -> Iterator[Receiver]:
    """Run the receiver in Python or JavaScript until the block ends."""
    if language == "python":
        command = [sys.executable, str(Path(__file__).parents[1] / "webhooks/receiver.py")]
    else:
        command = [node(), str(PLACE / "receiver.mjs")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            yield Receiver(process)
        finally:
            process.kill()
