"""One fault and its outcome: measurements while it lasts, checks when all clients are idle."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import psycopg2

from tests.faults.cluster import checks
from tests.faults.cluster.clients import Call
from tests.faults.cluster.faults import Fault
from tests.faults.cluster.programs import eventually
from tests.faults.cluster.scene import Scene

CALM_SECONDS = 3
STEADY_SECONDS = 5
BACK_SECONDS = 90
END_SECONDS = 60
# A killed worker's leases end after 60 s.
DELIVERED_SECONDS = 100
WHOLE_SECONDS = 120


@dataclass
class Outcome:
    """What a fault did to the service; any `problems` are a failure."""

    fault: Fault
    writes: int = 0
    writes_away: float = 0
    reads_away: float = 0
    servers_away: tuple[float, ...] = ()
    slowest: float = 0
    errors: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    sessions_lost: int = 0
    worked_on: int = 0
    duplicates: int = 0
    delivered_after: float = 0
    problems: list[str] = field(default_factory=list)


def run_fault(fault: Fault, scene: Scene) -> Outcome:
    """Inject the fault into the scene while its clients write."""
    outcome = Outcome(fault)
    book, receiver = scene.book, scene.receiver
    first_call, first_wrong = len(book.calls), len(book.wrongs)
    book.clocks_differ, book.worked_on = fault.clocks_differ, 0
    received, replays, lost = checks.duplicates(receiver.received), book.replays, book.sessions_lost
    began = time.monotonic()
    scene.crowd.go()
    time.sleep(CALM_SECONDS)
    _attempt(outcome, lambda: fault.run(scene))
    ended = time.monotonic()
    _attempt(
        outcome,
        lambda: eventually(
            lambda: is_steady(book.calls, since=ended, servers=[api.name for api in scene.apis]),
            "both servers acknowledge writes and reads, without an error",
            seconds=BACK_SECONDS,
        ),
    )
    _measure(outcome, book.calls[first_call:], began, time.monotonic(), [api.name for api in scene.apis])
    _attempt(outcome, lambda: _judge(outcome, scene))
    outcome.worked_on = book.worked_on
    outcome.replays, outcome.sessions_lost = book.replays - replays, book.sessions_lost - lost
    outcome.duplicates = checks.duplicates(receiver.received) - received
    outcome.problems += book.wrongs[first_wrong:]
    if outcome.writes_away > fault.most_seconds:
        outcome.problems.append(f"writes were away for {outcome.writes_away:.1f} s")
    return outcome


def _attempt(outcome: Outcome, do: Callable[[], object]) -> None:
    """A failure is one of the problems, and the others are still looked for."""
    try:
        do()
    except (AssertionError, OSError, psycopg2.Error) as error:
        outcome.problems.append(str(error).strip() or repr(error))


def is_steady(calls: Sequence[Call], *, since: float, servers: Collection[str]) -> bool:
    """For some seconds every server has acknowledged writes and reads, and none has failed."""
    start = time.monotonic() - STEADY_SECONDS
    if start < since:
        return False
    recent = [call for call in calls[-2000:] if call.ended >= start]
    good = {(call.server, call.is_read) for call in recent if call.is_acknowledged}
    return len(good) == 2 * len(servers) and not any(is_error(call) for call in recent)


def is_error(call: Call) -> bool:
    """401 is the right answer to a replaced key, and 429 the limit, which a client waits for."""
    return not call.is_acknowledged and call.outcome not in ("401", "429")


def _measure(
    outcome: Outcome, calls: Sequence[Call], began: float, ended: float, servers: Collection[str]
) -> None:
    good = [call for call in calls if call.is_acknowledged]
    writes = [call.ended for call in good if not call.is_read]
    outcome.writes = len(writes)
    outcome.writes_away = longest_gap(writes, began, ended)
    outcome.reads_away = longest_gap([call.ended for call in good if call.is_read], began, ended)
    outcome.servers_away = tuple(
        longest_gap([call.ended for call in good if call.server == server], began, ended)
        for server in servers
    )
    outcome.slowest = max((call.seconds for call in calls), default=0)
    outcome.errors = Counter(call.outcome for call in calls if is_error(call))


def longest_gap(times: Sequence[float], began: float, ended: float) -> float:
    moments = [began, *sorted(times), ended]
    return max(after - before for before, after in pairwise(moments))


def _judge(outcome: Outcome, scene: Scene) -> None:
    for busy in scene.crowd.pause(seconds=END_SECONDS):
        outcome.problems.append(f"no end of {busy}")
    outcome.delivered_after = eventually(
        lambda: checks.pending(scene.cluster) == 0, "all events are delivered", seconds=DELIVERED_SECONDS
    )
    found = checks.stored(scene.cluster)
    wrong = [
        *checks.storage_problems(scene.book.accounts, found, keyed=scene.keyed),
        *checks.delivery_problems(scene.receiver.received, scene.book.accounts, found),
    ]
    # What an earlier fault broke is not this one's.
    outcome.problems += [problem for problem in wrong if problem not in scene.known]
    scene.known |= set(wrong)
    eventually(scene.cluster.is_whole, "three nodes that replicate synchronously", seconds=WHOLE_SECONDS)
