"""Tenants beside the one that fuzzes. It knows and sends their data, except tokens and passwords, and gets nothing.

Schemathesis has a check of its own, `object_level_authorization`. It repeats, as a peer, reads of an object that a
path or a query names. No operation here names its object so: the caller is the tenant. Hence this one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests
from sqlalchemy import Engine, create_engine, select

from billing.storage.tables import deliveries, metadata
from sandbox.stripe import Sandbox
from tests.receivers import Receiver

Json = dict[str, Any]

BASE = "/api/v1/auth/tenants"
# Members that authenticate the neighbour, and so are not told.
PROOFS = {"access", "refresh", "password"}
TELLING_LENGTH = 8
TIME = re.compile(r"\d{4}-\d\d-\d\dT")
# Tables that others may change: a state brought back by another browser is refused, and that is in the tenant's log.
TOLD_OF_OTHERS = {"audit_log", "audit_heads"}
PATIENCE_SECONDS = 20
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Neighbour:
    """A tenant that another one must not reach.

    `mark` is in its names and URLs, which no other tenant may see. `known` has the ids, keys, states and emails that
    the fuzzing tenant knows, by the name of their member.
    """

    id: str
    mark: str
    known: dict[str, list[str]]


def write(neighbours: list[Neighbour], path: Path) -> None:
    path.write_text(json.dumps([asdict(one) for one in neighbours]), encoding="utf-8")


def read(path: Path) -> list[Neighbour]:
    return [Neighbour(**one) for one in json.loads(path.read_bytes())]


# Before, and after -------------------------------------------------------------------------------


class Neighbourhood:
    """Two tenants: one connected to Stripe, one about to connect from its browser. Their rows are watched."""

    def __init__(self, url: str, superuser_url: str, stripe: Sandbox, receiver: Receiver) -> None:
        self._engine = create_engine(superuser_url)
        self._receiver = receiver
        callers = [_Caller(url, receiver) for _ in range(2)]
        callers[0].connect(stripe)
        callers[1].begin_to_connect()
        answers = [caller.answers() for caller in callers]
        self.neighbours = [
            Neighbour(caller.id, caller.mark, _own_texts(mine, but=others, mark=caller.mark))
            for caller, mine, others in zip(callers, answers, reversed(answers), strict=True)
        ]
        self._await_calm()
        self._before = self._seen()

    def complaints(self) -> list[str]:
        """The changes to their rows since, and new webhooks to them."""
        after = self._seen()
        self._engine.dispose()
        return [f"changed at a neighbour: {what}" for what in after if after[what] != self._before[what]]

    def _seen(self) -> dict[str, list[str]]:
        """Every row of the neighbours, and every webhook to them."""
        ids = [one.id for one in self.neighbours]
        marks = [one.mark for one in self.neighbours]
        came = [one.path for one in self._receiver.received if any(mark in one.path for mark in marks)]
        return {**_rows(self._engine, ids), "webhooks received": came}

    def _await_calm(self) -> None:
        """Wait until the worker has sent all their webhooks."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        ids = [one.id for one in self.neighbours]
        pending = select(deliveries.c.id).where(
            deliveries.c.tenant_id.in_(ids), deliveries.c.status == "pending"
        )
        while time.monotonic() < deadline:
            with self._engine.connect() as connection:
                if connection.execute(pending).first() is None:
                    return
            time.sleep(SECONDS_BETWEEN_LOOKS)
        raise AssertionError("the worker has not delivered the neighbours' webhooks")


def _rows(engine: Engine, ids: list[str]) -> dict[str, list[str]]:
    with engine.connect() as connection:
        return {
            table.name: sorted(
                str(row)
                for row in connection.execute(
                    table.select().where(
                        (table.c.tenant_id if "tenant_id" in table.c else table.c.id).in_(ids)
                    )
                )
            )
            for table in metadata.sorted_tables
            if table.name not in TOLD_OF_OTHERS and {"tenant_id", "id"} & {*table.c.keys()}
        }


