"""Rules, dashboards and the runbook belong together. Needs no daemon."""

import re
import subprocess
import sys

import pytest

from local_prometheus import ROOT, tool
from promql import selectors

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "clusterkv.rules.yaml"
TESTS = DEPLOY / "prometheus" / "clusterkv.rules_test.yaml"


def text_of(*names):
    return DEPLOY.joinpath(*names).read_text(encoding="utf-8")


def alerts():
    """{name: its lines} of the rules file."""
    parts = re.split(r"^ +- (?=alert: |record: )", RULES.read_text(encoding="utf-8"), flags=re.M)
    found = {re.match(r"alert: (\w+)", part).group(1): part
             for part in parts if part.startswith("alert: ")}
    assert len(found) > 20
    return found


def anchors(markdown):
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", markdown, flags=re.M)}


def test_the_rules_are_valid():
    subprocess.run([tool("promtool"), "check", "rules", RULES], check=True)


def test_the_rules_do_what_their_tests_say():
    done = subprocess.run([tool("promtool"), "test", "rules", TESTS], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested():
    tested = TESTS.read_text(encoding="utf-8")
    for name in alerts():
        checks = re.findall(rf"eval_time: .*\n?\s*,? ?alertname: {name}\b", tested)
        assert len(checks) >= 2, f"{name}: one time at which it is quiet, one at which it fires"


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_to_do(name):
    lines = alerts()[name]
    assert re.search(r"labels: \{severity: (critical|warning|info)\}", lines)
    assert re.search(r'summary: ".*\{\{ \$labels\.\w+ \}\}.*\."', lines)
    assert f"runbook_url: deploy/RUNBOOK.md#{name.lower()}\n" in lines
    entry = re.search(rf"^### {name}\n(.*?)(?=^##)", text_of("RUNBOOK.md"), flags=re.M | re.S)
    assert entry, "it is not in the runbook"
    assert "\n- Check: " in entry.group(1) and "\n- Do" in entry.group(1)


def test_the_runbook_has_no_alert_that_is_gone():
    entries = set(re.findall(r"^### (\w+)$", text_of("RUNBOOK.md"), flags=re.M))
    assert entries == set(alerts())


def test_the_runbook_names_metrics_and_places_that_exist():
    runbook, metrics = text_of("RUNBOOK.md"), text_of("METRICS.md")
    for link in re.findall(r"\]\(#([^)]*)\)", runbook):
        assert link in anchors(runbook), link
    for selector in selectors(runbook):
        name = selector.split("{")[0]
        if ":" in name:
            assert f"record: {name}\n" in RULES.read_text(encoding="utf-8"), name
        else:
            assert re.sub("_(bucket|sum|count)$", "", name) in metrics, name


def test_the_dashboards_are_what_their_source_says():
    done = subprocess.run([sys.executable, DEPLOY / "grafana" / "dashboards.py", "--check"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
