"""The hash chain of the audit log: what breaks it, and what verification reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from billing.audit import GENESIS, Broken, Chain, Head, Row, chained
from billing.ids import new_id

NOW = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
TENANT = new_id()


def log(length: int, *, subject: str = "acme") -> list[Row]:
    """An intact log."""
    rows: list[Row] = []
    for sequence in range(1, length + 1):
        row = Row(
            TENANT, sequence, NOW, "test.done", "system", None, subject, None, {"n": 1}, None, None, b""
        )
        rows.append(replace(row, hash=chained(rows[-1].hash if rows else GENESIS, row.content())))
    return rows


def head_of(rows: list[Row]) -> Head:
    return Head(rows[-1].sequence, rows[-1].hash)


def verify(rows: list[Row], *heads: Head) -> Head:
    chain = Chain(heads)
    for row in rows:
        chain.add(row)
    chain.finish()
    return chain.end


LOG = log(5)
HEAD = head_of(LOG)


def test_an_intact_log_ends_at_its_head() -> None:
    assert verify(LOG, HEAD) == HEAD
    assert verify(LOG, HEAD, Head(2, LOG[1].hash)) == HEAD


Change = Callable[[list[Row]], list[Row]]
TAMPERINGS: list[tuple[Change, str]] = [
    (lambda rows: rows[1:], "Row 1 is missing"),
    (lambda rows: [*rows[:2], *rows[3:]], "Row 3 is missing"),
    (lambda rows: rows[:3], "Row 4 is missing: the log was cut off, it went on to row 5"),
    (lambda rows: [], "Row 1 is missing: the log was cut off"),
    (lambda rows: [*rows[:2], replace(rows[2], reason="another"), *rows[3:]], "Row 3 is not what was"),
    (
        lambda rows: [
            *rows[:2],
            replace(rows[3], sequence=3),
            replace(rows[2], sequence=4),
            rows[4],
        ],
        "Row 3 is not what was",
    ),
    (lambda rows: [*rows[:2], replace(rows[0], sequence=3), *rows[2:]], "Row 3 is not what was"),
    (lambda rows: [replace(rows[0], sequence=0), *rows], "Row 0 was inserted"),
    (lambda rows: log(5, subject="globex"), "Row 5 has another hash than was noted"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERINGS, ids=[message for _, message in TAMPERINGS])
def test_the_first_wrong_row_is_named(change: Change, message: str) -> None:
    with pytest.raises(Broken, match=message):
        verify(change(LOG), HEAD)


def test_a_rewritten_log_does_not_match_the_noted_head() -> None:
    rewritten = log(9, subject="globex")
    with pytest.raises(Broken, match="Row 5 has another hash"):
        verify(rewritten, head_of(rewritten), HEAD)
    with pytest.raises(Broken, match="cut off, it went on to row 5"):
        verify(LOG[:3], head_of(LOG[:3]), HEAD)


def test_a_head_survives_formatting_and_parsing() -> None:
    assert Head.parse(str(HEAD)) == HEAD
    for text in ("", "5", f"x:{'0' * 64}", f"5:{'0' * 63}", f"5:{'g' * 64}", f"-1:{'0' * 64}"):
        assert Head.parse(text) is None


def test_the_time_zone_does_not_change_a_row() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5)))
    assert replace(LOG[0], at=elsewhere).line() == LOG[0].line()
