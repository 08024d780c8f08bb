"""Runs Schemathesis as every caller, and beside other tenants, in a time that the runs share.

Each run begins with the few cases that `make test` has, of all phases and always the same, and goes on with new ones,
random and along links, until its time is up. `python -m contract.fuzz --minutes 15` reports what each tried, with the
seed that repeats it, and at the end how much of the document was exercised.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from billing.http.document import Operation, load, operations
from billing.storage import database, embedded
from contract import exercised, neighbours
from contract.callers import CALLERS
from contract.exercised import Ledger
from contract.mutations import VOLATILE, fresh_state
from contract.neighbours import Neighbourhood
from contract.programs import ROOT
from sandbox.stripe import Sandbox
from tests import live
from tests.receivers import Receiver, answers, receiving

Json = dict[str, Any]

MINUTES = 15
MINUTES_IN_CONTRACT = 4
# With less it is not worth starting.
LEAST_SECONDS = 5
DELIVERED_WITHIN_SECONDS = 60
# What the start, the last case and the report may take beyond the time box, on a busy machine.
GRACE_SECONDS = 120
EXAMPLES = 10
SHOWN = 12_000
# Schemathesis's warning that most valid data were refused. `positive_data_acceptance` judges each refusal by itself.
CHANCE = "validation_mismatch"
STRIPE = "Stripe Connect"
TEST = "webhook.test"
NEEDS_NO_STRIPE = {"get_stripe_status", "disconnect_stripe"}
OPERATIONS = operations(load())


# What is run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of `st`: as which caller, with which share of the time, and in which setting."""

    name: str
    caller: str
    share: int
    has_neighbours: bool = False
    has_stripe: bool = True

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(o for o in OPERATIONS if self.has_stripe or STRIPE in o.tags)

    def may_call(self, operation: Operation) -> bool:
        return not operation.schemes or CALLERS[self.caller].scheme in operation.schemes


RUNS = (
    Run("owner", "owner", 4),
    Run("secret key", "secret_key", 2),
    Run("publishable key", "publishable_key", 2),
    Run("nobody", "nobody", 2),
    Run("owner beside other tenants", "owner", 4, has_neighbours=True),
    Run("owner, without Stripe", "owner", 1, has_stripe=False),
)


@dataclass(frozen=True)
class Effort:
    """How much is tried: the few cases that are always the same, or new ones for `seconds`."""

    seconds: float | None = None
    seed: int = 0

    @property
    def options(self) -> list[str]:
        if self.seconds is None:
            return ["--generation-deterministic", "--max-examples", str(EXAMPLES)]
        return [
            "--phases",
            "fuzzing,stateful",
            "--max-time",
            str(int(self.seconds)),
            "--seed",
            str(self.seed),
        ]

    @property
    def description(self) -> str:
        return "always the same" if self.seconds is None else f"seed {self.seed}"

    @property
    def patience_seconds(self) -> float:
        return GRACE_SECONDS + (GRACE_SECONDS if self.seconds is None else self.seconds)


FEW = Effort()


@dataclass(frozen=True)
class Outcome:
    """The result of a run: its output, Schemathesis's report, what it exercised, and what is wrong."""

    run: Run
    output: str
    report: Json
    ledger: Ledger
    complaints: list[str]

    @property
    def cases(self) -> int:
        return int(self.report.get("test_cases", {}).get("generated", 0))

    @property
    def summary(self) -> str:
        called = len({name.split()[0] for name in self.ledger.names})
        return f"{self.cases} cases of {called} operations in {self.report.get('running_time', 0):.0f} s"


def fuzz(run: Run, server: Server, effort: Effort) -> Outcome:
    """Run `st` against a server; what it finds, and what it failed to reach, are complaints."""
    with ExitStack() as stack:
        directory = stack.enter_context(fresh_state())
        receiver = stack.enter_context(receiving(answers(204)))
        beside = (
            Neighbourhood(server.url, server.superuser_url, server.stripe, receiver)
            if run.has_neighbours
            else None
        )
        neighbours.write(beside.neighbours if beside else [], directory / "neighbours")
        done = _ran(run, server.url, receiver, directory, effort)
        output = done.stdout + done.stderr
        if not all((directory / name).exists() for name in ("report", "ledger")):
            return Outcome(run, output, {}, Ledger(), ["Schemathesis did not finish"])
        report = json.loads((directory / "report").read_bytes())
        complaints = [f"Schemathesis ended with {done.returncode}"] if done.returncode else []
        # A timed run may end before it has reached everything.
        complaints += [*missed(run, report), *_of_webhooks(run, receiver)] if effort is FEW else []
        complaints += beside.complaints() if beside else []
        return Outcome(run, output, report, Ledger.read(directory / "ledger"), complaints)


