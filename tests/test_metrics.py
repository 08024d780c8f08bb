"""Metrics: the counts of all processes are exposed together, and nothing that a client chose is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from billing import metrics
from billing.clock import utc_now
from billing.http.exposition import database_gauges
from billing.storage import database, embedded
from billing.storage.store import Store
from tests import live
from tests.conftest import API, PASSWORD, clone
from tests.live import free_port

ROOT = Path(__file__).parents[1]
TOKEN = "of-a-prometheus-that-may-see-it"
SUFFIXES = re.compile(r"_(bucket|sum|count|created)$")

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def parsed(text: str) -> Samples:
    """The samples by name and labels."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples with these labels, whatever their others."""
    return sum(number for key, number in samples.get(name, {}).items() if labels.items() <= set(key))


# One process -------------------------------------------------------------------------------------


def metrics_after(script: str) -> Samples:
    """What a separate process exposes after this script, so that ours keeps no metrics."""
    program = f"from billing import metrics\ndirectory = metrics.keep(None)\n{script}\n"
    program += "print(metrics.page(directory, metrics.build(), '')[0].decode())"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return parsed(ran.stdout)


def test_a_counter_counts_by_its_labels() -> None:
    samples = metrics_after(
        "for status in ('200', '200', '500'): metrics.REQUESTS.count('log_in', 'POST', status)\n"
        "metrics.write()\nmetrics.REQUESTS.count('log_in', 'POST', '200')"
    )
    assert value(samples, "billing_requests_total", status="200") == 3
    assert value(samples, "billing_requests_total", status="500") == 1


def test_metrics_are_begun_once() -> None:
    samples = metrics_after(
        "metrics.REQUESTS.count('log_in', 'POST', '200')\nassert metrics.is_on()\n"
        "assert metrics.keep(directory / 'another') == metrics.keep(None) == directory\nmetrics.write()"
    )
    assert value(samples, "billing_requests_total") == 1


def test_a_histogram_counts_each_value_in_its_bucket() -> None:
    samples = metrics_after("for s in (0.001, 0.0011, 40.0): metrics.REQUEST_SECONDS.observe(s, 'log_in')")
    counted = {bound: value(samples, "billing_request_duration_seconds_bucket", le=bound) for bound in BOUNDS}
    assert counted == {"0.001": 1, "0.0025": 2, "30.0": 2, "+Inf": 3}
    assert value(samples, "billing_request_duration_seconds_sum") == pytest.approx(40.0021)
    assert value(samples, "billing_request_duration_seconds_count") == 3


BOUNDS = ("0.001", "0.0025", "30.0", "+Inf")


CROWD = """
import asyncio, threading
from billing.errors import Overloaded
from billing.http.lanes import BoundedThreads, Lane, Lanes

async def crowd(run):
    begun, end = threading.Event(), threading.Event()
    def work():
        begun.set()
        end.wait()
    first = asyncio.create_task(run(work))
    await asyncio.to_thread(begun.wait)
    assert isinstance((await asyncio.gather(run(work), return_exceptions=True))[0], Overloaded)
    end.set()
    await first

lanes = Lanes({Lane.GENERAL: 1}, longest_wait_seconds=0.01)
asyncio.run(crowd(lambda work: lanes.run(Lane.GENERAL, work)))
asyncio.run(crowd(BoundedThreads("metrics", 1, longest_wait_seconds=0.01).run))
"""


def test_a_call_refused_for_want_of_a_thread_is_counted_under_its_pools_name() -> None:
    samples = metrics_after(CROWD)
    assert value(samples, "billing_lane_refused_total", lane="general") == 1
    assert value(samples, "billing_lane_refused_total", lane="metrics") == 1


def test_every_metric_takes_its_labels_and_is_exposed_under_its_name() -> None:
    script = "\n".join(
        f"metrics.REGISTRY[{name!r}].{call}({given}*{tuple('x' for _ in metric.labels)!r})"
        for name, metric in metrics.REGISTRY.items()
        if (call := {"counter": "count", "histogram": "observe", "gauge": "set"}[metric.kind])
        if not isinstance(metric, metrics.ScrapedGauge)
        if (given := "" if call == "count" else "1, ") is not None
    )
    families = {SUFFIXES.sub("", name) for name in metrics_after(script)}
    asked = {name for name, metric in metrics.REGISTRY.items() if isinstance(metric, metrics.ScrapedGauge)}
    assert families == metrics.REGISTRY.keys() - asked | {"billing_build_info"}


