"""A daemon under load, and a real Prometheus over it: every query of every rule and panel has data,
and what METRICS.md says is what the daemon exports."""

import json
import math
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from daemon import Daemon, bound, program
from load import Load
from local_prometheus import ROOT, LocalPrometheus
from metrics_doc import IDENTITIES, families
from promql import filled_in, selectors

RULES = ROOT / "deploy" / "prometheus" / "clusterkv.rules.yaml"
DASHBOARDS = ROOT / "deploy" / "grafana"
DATA_SECONDS = 90


class Scene:
    def __init__(self, daemon, load, prometheus):
        self.daemon, self.load, self.prometheus = daemon, load, prometheus

    def has_data(self, query):
        return any(math.isfinite(value) for _, value in self.prometheus.query(query))

    def without_data(self, queries):
        """What of the queries {query: where it is from} has none, also after a while."""
        deadline = time.monotonic() + bound(DATA_SECONDS)
        while True:
            queries = {query: where for query, where in queries.items() if not self.has_data(query)}
            if not queries or time.monotonic() > deadline:
                return queries
            assert not self.load.failures, self.load.failures
            time.sleep(1)


@pytest.fixture(scope="module", name="scene")
def scene_of_the_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    daemon = Daemon({"host-memory": "256mb", "gpu-memory": "4gb"})
    try:
        with (Load(daemon.address, pathlib.Path(program("clusterkvd")).parent, steps=24,
                   options=("--audit-rate", "0.2")) as load,
              LocalPrometheus(folder, [daemon.admin], RULES) as prometheus):
            yield Scene(daemon, load, prometheus)
            assert not load.failures, load.failures
        daemon.stop()
    finally:
        daemon.discard()
        shutil.rmtree(folder, ignore_errors=True)


def panel_queries():
    found = {}
    for path in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                found[filled_in(target["expr"])] = f"{path.name}: {panel['title']}"
    assert len(found) > 70
    return found


def test_every_panel_has_data(scene):
    assert not scene.without_data(panel_queries())


def test_every_rule_is_healthy_and_has_data(scene):
    wanted, healthy = {}, []
    for group in scene.prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            healthy.append((rule["name"], rule["health"], rule.get("lastError")))
            if rule["type"] == "recording":
                wanted[rule["name"]] = "recorded"
            found = selectors(rule["query"])
            assert found, rule
            wanted.update({selector: rule["name"] for selector in found})
    assert len(healthy) > 30
    assert not [rule for rule in healthy if rule[1] != "ok"], healthy
    assert not scene.without_data(wanted)


def test_no_alert_fires_for_a_daemon_that_is_well(scene):
    firing = [alert["labels"] for alert in scene.prometheus.get("alerts")["alerts"]
              if alert["state"] == "firing"]
    assert not firing


def test_identities_hold_at_every_scrape(scene):
    differences = {f"({left}) - ({right})": relation for left, relation, right in IDENTITIES}
    assert not scene.without_data(differences)
    for difference, relation in differences.items():
        # All of the last scrapes, a second apart.
        for labels, points in scene.prometheus.query_range(difference, time.time() - 8,
                                                           time.time(), 1):
            for at, value in points:
                assert value == 0 if relation == "==" else value >= 0, (difference, labels, at)


def test_what_is_documented_is_what_is_exported(scene):
    url = f"http://{scene.daemon.admin}/metrics"
    made = subprocess.run([sys.executable, ROOT / "deploy" / "metrics_doc.py", url],
                          capture_output=True, text=True, check=True).stdout
    kept = (ROOT / "deploy" / "METRICS.md").read_text(encoding="utf-8")
    assert made == kept, f"run deploy/metrics_doc.py {url} > deploy/METRICS.md"


def test_names_and_types_follow_the_conventions(scene):
    _, _, text = scene.daemon.http("/metrics")
    for name, kind, told, labels in families(text):
        assert name.startswith(("clusterkv_", "grpc_server_", "process_")), name
        assert (kind == "counter") == name.endswith("_total"), name
        assert told.endswith("."), name
        assert not {"le", "quantile"} & set(labels), name
    assert "clusterkv_build_info" in text
