"""The two questions that authenticate requests: whose is this API key, and whose is this access token?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Boolean, ColumnElement, DateTime, Integer, Text, Uuid

from billing.storage import api_keys, tenants, users
from billing.storage.platform import FROM_TENANT
from billing.storage.shelf import listed

# A caller seen lately is likely to call again, with the same ids.
KNOWN_IDS = 4096

Row = Sequence[Any]
# How to convert the JSON value of a column of this type; None where it needs no conversion.
READERS: Mapping[type, Callable[[str], Any] | None] = {
    Uuid: lru_cache(KNOWN_IDS)(UUID),
    DateTime: datetime.fromisoformat,
    Text: None,
    Integer: None,
    Boolean: None,
}


@dataclass(frozen=True)
class Question:
    """Two statements in one message, and so in one transaction: find the tenant, then read under its row security.

    Ids and times are sent as text, and an answer is one JSON array: psycopg2 takes longer to adapt an object, and to
    convert an answer column by column.
    """

    name: str
    parameters: Mapping[str, str]
    scope: str
    columns: Sequence[ColumnElement[Any]]
    source: str

    def prepared(self) -> list[str]:
        """The PREPARE statements, sent once per connection."""
        types = ", ".join(self.parameters.values())
        places = {name: f"${n}" for n, name in enumerate(self.parameters, 1)}
        return [
            f"PREPARE {name} ({types}) AS {text.format(**places)}"
            for name, text in self._statements().items()
        ]

    def message(self, *, prepared: bool) -> str:
        """The message of one question, with psycopg2's placeholders."""
        places = {name: f"%({name})s" for name in self.parameters}
        if prepared:
            return "; ".join(f"EXECUTE {name} ({', '.join(places.values())})" for name in self._statements())
        cast = {name: f"{place}::{self.parameters[name]}" for name, place in places.items()}
        return "; ".join(text.format(**cast) for text in self._statements().values())

    def read(self, answer: str) -> Row:
        """Convert an answer to the values of the columns, and the position."""
        row: list[Any] = orjson.loads(answer)
        for place, reader in self._readers:
            if row[place] is not None:
                row[place] = reader(row[place])
        return row

    def _statements(self) -> dict[str, str]:
        """The statements, by names unique to their texts: behind a pooler, another release's may still be prepared."""
        query = f"SELECT json_build_array({listed(self.columns)}, {POSITION})::text {self.source}"
        return {
            f"{self.name}_{part}_{hashlib.sha256(text.encode()).hexdigest()[:16]}": text
            for part, text in {"scope": self.scope, "row": query}.items()
        }

    @cached_property
    def _readers(self) -> Sequence[tuple[int, Callable[[str], Any]]]:
        readers = enumerate(READERS[type(column.type)] for column in self.columns)
        return [(place, reader) for place, reader in readers if reader]


# The position of the log, if a replica is to be compared with it: the insert position, not the flush position, as a
# commit may be acknowledged before it is flushed.
POSITION = "CASE WHEN {positioned} THEN pg_current_wal_insert_lsn()::text END"
FIND_KEY = Question(
    "find_key",
    {"names": "text", "positioned": "boolean"},
    "SELECT set_config('app.tenant_id', tenant_id::text, true) "
    "FROM app.find('api_key', string_to_array({names}, ','))",
    (*tenants.COLUMNS, *api_keys.COLUMNS),
    # By id, whatever the plan: by digest, a generic plan would read all keys that the tenant ever had.
    f"{FROM_TENANT} JOIN api_keys ON api_keys.tenant_id = tenants.id "
    "WHERE api_keys.id = (SELECT id FROM app.find('api_key', string_to_array({names}, ',')))",
)
FIND_USER = Question(
    "find_user",
    {
        "tenant_id": "uuid",
        "user_id": "uuid",
        "session_id": "uuid",
        "token_version": "numeric",  # A token may hold any number.
        "now": "timestamptz",
        "positioned": "boolean",
    },
    "SELECT set_config('app.tenant_id', ({tenant_id})::text, true)",
    (*tenants.COLUMNS, *users.COLUMNS),
    f"{FROM_TENANT} JOIN users ON users.tenant_id = tenants.id "
    "JOIN sessions ON sessions.tenant_id = users.tenant_id AND sessions.user_id = users.id "
    "WHERE tenants.id = {tenant_id} AND users.id = {user_id} AND users.token_version = {token_version} "
    "AND users.is_active AND sessions.id = {session_id} AND sessions.ended_at IS NULL "
    "AND sessions.expires_at > {now}",
)
QUESTIONS = (FIND_KEY, FIND_USER)
MESSAGES = {(q.name, prepared): q.message(prepared=prepared) for q in QUESTIONS for prepared in (True, False)}
