"""The chain of the audit log: what breaks it, and what the one who verifies it is told."""

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
    """A log that is whole."""
    rows: list[Row] = []
    for sequence in range(1, length + 1):
        row = Row(
            TENANT, sequence, NOW, "test.done", "system", None, subject, None, {"n": 1}, None, None, b""
        )
        rows.append(replace(row, hash=chained(rows[-1].hash if rows else GENESIS, row.content())))
    return rows


def head_of(rows: list[Row]) -> Head:
    return Head(rows[-1].sequence, rows[-1].hash)


def follow(rows: list[Row], *heads: Head) -> Head:
    chain = Chain(heads)
    for row in rows:
        chain.add(row)
    chain.finish()
    return chain.end


LOG = log(5)
HEAD = head_of(LOG)


def test_a_whole_log_ends_at_its_head() -> None:
    assert follow(LOG, HEAD) == HEAD
    assert follow(LOG, HEAD, Head(2, LOG[1].hash)) == HEAD


Change = Callable[[list[Row]], list[Row]]
CHANGES: list[tuple[Change, str]] = [
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


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_the_first_row_that_is_wrong_is_named(change: Change, said: str) -> None:
    with pytest.raises(Broken, match=said):
        follow(change(LOG), HEAD)


def test_a_log_made_anew_is_not_the_one_that_was_noted() -> None:
    anew = log(9, subject="globex")
    with pytest.raises(Broken, match="Row 5 has another hash"):
        follow(anew, head_of(anew), HEAD)
    with pytest.raises(Broken, match="cut off, it went on to row 5"):
        follow(LOG[:3], head_of(LOG[:3]), HEAD)


def test_a_head_is_written_and_read() -> None:
    assert Head.parse(str(HEAD)) == HEAD
    for text in ("", "5", f"x:{'0' * 64}", f"5:{'0' * 63}", f"5:{'g' * 64}", f"-1:{'0' * 64}"):
        assert Head.parse(text) is None


def test_a_time_says_the_same_in_whichever_zone_it_is_read() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5)))
    assert replace(LOG[0], at=elsewhere).line() == LOG[0].line()
