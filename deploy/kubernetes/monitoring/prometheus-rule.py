#!/usr/bin/env python3
"""Writes prometheusrule.yaml from deploy/prometheus/*.rules.yaml; with --check, says whether it is
up to date (exit code 1: no).

A PrometheusRule is the same groups under another head, so that they stay as they are, comments and
all, and only move to the right.
"""

import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
TARGET = HERE / "prometheusrule.yaml"
HEAD = """\
# Written by prometheus-rule.py from deploy/prometheus/{name}: change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {rule}
  namespace: clusterkv
  labels:
    app.kubernetes.io/name: clusterkvd
spec:
"""


def resource(path):
    """The PrometheusRule of one file of rules, as text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    body = "\n".join(f"  {line}" if line else "" for line in lines)
    return HEAD.format(name=path.name, rule=path.name.removesuffix(".rules.yaml")) + body + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sources = sorted((HERE.parents[1] / "prometheus").glob("*.rules.yaml"))
    if not sources:
        sys.exit("prometheus-rule: deploy/prometheus has no *.rules.yaml")
    text = "---\n".join(resource(source) for source in sources)
    if not check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"prometheus-rule: {TARGET.name} is not what {[s.name for s in sources]} give; "
                 "run deploy/kubernetes/monitoring/prometheus-rule.py")


if __name__ == "__main__":
    main()