def test_metric_names_follow_prometheus_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/"""
    for name, metric in metrics.REGISTRY.items():
        assert re.fullmatch(r"billing_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.kind != "histogram" or name.endswith("_seconds")
        assert metric.help.endswith(".")


def test_gauges_of_an_ended_process_are_dropped_and_its_counters_kept() -> None:
    samples = metrics_after(
        "import os\n"
        "metrics.WORKERS.set(1)\n"
        "if not (child := os.fork()):\n"
        "    metrics.WORKERS.set(1); metrics.REQUESTS.count('log_in', 'POST', '200'); metrics.write(); os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    assert value(samples, "billing_worker_processes") == 1
    assert value(samples, "billing_requests_total") == 1


def test_metrics_are_written_again_after_write_errors_logged_once() -> None:
    samples = metrics_after(
        "import threading\n"
        "from structlog.testing import capture_logs\n"
        "metrics.WRITTEN_EVERY_SECONDS = 0.01\n"
        "tries, has_room = [], threading.Event()\n"
        "def sample():\n"
        "    tries.append(1)\n"
        "    if len(tries) < 4: raise OSError(28, 'No space left on device')\n"
        "    metrics.WORKERS.set(1); has_room.set()\n"
        "with capture_logs() as lines, metrics.written(sample): assert has_room.wait(30)\n"
        "[line] = lines\n"
        "assert line['cause'] == 'No space left on device'"
    )
    assert value(samples, "billing_worker_processes") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a disk of its own made")
def test_a_full_disk_ends_no_process_and_loses_no_count(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from billing import metrics\n"
        "disk = Path(sys.argv[1])\n"
        "metrics.keep(disk)\n"
        "filler = open(disk / 'filler', 'wb', buffering=0)\n"
        "try:\n"
        "    while True: filler.write(bytes(4096))\n"
        "except OSError: pass\n"
        "def count():\n"
        "    for n in range(1000): metrics.REQUESTS.count(f'operation_{n}', 'GET', '200')\n"
        "count(); assert not metrics._sample_and_write((), was_well=False)\n"
        "filler.truncate(0)\n"
        "count(); assert metrics._sample_and_write((), was_well=False)\n"
        "print(metrics.page(disk, metrics.build(), '')[0].decode())\n"
    )
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path]).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        ran = subprocess.run(
            [sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert ran.returncode == 0, ran.stderr
    assert value(parsed(ran.stdout), "billing_requests_total") == 2000


def test_monitoring_libraries_are_imported_only_when_configured() -> None:
    program = f"import app, sys; print(*(n for n in sys.modules if n.split('.')[0] in {MONITORING}))"
    clean = {
        name: text for name, text in os.environ.items() if not name.startswith(("METRICS", "OTEL", "SENTRY"))
    }
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


MONITORING = {"prometheus_client", "opentelemetry", "sentry_sdk"}


# Several processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database_url(cluster: embedded.Cluster, worker_id: str) -> str:
    name = f"billing_metrics_{worker_id}"
    clone(cluster, name)
    return database.url(cluster, database.APP, name)


@pytest.fixture(scope="module")
def watched(database_url: str) -> Iterator[tuple[str, str]]:
    """The URLs of two server processes with a worker, and of their metrics."""
    port = str(free_port())
    with live.serving({"DATABASE_URL": database_url, "METRICS_PORT": port}, "--workers", "2") as url:
        yield url, f"http://127.0.0.1:{port}/metrics"


def read(url: str, **headers: str) -> Samples:
    answer = requests.get(url, headers=headers, timeout=10)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(("text/plain; version=", "application/openmetrics-text"))
    return parsed(answer.text)


def test_metrics_cover_all_processes(watched: tuple[str, str]) -> None:
    url, metrics_url = watched
    for _ in range(40):  # Each on its own connection, which either process may accept.
        assert requests.get(f"{url}{API}/me/", timeout=10).status_code == 401
    live.eventually(
        lambda: (
            value(read(metrics_url), "billing_requests_total", operation="get_current_user", status="401")
            == 40
        )
    )
    samples = read(metrics_url)
    assert value(samples, "billing_request_duration_seconds_count", operation="get_current_user") == 40
    assert value(samples, "billing_problems_total", code="credentials-missing") == 40
    assert value(samples, "billing_worker_processes") == 1
    live.eventually(
        lambda: value(read(metrics_url), "billing_lane_threads", lane="passwords") == 2 * 2, seconds=90
    )
    assert value(samples, "billing_database_pool_size", component="worker") > 0
    assert value(samples, "billing_database_up", kind="external") == 1
    [offset] = samples["billing_clock_offset_seconds"].values()
    assert abs(offset) < 20
    live.eventually(
        lambda: polled(metrics_url) == {"general", "checks", "webhooks", "slow_webhooks"}, seconds=90
    )
    assert set(samples["billing_tasks_due"]) == {
        frozenset({("queue", name)}) for name in ("general", "checks", "webhooks", "slow_webhooks")
    }


def polled(metrics_url: str) -> set[str]:
    """The queues that a worker has polled successfully."""
    samples = read(metrics_url).get("billing_worker_polled_timestamp_seconds", {})
    return {dict(labels)["queue"] for labels, moment in samples.items() if moment > 1e9}


def test_a_refused_login_is_counted_by_its_problem_code(watched: tuple[str, str]) -> None:
    url, metrics_url = watched
    body = {"email": "nobody@acme.example", "password": PASSWORD}
    assert requests.post(f"{url}{API}/login/", json=body, timeout=10).status_code == 401
    live.eventually(
        lambda: (
            value(read(metrics_url), "billing_problems_total", operation="log_in", code="invalid-credentials")
            == 1
        )
    )


def test_values_chosen_by_a_client_appear_in_no_metric(watched: tuple[str, str]) -> None:
    url, metrics_url = watched
    requests.get(f"{url}/secret-path?of=mine", timeout=10)
    requests.request("BREW", f"{url}/coffee", timeout=10)
    requests.request("PROPFIND", f"{url}{API}/me/", timeout=10)
    live.eventually(lambda: value(read(metrics_url), "billing_requests_total", method="other") > 0)
    text = requests.get(metrics_url, timeout=10).text
    assert not re.search("secret-path|mine|BREW|coffee|PROPFIND", text)


def test_the_api_port_serves_no_metrics_when_they_have_their_own_port(watched: tuple[str, str]) -> None:
    url, metrics_url = watched
    assert requests.get(f"{url}/metrics", timeout=10).status_code == 404
    assert requests.get(metrics_url.removesuffix("metrics"), timeout=10).status_code == 404


def test_openmetrics_is_served_to_clients_that_accept_it(watched: tuple[str, str]) -> None:
    answer = requests.get(
        watched[1], headers={"accept": "application/openmetrics-text; version=1.0.0"}, timeout=10
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")


# By token ----------------------------------------------------------------------------------------


def test_with_a_token_alone_the_api_port_serves_metrics_to_its_holder(database_url: str) -> None:
    with live.serving({"DATABASE_URL": database_url, "METRICS_TOKEN": TOKEN}, "--no-worker") as url:
        page = f"{url}/metrics"
        assert value(read(page, Authorization=f"Bearer {TOKEN}"), "billing_build_info") == 1
        refused = {
            "credentials-missing": {},
            "token-invalid": {"Authorization": f"Bearer {TOKEN}x"},
        }
        for code, headers in refused.items():
            answer = requests.get(page, headers=headers, timeout=10)
            assert (answer.status_code, answer.json()["code"]) == (401, code)
        assert requests.get(page, headers={"Authorization": f"Basic {TOKEN}"}, timeout=10).status_code == 401


def test_with_port_and_token_the_metrics_port_requires_the_token(database_url: str) -> None:
    port = str(free_port())
    given = {"DATABASE_URL": database_url, "METRICS_PORT": port, "METRICS_TOKEN": TOKEN}
    with live.serving(given, "--no-worker") as url:
        page = f"http://127.0.0.1:{port}/metrics"
        assert requests.get(page, timeout=10).status_code == 401
        assert read(page, Authorization=f"Bearer {TOKEN}")
        assert requests.get(f"{url}/metrics", timeout=10).status_code == 404


def test_without_port_or_token_no_metrics_are_served(live_server_url: str) -> None:
    assert requests.get(f"{live_server_url}/metrics", timeout=10).status_code == 404


@pytest.mark.parametrize("ahead", [0, 100, -100])
def test_the_offset_from_the_databases_clock_is_reported(store: Store, ahead: int) -> None:
    answers = database_gauges(store, lambda: utc_now() + timedelta(seconds=ahead), "external")
    assert answers[metrics.CLOCK_OFFSET][()] == pytest.approx(ahead, abs=20)


def test_while_the_database_is_down_only_that_is_reported() -> None:
    """And no backlog is reported: zero would look like nothing to do."""
    program = (
        "from billing.http.exposition import database_gauges\n"
        "from billing.clock import utc_now\n"
        "from billing.storage.store import Store\n"
        "store = Store(None, connections=1)\n"
        "store.open('postgresql+psycopg2://nobody@127.0.0.1:1/nothing')\n"
        "directory_answers = database_gauges(store, utc_now, 'external')\n"
        "print({metric.name: values for metric, values in directory_answers.items()})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "{'billing_database_up': {('external',): 0}}"
