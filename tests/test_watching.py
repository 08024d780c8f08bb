"""The documentation, dashboard and alerts of the metrics, compared with the metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from billing.metrics import REGISTRY

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs/observability.md").read_text()
DASHBOARD = json.loads((ROOT / "ops/grafana/billing.json").read_text())
RULES = yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
NAME = re.compile(r"\bbilling_[a-z_]+")


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))


def exists(name: str) -> bool:
    series = [
        f"{n}{s}" for n, f in REGISTRY.items() if f.kind == "histogram" for s in ("_bucket", "_sum", "_count")
    ]
    return name in series or (name in REGISTRY and REGISTRY[name].kind != "histogram")


def test_the_docs_table_lists_every_metric() -> None:
    listed = re.findall(r"^\| `(billing_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCS, re.MULTILINE)
    told = [
        (name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels) or "–", metric.help)
        for name, metric in REGISTRY.items()
    ]
    assert listed == told


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_alerts_and_panels_query_existing_metrics(expression: str) -> None:
    names = NAME.findall(expression)
    assert names
    assert [name for name in names if not exists(name)] == []


def test_alerts_and_panels_query_existing_labels() -> None:
    for expression in expressions():
        for name, matchers in re.findall(r"\b(billing_[a-z_]+)\{([^}]*)\}", expression):
            metric = REGISTRY.get(name) or REGISTRY[name.rpartition("_")[0]]
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - {"instance"}
            assert asked <= {*metric.labels}, expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set(NAME.findall(json.dumps(DASHBOARD)))
    assert {n for n in REGISTRY if not any(name.startswith(n) for name in shown)} == set()


def test_every_alert_has_a_severity_and_a_runbook_and_is_documented() -> None:
    listed = re.findall(r"^\| `(Billing\w+)` \| \S", DOCS, re.MULTILINE)
    assert listed == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "runbook"}


def test_a_metric_name_that_does_not_exist_is_detected() -> None:
    assert not exists("billing_request_total")
    assert not exists("billing_request_duration_seconds")
    assert exists("billing_request_duration_seconds_bucket")
