"""URLs of databases, as operators write them."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from billing.settings import Settings, new_secrets
from billing.storage.database import open_database

SECRETS = new_secrets()


def libpq(url: str) -> dict[str, str]:
    """The arguments that libpq receives for a DATABASE_URL."""
    settings = Settings.load({"DATABASE_URL": url, **SECRETS}, dotenv=None)
    _, arguments = PGDialect_psycopg2().create_connect_args(make_url(open_database(settings).app_url))
    return arguments


WRITES = {"target_session_attrs": "read-write"}
ADA = {"user": "me", "password": "a,b", "dbname": "billing"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:a,b@one:5433/billing", {**ADA, "host": "one", "port": 5433}),
        ("postgresql://me:a,b@one,two/billing", {**ADA, **WRITES, "host": "one,two", "port": ","}),
        ("postgres://me:a%2Cb@one:1,two:2/billing", {**ADA, **WRITES, "host": "one,two", "port": "1,2"}),
        (
            "postgresql://one:1,two:2/billing?connect_timeout=1",
            {"dbname": "billing", **WRITES, "connect_timeout": "1", "host": "one,two", "port": "1,2"},
        ),
        (
            "postgresql://one:1,two:2/billing?target_session_attrs=prefer-standby",
            {"dbname": "billing", "target_session_attrs": "prefer-standby", "host": "one,two", "port": "1,2"},
        ),
    ],
)
def test_libpq_receives_every_host(url: str, expected: dict[str, str]) -> None:
    """Of several hosts the one that accepts writes is chosen, unless the URL says otherwise."""
    assert libpq(url) == expected


def test_several_replica_hosts_require_a_standby() -> None:
    given = {
        "DATABASE_URL": "postgresql://one/billing",
        "DATABASE_REPLICA_URL": "postgresql://two,three/billing",
    }
    opened = open_database(Settings.load({**given, **SECRETS}, dotenv=None))
    assert opened.replica_url
    assert make_url(opened.replica_url).query["target_session_attrs"] == "standby"
    assert "target_session_attrs" not in make_url(opened.app_url).query
