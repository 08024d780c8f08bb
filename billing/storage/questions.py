"""The two questions that every request has: whose is this key, and whom does this token name?"""

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

# Who asked just now is likely to ask again.
KNOWN_IDS = 4096

Row = Sequence[Any]
# What becomes of what JSON has for a column of this type; None where it is the same here.
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

    Ids and times are sent as texts, and an answer is one array of JSON: psycopg2 takes longer over an object of ours,
    and over each column of each answer, than over all that in one piece.
    """

    name: str
    parameters: Mapping[str, str]
    scope: str
    columns: Sequence[ColumnElement[Any]]
    source: str

    def prepared(self) -> list[str]:
        """What a connection is told once."""
        types = ", ".join(self.parameters.values())
        places = {name: f"${n}" for n, name in enumerate(self.parameters, 1)}
        return [
            f"PREPARE {name} ({types}) AS {text.format(**places)}"
            for name, text in self._statements().items()
        ]

    def message(self, *, prepared: bool) -> str:
        """What is sent each time, with psycopg2's placeholders."""
        places = {name: f"%({name})s" for name in self.parameters}
        if prepared:
            return "; ".join(f"EXECUTE {name} ({', '.join(places.values())})" for name in self._statements())
        cast = {name: f"{place}::{self.parameters[name]}" for name, place in places.items()}
        return "; ".join(text.format(**cast) for text in self._statements().values())

    def read(self, answer: str) -> Row:
        """The columns, and the position."""
        row: list[Any] = orjson.loads(answer)
        for place, reader in self._readers:
            if row[place] is not None:
                row[place] = reader(row[place])
        return row

    def _statements(self) -> dict[str, str]:
        """By names that other texts do not have: behind a pooler, those of another release may still be prepared."""
        query = f"SELECT json_build_array({listed(self.columns)}, {POSITION})::text {self.source}"
        return {
            f"{self.name}_{part}_{hashlib.sha256(text.encode()).hexdigest()[:16]}": text
            for part, text in {"scope": self.scope, "row": query}.items()
        }

    @cached_property
    def _readers(self) -> Sequence[tuple[int, Callable[[str], Any]]]:
        readers = enumerate(READERS[type(column.type)] for column in self.columns)
        return [(place, reader) for place, reader in readers if reader]


# How far the log has come, where a replica is to be compared with it. Of what is inserted, not of what is flushed: a
# commit may be acknowledged before that.
POSITION = "CASE WHEN {positioned} THEN pg_current_wal_insert_lsn()::text END"
FIND_KEY = Question(
    "find_key",
    {"names": "text", "positioned": "boolean"},
    "SELECT set_config('app.tenant_id', tenant_id::text, true) "
    "FROM app.find('api_key', string_to_array({names}, ','))",
    (*tenants.COLUMNS, *api_keys.COLUMNS),
    # By its id, whatever the plan: by digest a plan for any number of names reads all keys that the tenant ever had.
    f"{FROM_TENANT} JOIN api_keys ON api_keys.tenant_id = tenants.id "
    "WHERE api_keys.id = (SELECT id FROM app.find('api_key', string_to_array({names}, ',')))",
)
FIND_USER = Question(
    "find_user",
    {
        "tenant_id": "uuid",
        "user_id": "uuid",
        "session_id": "uuid",
        "token_version": "numeric",  # A token may say any number.
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