def _ran(
    run: Run, url: str, receiver: Receiver, directory: Path, effort: Effort
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--report", "json", "--report-json-path", str(directory / "report"), *effort.options]
    command += [] if run.has_stripe else ["--include-tag", STRIPE]
    choices = {
        "URL": url,
        "AS": run.caller,
        "STRIPE": "sandbox" if run.has_stripe else "none",
        # `localhost` is the only local name that development allows.
        "RECEIVER": f"http://localhost:{receiver.port}/in",
        "NEIGHBOURS": str(directory / "neighbours"),
        "LEDGER": str(directory / "ledger"),
    }
    # The hooks are imported from the checkout.
    environ = {"PYTHONPATH": str(ROOT), **{f"BILLING_FUZZ_{name}": value for name, value in choices.items()}}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=effort.patience_seconds,
        check=False,
    )


# What a run must reach ---------------------------------------------------------------------------


def missed(run: Run, report: Json) -> Iterator[str]:
    """What a run should have reached and did not, or got nothing accepted by."""
    if unfinished := [name for name, phase in report["phases"].items() if phase["status"] != "success"]:
        yield f"phases without success: {', '.join(unfinished)}"
    if report["operations"]["tested"] != len(run.operations):
        yield f"{report['operations']['tested']} operations tested, not {len(run.operations)}"
    # Some valid data must be accepted: a server that refused everything would look as clean.
    if refused := _must_accept(run) - _accepted(report):
        yield f"nothing valid was accepted: {', '.join(sorted(refused))}"
    warnings = {
        name: sorted(places) for name, places in report["warnings"].items() if places and name != CHANCE
    }
    if warnings != _closed_to(run):
        yield f"warnings: {warnings}"


def _must_accept(run: Run) -> set[str]:
    """The operations that must accept something of the caller's. Without Stripe no connection can be started."""
    return _labels(
        o for o in run.operations if run.may_call(o) and (run.has_stripe or o.operation_id in NEEDS_NO_STRIPE)
    )


def _accepted(report: Json) -> set[str]:
    """The operations that answered 2xx to something valid, as `METHOD /path/`."""
    return {
        label
        for label, phases in report["valid_rates"].items()
        if any(phase["accepted"] for phase in phases.values())
    }


def _closed_to(run: Run) -> dict[str, list[str]]:
    """The warnings that must be there: 401 to everything, for the operations that the caller may not call."""
    closed = sorted(_labels(o for o in run.operations if not run.may_call(o)))
    return {"missing_auth": closed} if closed else {}


def _labels(listed: Iterator[Operation]) -> set[str]:
    return {f"{operation.method} {operation.path}" for operation in listed}


def _of_webhooks(run: Run, receiver: Receiver) -> Iterator[str]:
    """Events must be delivered to any caller's URL, as anybody may register; test events only to an owner's."""
    if not run.has_stripe:
        return
    # On a busy machine the worker may not have delivered its first event yet.
    deadline = time.monotonic() + DELIVERED_WITHIN_SECONDS
    while not (events := [kind for kind in _kinds(receiver) if kind != TEST]) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not events:
        yield "no event was delivered"
    tests = _kinds(receiver).count(TEST)
    if (tests > 0) != (run.caller == "owner"):
        yield f"{tests} test events were delivered"


def _kinds(receiver: Receiver) -> list[str]:
    return [json.loads(one.body)["type"] for one in receiver.received if one.path == "/in"]


# Where -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running server, the sandbox that it uses as Stripe, and the superuser's URL of its database."""

    url: str
    stripe: Sandbox
    superuser_url: str


@contextmanager
def serving(
    cluster: embedded.Cluster, name: str, environ: dict[str, str], *, has_stripe: bool, log: Any = None
) -> Iterator[Server]:
    """A server on this database, with a sandbox as Stripe or without Stripe, that may send webhooks to this machine."""
    # Limits would answer most cases with 429.
    own = {
        "DATABASE_URL": database.url(cluster, database.APP, name),
        "RATE_LIMITS": "off",
        "PASSWORD_COST": "4",
    }
    with Sandbox() as stripe:
        of_stripe = stripe.environ if has_stripe else dict.fromkeys(stripe.environ, "")
        with live.serving({**own, **environ, **of_stripe, **live.OPEN_LOOPBACK}, log=log) as url:
            yield Server(url, stripe, cluster.url(name))


