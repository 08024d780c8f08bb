"""The faults, in order. Each begins, lasts, and ends; the service gets no help meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.cluster.checks import superuser_cursor
from tests.faults.cluster.programs import Program, eventually, family, send
from tests.faults.cluster.scene import Scene

# Debian's package, by architecture.
FAKETIME = "*-linux-gnu*/faketime/libfaketimeMT.so.1"
BUSIEST_BACKEND = """
SELECT pid FROM pg_stat_activity WHERE usename = 'billing_app' ORDER BY xact_start NULLS LAST LIMIT 1
"""


@dataclass(frozen=True)
class Fault:
    """`does` is a description for readers. Writes may not be unavailable for longer than `most_seconds`.

    While the servers' `clocks_differ` a replaced key still works at a server whose clock is behind its expiry.
    """

    name: str
    does: str
    run: Callable[[Scene], None]
    most_seconds: float = 10
    clocks_differ: bool = False


def wait(seconds: float) -> None:
    time.sleep(seconds)


def kills(program: Callable[[Scene], Program]) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        victim = program(scene)
        starts = victim.starts
        victim.kill()
        eventually(lambda: victim.starts > starts, f"{victim.name} is started again")

    return run


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP for the block."""
    send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        send(signal.SIGCONT, pids)


def stops_backend(scene: Scene) -> None:
    with superuser_cursor(scene.cluster) as cursor:
        cursor.execute(BUSIEST_BACKEND)
        pid = int(cursor.fetchone()[0])
    with stopped([pid]):
        wait(30)


def kills_postmaster(scene: Scene) -> None:
    os.kill(scene.cluster.primary().postmaster(), signal.SIGKILL)
    wait(3)


def loses_primary(scene: Scene) -> None:
    node = scene.cluster.primary()
    assert node.patroni is not None
    postgres = family(node.postmaster())
    node.patroni.keep_away()
    send(signal.SIGKILL, postgres)
    wait(40)
    node.patroni.bring_back()


def loses_standby(scene: Scene) -> None:
    [node] = scene.cluster.standbys("synchronous")
    assert node.patroni is not None
    postgres = family(node.postmaster())
    node.patroni.keep_away()
    send(signal.SIGKILL, postgres)
    wait(15)
    node.patroni.bring_back()


def stops_primary(scene: Scene) -> None:
    with stopped(scene.cluster.primary().processes()):
        wait(60)


def swallows(scene: Scene) -> None:
    for proxy in scene.proxies:
        proxy.set("swallows")
    wait(20)
    for proxy in scene.proxies:
        proxy.set("passes")


def resets(scene: Scene) -> None:
    for proxy in scene.proxies:
        proxy.set("resets")
    wait(10)
    for proxy in scene.proxies:
        proxy.set("passes")


def stops_redis(scene: Scene) -> None:
    with stopped([scene.redis.pid]):
        wait(15)


def stops_etcd(scene: Scene) -> None:
    with stopped([scene.cluster.etcd.pid]):
        wait(30)


def fills_disk(scene: Scene) -> None:
    """Completely, for 40 seconds."""
    node = scene.cluster.primary()
    assert os.path.ismount(node.disk), "only root can give a node a small disk"
    ballast = node.disk / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        wait(40)
    finally:
        ballast.unlink()


def steps_clock(scene: Scene) -> None:
    """Of the first server and the first worker, which were started for it under libfaketime."""
    [library] = Path("/usr/lib").glob(FAKETIME)
    clock = scene.directory / "clock"
    clock.write_text("+0\n")
    clock.chmod(0o644)
    fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    fake |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    programs = (scene.apis[0], scene.workers[0])
    for program in programs:
        program.restart({**scene.environs[0], **fake})
    eventually(scene.is_ready, "the first server is back under libfaketime")
    for step in ("+100s\n", "-100s\n", "+0\n"):
        clock.write_text(step)
        wait(12)
    for program in programs:
        program.restart(scene.environs[0])


def switches_over(scene: Scene) -> None:
    scene.cluster.switch_over()


def power_fails(scene: Scene) -> None:
    cluster = scene.cluster
    everything = [pid for node in cluster.nodes for pid in node.processes()]
    programs = (cluster.etcd, scene.redis, *scene.apis, *scene.workers)
    send(signal.SIGKILL, [*everything, *(program.pid for program in programs)])
    wait(5)


FAULTS = [
    Fault("API killed", "kill -9 of an API process", kills(lambda scene: scene.apis[0]), 5),
    Fault("other API killed", "kill -9 of the other", kills(lambda scene: scene.apis[1]), 5),
    Fault("worker killed", "kill -9 of a worker", kills(lambda scene: scene.workers[0]), 5),
    Fault("other worker killed", "kill -9 of the other", kills(lambda scene: scene.workers[1]), 5),
    Fault("Redis killed", "kill -9 of Redis", kills(lambda scene: scene.redis), 5),
    Fault("Redis stopped", "SIGSTOP of Redis for 15 s", stops_redis, 5),
    Fault("switchover", "`patronictl switchover` to the synchronous standby", switches_over, 15),
    Fault("postmaster killed", "kill -9 of the primary's postmaster; Patroni lives", kills_postmaster, 30),
    Fault("primary lost", "kill -9 of the primary and its Patroni, away for 40 s", loses_primary, 40),
    Fault(
        "standby lost", "kill -9 of the synchronous standby and its Patroni, away for 15 s", loses_standby, 10
    ),
    Fault("backend stopped", "SIGSTOP of one backend in a transaction, for 30 s", stops_backend, 15),
    Fault("primary stopped", "SIGSTOP of the primary and its Patroni, for 60 s", stops_primary, 40),
    Fault(
        "partition",
        "all that passes between one API process and one worker and the database is swallowed for 20 s; "
        "what was connected stays silent for ever",
        swallows,
        15,
    ),
    Fault("resets", "the same connections are reset, and new ones, for 10 s", resets, 5),
    Fault("etcd stopped", "SIGSTOP of etcd for 30 s", stops_etcd, 10),
    Fault("disk full", "not a byte is left on the primary's disk, for 40 s", fills_disk, 60),
    Fault(
        "clock steps",
        "the clock of one API and one worker steps 100 s ahead, 200 s back, and is right again; both are "
        "restarted before and after",
        steps_clock,
        15,
        clocks_differ=True,
    ),
    Fault("power failure", "kill -9 of everything at once", power_fails, 60),
]
