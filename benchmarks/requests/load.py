"""The load: wrk, which sends prepared requests; and what a window of it costs."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.installation import Installation
from benchmarks.requests.cases import Case, Request
from benchmarks.requests.servers import Server

# Sends the requests in turn, beginning at a random one. wrk itself counts the answers: reading them in the script would
# cost it more than sending.
SCRIPT = """
local requests = {%(requests)s}
math.randomseed(os.time())
local turn = math.random(#requests)
request = function()
  turn = turn %% #requests + 1
  return requests[turn]
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"requests": %%d, "micros": %%d, "refused": %%d, "broken": %%d, "p50_micros": %%.1f, "p99_micros": %%.1f}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""
REFUSALS = range(400, 600)
CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Window:
    """The figures of one server over a few seconds: CPU in µs per request, latencies in ms."""

    requests_a_second: float
    server_micros: float
    postgres_micros: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Counted:
    """wrk's counts: requests, those of them refused with 4xx or 5xx, and connections that broke."""

    requests: int
    micros: int
    refused: int
    broken: int
    p50_micros: float
    p99_micros: float

    @property
    def seconds(self) -> float:
        return self.micros / 1e6

    @property
    def a_second(self) -> float:
        return self.requests / self.seconds

    @property
    def p50(self) -> float:
        """In ms, as `p99`."""
        return self.p50_micros / 1000

    @property
    def p99(self) -> float:
        return self.p99_micros / 1000


class WrongAnswer(Exception):
    """A server gave an unexpected answer: its figures would mean nothing."""


def apart(installation: Installation, servers: Iterable[Server]) -> None:
    """Pin the servers to one core, and PostgreSQL, ourselves and so wrk to the others, if there are any."""
    if len(CORES) > 1:
        for pid in [pid for server in servers for pid in server.pids]:
            pin(pid, CORES[:1])
        for pid in [*installation.postgres_processes, os.getpid()]:
            pin(pid, CORES[1:])


def pin(pid: int, cores: Sequence[int]) -> None:
    """Pin a process to cores, with all of its threads."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def measure(
    installation: Installation,
    server: Server,
    case: Case,
    requests: Sequence[Request],
    *,
    clients: int,
    seconds: int,
) -> Window:
    """Warm the server up for a second, then measure; raises `WrongAnswer`."""
    server.forget_log()
    require_right(server, case, requests[0])
    script = script_of(Path(installation.environ["BILLING_STATE_DIR"], "requests.lua"), requests)
    wrk(server, script, clients=clients, seconds=1)
    before = server.cpu_seconds(), installation.postgres_seconds()
    counted = wrk(server, script, clients=clients, seconds=seconds)
    after = server.cpu_seconds(), installation.postgres_seconds()
    refused = counted.requests if case.statuses[0] in REFUSALS else 0
    if counted.broken or counted.refused != refused or not counted.requests:
        raise WrongAnswer(f"{server.name}, {case.name}, {clients} clients: {counted}")
    if refused and b'"problem":"rate-limited"' in server.log.read_bytes():
        raise WrongAnswer(
            f"{server.name}, {case.name}: a limit was reached, and that is not what is measured."
        )
    cpu = [1e6 * (end - begin) / counted.requests for begin, end in zip(before, after, strict=True)]
    return Window(counted.a_second, cpu[0], cpu[1], counted.p50, counted.p99)


def script_of(path: Path, requests: Iterable[Request]) -> Path:
    """Write the script by which wrk sends these requests."""
    path.write_text(SCRIPT % {"requests": ",\n".join(json.dumps(each.raw()) for each in requests)})
    return path


def wrk(server: Server, script: Path, *, clients: int, seconds: int) -> Counted:
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--timeout",
        "10s",
        "-s",
        str(script),
        server.url,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return Counted(**json.loads(ran.stdout.splitlines()[-1]))


def require_right(server: Server, case: Case, request: Request) -> object:
    """The answer to one request; raises `WrongAnswer` unless it has the status of the case."""
    status, answer = answer_to(server, request)
    if status not in case.statuses:
        raise WrongAnswer(
            f"{server.name}, {case.name}: {status} {answer!r}\n{server.log.read_text()[-2000:]}"
        )
    return answer


def answer_to(server: Server, request: Request) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = None if request.body is None else json.dumps(request.body)
    headers = dict(request.headers) | ({"Content-Type": "application/json"} if body else {})
    connection.request(request.method, request.path, body, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found
