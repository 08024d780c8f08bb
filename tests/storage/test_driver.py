"""Our own connections: which of several hosts they are made to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from sqlalchemy import make_url

from billing.encryption import Vault
from billing.settings import Settings
from billing.storage import driver
from billing.storage.store import Store
from tests.conftest import TestDatabase


@contextmanager
def hanging_up() -> Iterator[int]:
    """A port that accepts every connection and closes it, as a proxy does whose server is gone."""

    def answer() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_host_that_closes_the_connection_is_skipped(
    test_database: TestDatabase, settings: Settings
) -> None:
    well = make_url(test_database.app_url)
    with hanging_up() as port, closing(Store(Vault(settings.encryption_keys), connections=1)) as store:
        hosts = (f"127.0.0.1:{port}", f"{well.query['host']}:{well.query['port']}")
        query = {"host": hosts, "target_session_attrs": "read-write"}
        store.open(well.set(query=query).render_as_string(hide_password=False))
        store.require_ready()


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ({"user": "me"}, [{"user": "me"}]),
        ({"host": "one", "port": 1}, [{"host": "one", "port": 1}]),
        ({"host": "one,two", "port": "1,2"}, [{"host": "one", "port": "1"}, {"host": "two", "port": "2"}]),
        ({"host": "one,two", "port": ","}, [{"host": "one", "port": ""}, {"host": "two", "port": ""}]),
        ({"host": "one,two", "hostaddr": "::1,::2"}, [{"host": "one,two", "hostaddr": "::1,::2"}]),
        ({"host": "one,two", "port": "7"}, [{"host": "one", "port": "7"}, {"host": "two", "port": "7"}]),
    ],
)
def test_hosts_are_split_as_libpq_does(arguments: dict[str, object], hosts: list[dict[str, object]]) -> None:
    assert driver.each_host(arguments) == hosts
