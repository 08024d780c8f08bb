"""The plan: every server in turn within a round, round after round, so that a busy moment hits them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

from benchmarks.installation import Installation
from benchmarks.requests.cases import CASES, Case, Request
from benchmarks.requests.load import Window, WrongAnswer, measure, require_right
from benchmarks.requests.population import Population
from benchmarks.requests.servers import OURS, Server

# The next run may contradict the results of fewer rounds.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    servers: Sequence[str]
    cases: Sequence[str]
    clients: Sequence[int]
    rounds: int
    seconds: int

    @property
    def seconds_in_all(self) -> int:
        """About how long it takes; a window has a second of warming up, and a little around it."""
        windows = len(self.servers) * len(self.cases) * len(self.clients) * self.rounds
        return round(windows * (self.seconds + 1.3))


@dataclass(frozen=True)
class Spread:
    """Figures of several rounds: least, median, most."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(min(figures), statistics.median(figures), max(figures))


@dataclass
class Results:
    """The windows, by case, clients and server; the nth of each is from the nth round."""

    plan: Plan
    windows: dict[tuple[str, int, str], list[Window]] = field(default_factory=dict)

    def add(self, case: str, clients: int, server: str, window: Window) -> None:
        self.windows.setdefault((case, clients, server), []).append(window)

    def spread(self, case: str, clients: int, server: str, figure: Callable[[Window], float]) -> Spread:
        return Spread.of([figure(window) for window in self.windows[case, clients, server]])

    def ratio(self, case: str, clients: int, peer: str) -> Spread:
        """Our CPU per request divided by the peer's, round by round; raises `ValueError` for too few rounds."""
        if self.plan.rounds < FEWEST_ROUNDS:
            raise ValueError(f"A ratio wants {FEWEST_ROUNDS} rounds.")
        pairs = zip(self.windows[case, clients, OURS], self.windows[case, clients, peer], strict=True)
        return Spread.of([our.server_micros / their.server_micros for our, their in pairs])


def run(
    installation: Installation,
    population: Population,
    servers: Sequence[Server],
    plan: Plan,
    progress: Callable[[str], None],
) -> Results:
    """Measure all of the plan; raises `WrongAnswer` when a server does not answer as it should."""
    results = Results(plan)
    require_alike(population, servers, plan)
    for number in range(1, plan.rounds + 1):
        progress(f"round {number} of {plan.rounds}")
        for name, clients in product(plan.cases, plan.clients):
            for server in servers:
                requests = requests_for(server, CASES[name], population)
                window = measure(
                    installation, server, CASES[name], requests, clients=clients, seconds=plan.seconds
                )
                results.add(name, clients, server.name, window)
    return results


def requests_for(server: Server, case: Case, population: Population) -> list[Request]:
    """The requests of a case, with new tokens, which are the server's own."""
    tokens = population.our_tokens() if server.name == OURS else population.peers_tokens()
    return case.requests(population, tokens)


def require_alike(population: Population, servers: Sequence[Server], plan: Plan) -> None:
    """Raises `WrongAnswer` unless all answer `verify` and `me` with the same members."""
    for name in {"verify", "me"} & set(plan.cases):
        case = CASES[name]
        answers = [require_right(each, case, requests_for(each, case, population)[0]) for each in servers]
        for server, answer in zip(servers, answers, strict=True):
            if names_in(answer) != names_in(answers[0]):
                raise WrongAnswer(f"{server.name} answers {name} with {answer}, not {answers[0]}.")


def names_in(answer: object) -> object:
    """The names of an answer's members, without their values."""
    return {name: names_in(value) for name, value in answer.items()} if isinstance(answer, dict) else None