@contextmanager
def opened_server(*, has_stripe: bool) -> Iterator[Server]:
    """A server with a PostgreSQL of its own, in memory, gone at the end of the block."""
    with ExitStack() as stack:
        state = stack.enter_context(fresh_state())
        postgres = stack.enter_context(embedded.start(state / "pg", options=VOLATILE))
        database.prepare(postgres.cluster, "billing_fuzz")
        log = stack.enter_context((state / "server.log").open("wb"))
        environ = {"BILLING_STATE_DIR": str(state)}
        opened = serving(postgres.cluster, "billing_fuzz", environ, has_stripe=has_stripe, log=log)
        yield stack.enter_context(opened)


# All of them -------------------------------------------------------------------------------------


def fuzzed(
    runs: Sequence[Run], seconds: float, seed: int, tell: Callable[[str], None]
) -> tuple[list[Outcome], list[str]]:
    """Do the runs within `seconds`, and report each as it ends; returns their outcomes, and what is wrong."""
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    left = list(runs)
    for has_stripe, together in groupby(runs, lambda run: run.has_stripe):
        with opened_server(has_stripe=has_stripe) as server:
            for run in together:
                until = time.monotonic() + share(left, deadline - time.monotonic())
                outcomes += _fuzzed(run, server, until, seed, tell)
                left.remove(run)
    return outcomes, [f"{one.run.name}: {what}" for one in outcomes for what in one.complaints]


def _fuzzed(
    run: Run, server: Server, until: float, seed: int, tell: Callable[[str], None]
) -> Iterator[Outcome]:
    """The few fixed cases first, then new ones until the time is up."""
    few = fuzz(run, server, FEW)
    tell(_report(few, FEW))
    yield few
    left = until - time.monotonic()
    if left >= LEAST_SECONDS:
        effort = Effort(left, seed)
        more = fuzz(run, server, effort)
        tell(_report(more, effort))
        yield more


def share(runs: Sequence[Run], seconds: float) -> float:
    """How many of the remaining seconds the first of the remaining runs may take."""
    return max(0, seconds * runs[0].share / sum(run.share for run in runs))


def _report(outcome: Outcome, effort: Effort) -> str:
    verdict = "FAIL" if outcome.complaints else "PASS"
    line = f"{verdict}  {outcome.run.name:<28} {outcome.summary}, {effort.description}"
    if not outcome.complaints:
        return line
    # With a minute more for the few cases, which come first.
    minutes = 0 if effort.seconds is None else effort.seconds / 60 + 1
    again = f'Again: make fuzz ONLY="{outcome.run.name}" SEED={effort.seed} MINUTES={minutes:.1f}'
    return "\n".join([outcome.output[-SHOWN:], *outcome.complaints, again, line])


def summary(outcomes: Sequence[Outcome]) -> tuple[Ledger, str]:
    """The ledger of all runs together, and a line that counts cases, operations and statuses."""
    whole = Ledger()
    for outcome in outcomes:
        whole.add(outcome.ledger)
    called = len({name.split()[0] for name in whole.names})
    statuses = ", ".join(f"{status}: {times}" for status, times in sorted(whole.statuses.items()))
    cases = sum(outcome.cases for outcome in outcomes)
    runs = len({outcome.run for outcome in outcomes})
    return whole, f"{cases} cases by {runs} runs, {called} operations, statuses {statuses}"


def check() -> str:
    """Do all runs, and report what was tried and exercised; raises `AssertionError` with what was found."""
    lines: list[str] = []
    outcomes, complaints = fuzzed(RUNS, MINUTES_IN_CONTRACT * 60, secrets.randbits(32), lines.append)
    ledger, line = summary(outcomes)
    account = exercised.account_of(ledger)
    assert not complaints and not account.complaints, "\n".join([*lines, *complaints, *account.lines()])
    return "\n".join([line, *account.lines()])


def main(arguments: Sequence[str]) -> int:
    """Return 1 if anything was found, or if a gap has no reason."""
    parser = argparse.ArgumentParser("python -m contract.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all runs together")
    parser.add_argument("--seed", type=int, help="what a finding was printed with, to repeat it")
    parser.add_argument("--only", metavar="NAME", help="the one run of this name")
    options = parser.parse_args(arguments)
    runs = [run for run in RUNS if options.only in (None, run.name)]
    if not runs:
        parser.error(f"there are the runs {', '.join(run.name for run in RUNS)}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    outcomes, complaints = fuzzed(runs, options.minutes * 60, seed, lambda line: print(line, flush=True))
    ledger, line = summary(outcomes)
    account = exercised.account_of(ledger)
    print("\n".join([line, *account.lines()]) if len(runs) == len(RUNS) else line)
    return 1 if complaints or (len(runs) == len(RUNS) and account.complaints) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
