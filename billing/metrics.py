"""Metrics for Prometheus, of all processes of a server together, and none where nobody may scrape them.

A process counts in its memory, and once a second writes that to files in one directory; the process that is
scraped reads the files of all. To write at once would cost a request seven microseconds; this costs one. The
library is imported by `keep`: until then counting costs a check of a variable.
"""

from __future__ import annotations

import atexit
import os
import platform
import re
import shutil
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import structlog

# The initial size of the library's files, and what a value takes in them beside its name.
FILE_BYTES = 64 * 1024
VALUE_BYTES = 32
WRITTEN_EVERY_SECONDS = 1.0
PREFIX = "billing-metrics-"
# From the verification of a key to the check of a password, and on to a request's deadline.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Kind = Literal["counter", "gauge", "histogram"]
# How the values of several processes become one (the words are prometheus_client's).
Merge = Literal["livesum", "max"]

REGISTRY: dict[str, Metric] = {}
# Where this process counts, if it does.
_DIRECTORY: Path | None = None

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("billing.metrics")


class Metric:
    """A metric: its name, its help text, and the names of its labels."""

    kind: Kind

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name = f"billing_{name}"
        self.help = help
        self.labels = labels
        self._family: Any = None
        self._members: dict[tuple[str, ...], Any] = {}
        REGISTRY[self.name] = self

    def begin(self, library: Any) -> None:
        """Start counting."""

    def write(self) -> None:
        """Write what was counted since the last time where other processes can read it."""

    def _members_of(self, counted: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
        """The members, made before anything is taken: a full disk refuses them, and then no count is lost."""
        return {labels: self._member(labels) for labels in list(counted)}

    def _member(self, labels: tuple[str, ...]) -> Any:
        member = self._members.get(labels)
        if member is None:
            member = self._members[labels] = self._family.labels(*labels) if labels else self._family
        return member


class Counter(Metric):
    """What only grows, until the server restarts."""

    kind = "counter"

    def __init__(self, name: str, help: str, *labels: str) -> None:
        super().__init__(name, help, *labels)
        self._lock = threading.Lock()
        self._counted: dict[tuple[str, ...], float] = {}

    def begin(self, library: Any) -> None:
        self._family = library.Counter(self.name, self.help, self.labels, registry=None)

    def count(self, *labels: str, amount: float = 1) -> None:
        if self._family is not None:
            with self._lock:
                self._counted[labels] = self._counted.get(labels, 0) + amount

    def write(self) -> None:
        members = self._members_of(self._counted)
        with self._lock:
            counted = {labels: self._counted.pop(labels) for labels in members if labels in self._counted}
        for labels, amount in counted.items():
            members[labels].inc(amount)


class Histogram(Metric):
    """How long something takes, in seconds."""

    kind = "histogram"

    def __init__(self, name: str, help: str, *labels: str) -> None:
        super().__init__(name, help, *labels)
        self._lock = threading.Lock()
        self._observed: dict[tuple[str, ...], list[float]] = {}

    def begin(self, library: Any) -> None:
        self._family = library.Histogram(self.name, self.help, self.labels, registry=None, buckets=SECONDS)

    def observe(self, seconds: float, *labels: str) -> None:
        if self._family is not None:
            with self._lock:
                tally = self._observed.get(labels)
                if tally is None:  # A count for each bucket and one beyond them, and then the sum.
                    tally = self._observed[labels] = [0.0] * (len(SECONDS) + 2)
                tally[bisect_left(SECONDS, seconds)] += 1
                tally[-1] += seconds

    def write(self) -> None:
        members = self._members_of(self._observed)
        with self._lock:
            observed = {labels: self._observed.pop(labels) for labels in members if labels in self._observed}
        for labels, (*numbers, total) in observed.items():
            member = members[labels]
            member._sum.inc(total)  # noqa: SLF001  # what its `observe` does, for many at once
            for bucket, number in zip(member._buckets, numbers, strict=True):  # noqa: SLF001
                if number:
                    bucket.inc(number)


class Gauge(Metric):
    """What goes up and down."""

    kind = "gauge"

    def __init__(self, name: str, help: str, *labels: str, merge: Merge = "livesum") -> None:
        super().__init__(name, help, *labels)
        self._merge = merge

    def begin(self, library: Any) -> None:
        self._family = library.Gauge(
            self.name, self.help, self.labels, registry=None, multiprocess_mode=self._merge
        )

    def set(self, value: float, *labels: str) -> None:
        if self._family is not None:
            self._member(labels).set(value)


class ScrapedGauge(Metric):
    """A gauge that is the same for all processes: read at each scrape, and written to no file."""

    kind = "gauge"


# Requests ------------------------------------------------------------------------------------------

REQUESTS = Counter(
    "requests_total", "Requests answered; 499 is a client that left.", "operation", "method", "status"
)
REQUEST_SECONDS = Histogram(
    "request_duration_seconds", "Time from a request to the end of its response.", "operation"
)
IN_FLIGHT = Gauge("requests_in_flight", "Requests in flight.")
PROBLEMS = Counter("problems_total", "Problems answered, by their code.", "operation", "code")
KEY_USES_DROPPED = Counter("key_uses_dropped_total", "Uses of API keys that could not be stored.")

# Threads and connections ---------------------------------------------------------------------------

LANE_THREADS = Gauge("lane_threads", "Threads of each kind of work.", "lane")
LANE_BUSY = Gauge("lane_threads_busy", "Threads that are working.", "lane")
LANE_WAITING = Gauge("lane_waiting", "Requests waiting for a thread.", "lane")
LANE_WAIT = Histogram(
    "lane_wait_seconds",
    "Wait of requests that found no thread free.",
    "lane",
)
LANE_REFUSED = Counter("lane_refused_total", "Requests refused with 503: no thread was free in time.", "lane")
POOL_SIZE = Gauge("database_pool_size", "Most connections to the database.", "component")
POOL_IN_USE = Gauge("database_pool_in_use", "Connections in use.", "component")
POOL_WAIT = Histogram("database_pool_wait_seconds", "Wait of callers that found no connection free.")

# The worker ----------------------------------------------------------------------------------------

WORKERS = Gauge("worker_processes", "Worker processes running.")
POLLED = Gauge(
    "worker_polled_timestamp_seconds",
    "When a worker last polled its queue.",
    "queue",
    merge="max",
)
TASKS = Counter("tasks_total", "Tasks ended, `done` or `failed`; a failed one is retried.", "kind", "result")
TASK_SECONDS = Histogram("task_duration_seconds", "Duration of a task.", "kind")
ATTEMPTS = Counter(
    "delivery_attempts_total",
    "Attempts to deliver an event, `delivered` or the reason for failure.",
    "outcome",
)
ATTEMPT_SECONDS = Histogram("delivery_duration_seconds", "Duration of an attempt.")
DELIVERIES = Counter("deliveries_ended_total", "Deliveries that ended, `delivered` or `failed`.", "status")

# Read from the database, at each scrape ------------------------------------------------------------

OUTBOX = ScrapedGauge(
    "outbox_deliveries", "Deliveries that have not ended, by the state of their endpoint.", "endpoint"
)
OUTBOX_AGE = ScrapedGauge(
    "outbox_oldest_due_seconds", "How long the oldest of them has been due.", "endpoint"
)
DUE = ScrapedGauge("tasks_due", "Tasks that are due and held by no worker.", "queue")
DUE_AGE = ScrapedGauge("tasks_oldest_due_seconds", "How long the oldest of them has been due.", "queue")
DATABASE_UP = ScrapedGauge("database_up", "Whether the database answered.", "kind")
CLOCK_OFFSET = ScrapedGauge(
    "clock_offset_seconds", "How far this machine's clock is ahead of the database's."
)
BUILD = ScrapedGauge("build_info", "The version running.", "version", "python")

Answers = Mapping[ScrapedGauge, Mapping[tuple[str, ...], float]]


# Keeping -------------------------------------------------------------------------------------------


@contextmanager
def directory() -> Iterator[Path]:
    """A directory for the metrics of this process and of those that it starts; removed at the end."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as made:
        os.environ.update(PROMETHEUS_MULTIPROC_DIR=made)
        yield Path(made)


def keep(given: Path | None) -> Path:
    """Start counting, in this directory or in one of this process alone; once in a process. Returns the directory."""
    global _DIRECTORY
    if _DIRECTORY is not None:
        return _DIRECTORY
    directory = given or own_directory()
    # The library reads this variable when it is imported.
    os.environ.update(PROMETHEUS_MULTIPROC_DIR=str(directory))
    import prometheus_client.values

    if hasattr(os, "posix_fallocate"):  # Not on macOS.
        files: Any = prometheus_client.values
        files.MmapedDict = _allocated(files.MmapedDict)
    for metric in REGISTRY.values():
        metric.begin(prometheus_client)
    _DIRECTORY = directory
    return directory


def is_on() -> bool:
    """Whether anything is counted."""
    return _DIRECTORY is not None


def _allocated(base: Any) -> Any:
    """The library's file with blocks allocated before they are written: a full disk then raises an `OSError`.

    The library itself writes to a mapping of a sparse file, where a full disk kills the process (SIGBUS).
    """

    class Allocated(base):  # type: ignore[misc]
        def __init__(self, filename: str, read_mode: bool = False) -> None:
            with open(filename, "ab") as file:
                if not file.tell():
                    _allocate(file)
            super().__init__(filename, read_mode)

        def _init_value(self, key: str) -> None:
            if self._used + len(key.encode()) + VALUE_BYTES > self._capacity:
                os.posix_fallocate(self._f.fileno(), self._capacity, self._capacity)
            super()._init_value(key)

    return Allocated


def _allocate(new: BinaryIO) -> None:
    try:
        os.posix_fallocate(new.fileno(), 0, FILE_BYTES)
    except OSError:
        Path(new.name).unlink()  # No process could read an empty one.
        raise


def own_directory() -> Path:
    """A directory that is removed when this process exits."""
    made = tempfile.mkdtemp(prefix=PREFIX)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def write() -> None:
    """Write what this process counted where others can read it."""
    for metric in REGISTRY.values():
        metric.write()


@contextmanager
def written(*samples: Callable[[], None]) -> Iterator[None]:
    """Once a second set gauges and write what was counted, and write a last time at the end of the block."""
    if not is_on():
        yield
        return
    ended = threading.Event()

    def run() -> None:
        is_well = True
        while not ended.wait(WRITTEN_EVERY_SECONDS):
            is_well = _sample_and_write(samples, was_well=is_well)

    thread = threading.Thread(target=run, name="metrics-writer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _sample_and_write((), was_well=False)  # The thread that writes says it once.


def _sample_and_write(samples: Iterable[Callable[[], None]], *, was_well: bool) -> bool:
    """Set gauges and write; returns whether that went well. A failure (a full disk) is logged if `was_well`."""
    try:
        for sample in samples:
            sample()
        write()
    except OSError as error:
        if was_well:
            log.warning("metrics cannot be written", cause=error.strerror)
        return False
    return True


# Reading -------------------------------------------------------------------------------------------


def page(directory: Path, answers: Answers, accept: str) -> tuple[bytes, str]:
    """The metrics of all processes and these answers, in the format of `accept`, and its media type."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.multiprocess import MultiProcessCollector

    _sample_and_write((), was_well=True)
    forget_the_dead(directory)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    registry.register(_Answers(answers))
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


class _Answers:
    """The answers as the library collects them."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        for metric, values in self._answers.items():
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


def build() -> Answers:
    """The version that runs here."""
    return {BUILD: {(version("billing-control-plane"), platform.python_version()): 1}}


def forget_the_dead(directory: Path) -> None:
    """Remove the live gauges of processes that have ended; what they counted stays."""
    for path in directory.glob("gauge_live*_*.db"):
        if (pid := re.search(r"_(\d+)\.db$", path.name)) and not is_running(int(pid[1])):
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is such a process, whoever it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