class _Caller:
    """The owner of a neighbour, who uses the API to make something of every kind."""

    def __init__(self, url: str, receiver: Receiver) -> None:
        self.mark = uuid4().hex
        self._base = f"{url}{BASE}"
        self._session = requests.Session()
        self._session.trust_env = False
        self._answers: list[Any] = []
        registered = self._post("register", self._registration(receiver))
        self.id: str = registered["tenant"]["id"]
        self._session.headers["Authorization"] = f"Bearer {registered['tokens']['access']}"
        self._regenerate()

    def _registration(self, receiver: Receiver) -> Json:
        names = {"first_name": f"First {self.mark}", "last_name": f"Last {self.mark}"}
        return names | {
            "company_name": f"Company {self.mark}",
            "domain": f"{self.mark}.example",
            "email": f"{uuid4().hex}@neighbour.example",
            "password": str(uuid4()),
            "webhook_url": f"http://localhost:{receiver.port}/{self.mark}",
        }

    def _regenerate(self) -> None:
        body = {"key_type": "all", "confirm": True, "grace_period_seconds": 3600}
        self._post("api-keys/regenerate", body)

    def connect(self, stripe: Sandbox) -> None:
        started = self._post("stripe/connect", {"flow": "oauth"})
        requests.get(stripe.approve(started["url"]), timeout=10).raise_for_status()

    def begin_to_connect(self) -> None:
        """Start connecting as a page of the API's own origin would, which binds the state to this browser."""
        self._post("stripe/connect", {"flow": "oauth"}, {"Sec-Fetch-Site": "same-origin"})

    def answers(self) -> list[Any]:
        """All answers of the API to this tenant so far."""
        for path in ("me", "details", "api-keys", "stripe/status", "webhooks/config"):
            self._noted(self._session.get(f"{self._base}/{path}/", timeout=10))
        return self._answers

    def _post(self, path: str, body: Json, headers: Mapping[str, str] | None = None) -> Json:
        # Another tenant may send the same key to an operation that takes one, and must not get our answer.
        key = {"Idempotency-Key": str(uuid4())}
        self._answers.append(key)
        sent = {**key, **(headers or {})}
        return self._noted(self._session.post(f"{self._base}/{path}/", json=body, headers=sent, timeout=10))

    def _noted(self, answer: requests.Response) -> Json:
        answer.raise_for_status()
        body: Json = answer.json()
        self._answers.append(body)
        return body


def _own_texts(mine: list[Any], *, but: list[Any], mark: str) -> dict[str, list[str]]:
    """The texts that only this tenant was answered, by the name of their member."""
    known = {text for _, text in _texts(but)}
    found: dict[str, set[str]] = {}
    for name, text in _texts(mine):
        if text not in known and name not in PROOFS and mark not in text and not _is_common(text):
            found.setdefault(name, set()).add(text)
    return {name: sorted(texts) for name, texts in found.items()}


def _is_common(text: str) -> bool:
    """Whether others may be answered the same: words, sentences, times. An identifier has a digit in it."""
    return len(text) < TELLING_LENGTH or " " in text or not re.search(r"\d", text) or bool(TIME.match(text))


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Each text in a JSON value, with the name of its member."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, dict):
        for member, item in value.items():
            yield from _texts(item, member)


# While they are being fuzzed ---------------------------------------------------------------------


def seen_in(answer: str, neighbours: list[Neighbour], *, own: str, lent: set[str]) -> list[str]:
    """The neighbours' data in an answer that must not be there.

    A mark never may. What the caller was told may, if it is in the request itself (`own`), or in an earlier one
    that the API accepted (`lent`).
    """
    found = [one.mark for one in neighbours if one.mark in answer]
    return found + [
        text for text in all_known(neighbours) if text in answer and text not in own and text not in lent
    ]


def all_known(neighbours: list[Neighbour]) -> list[str]:
    return [text for one in neighbours for texts in one.known.values() for text in texts]
