"""The watch over the tenants beside the one that fuzzes: it reports leaked data and changed rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from sqlalchemy import create_engine, text

from billing.storage import embedded
from contract.fuzz import Server, serving
from contract.neighbours import Neighbour, Neighbourhood, read, seen_in, write
from tests.conftest import clone
from tests.receivers import Receiver, answers, receiving

ACME = Neighbour("1", "mark-of-acme", {"id": ["id-of-acme-1"], "email": ["ada@acme.example"]})
GLOBEX = Neighbour("2", "mark-of-globex", {"id": ["id-of-globex-2"]})


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("nothing of anybody", []),
        ('{"company_name": "Company mark-of-acme"}', ["mark-of-acme"]),
        ('{"id": "id-of-globex-2"}', ["id-of-globex-2"]),
        ('{"id": "id-of-acme-1"}', []),
        ('{"email": "ada@acme.example"}', []),
    ],
)
def test_an_answer_is_searched_for_neighbours_data(answer: str, found: list[str]) -> None:
    own, lent = '{"first_name": "id-of-acme-1"}', {"ada@acme.example"}
    assert seen_in(answer, [ACME, GLOBEX], own=own, lent=lent) == found


def test_a_mark_is_reported_even_if_the_caller_sent_it() -> None:
    assert seen_in("mark-of-acme", [ACME], own="mark-of-acme", lent={"mark-of-acme"}) == ["mark-of-acme"]


def test_neighbours_can_be_written_and_read(tmp_path: Path) -> None:
    write([ACME, GLOBEX], tmp_path / "neighbours")
    assert read(tmp_path / "neighbours") == [ACME, GLOBEX]


@pytest.fixture
def server(cluster: embedded.Cluster, worker_id: str) -> Iterator[Server]:
    name = f"billing_neighbours_{worker_id}"
    clone(cluster, name)
    with serving(cluster, name, {}, has_stripe=True) as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(answers(204)) as running:
        yield running


@pytest.mark.slow
def test_changes_at_neighbours_are_reported(server: Server, receiver: Receiver) -> None:
    neighbourhood = Neighbourhood(server.url, server.superuser_url, server.stripe, receiver)
    connected, connecting = neighbourhood.neighbours
    assert {"id", "key", "email", "account_id", "state", "Idempotency-Key"} <= connected.known.keys()
    assert "state" in connecting.known
    known = [one for texts in connected.known.values() for one in texts]
    assert not {"not_connected", "whsec", "access", "refresh"} & {*known, *connected.known}
    assert neighbourhood.complaints() == []
    engine = create_engine(server.superuser_url)
    with engine.begin() as connection:
        renamed = text("UPDATE users SET first_name = 'Eve' WHERE tenant_id = :id")
        connection.execute(renamed, {"id": connecting.id})
    engine.dispose()
    requests.post(f"http://localhost:{receiver.port}/{connected.mark}", json={}, timeout=10)
    assert neighbourhood.complaints() == [
        "changed at a neighbour: users",
        "changed at a neighbour: webhooks received",
    ]
