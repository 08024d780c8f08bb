"""One sandbox for all tests, reset after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from stripe import StripeClient

from sandbox.stripe import Sandbox
from tests.sandbox.platform import client_of


@pytest.fixture(scope="session")
def running_sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Iterator[Sandbox]:
    yield running_sandbox
    running_sandbox.reset()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def client(sandbox: Sandbox, session: requests.Session) -> StripeClient:
    return client_of(sandbox, session)
