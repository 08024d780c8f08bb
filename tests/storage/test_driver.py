"""Our own connections: which of several hosts they are made to, and what of the URL's parameters counts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import make_url

from billing.encryption import Vault
from billing.settings import Settings
from billing.storage import async_pool, driver
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


# Parameters of the URL ---------------------------------------------------------------------------

OURS = {"statement_timeout": "5s", "lock_timeout": "2s", "TimeZone": "UTC"}
PARAMETERS = {
    "options": "-c search_path=elsewhere,public -c statement_timeout=0 -c lock_timeout=0 -c timezone=Asia/Tokyo",
    "connect_timeout": "9",
    "tcp_user_timeout": "0",
    "keepalives": "0",
    "keepalives_idle": "0",
    "application_name": "mine",
}


@pytest.fixture
def with_parameters(test_database: TestDatabase) -> str:
    return make_url(test_database.app_url).update_query_dict(PARAMETERS).render_as_string(hide_password=False)


def of_pool(url: str, settings: Settings) -> dict[str, Any]:
    """What holds on a connection of the store's."""
    with closing(Store(Vault(settings.encryption_keys), connections=1)) as store:
        store.open(url)
        with store._connect() as connection:
            return in_force(driver.driver_of(connection), lambda: None)


def of_lookups(url: str, _: Settings) -> dict[str, Any]:
    """What holds on a connection of the look-ups'."""
    opened, _ = async_pool.connect(url)
    with closing(opened):
        return in_force(opened, lambda: async_pool.wait_until_ready(opened, monotonic() + 5))


def in_force(connection: Any, wait: Callable[[], None]) -> dict[str, Any]:
    """The settings of PostgreSQL's and libpq's that the test names."""
    found = dict(connection.info.dsn_parameters)
    cursor = connection.cursor()
    for name in (*OURS, "search_path", "application_name"):
        cursor.execute(f"SHOW {name}")
        wait()
        found[name] = cursor.fetchone()[0]
    return found


@pytest.mark.parametrize("settings_of", [of_pool, of_lookups])
def test_our_limits_win_over_the_parameters_of_the_url(
    with_parameters: str, settings: Settings, settings_of: Callable[[str, Settings], dict[str, Any]]
) -> None:
    found = settings_of(with_parameters, settings)
    limits = {name: str(value) for name, value in driver.CONNECT_ARGS.items()}
    assert found.items() >= (OURS | limits).items()
    assert (found["search_path"], found["application_name"]) == ("elsewhere,public", "mine")


@pytest.mark.parametrize("settings_of", [of_pool, of_lookups])
def test_connections_have_our_name_unless_the_url_gives_another(
    test_database: TestDatabase,
    settings: Settings,
    settings_of: Callable[[str, Settings], dict[str, Any]],
) -> None:
    found = settings_of(test_database.app_url, settings)
    assert found["application_name"] == "billing"
    assert found.items() >= OURS.items()
