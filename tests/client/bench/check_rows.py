#!/usr/bin/env python3
"""Runs clusterkv-bench on the host backend and checks its rows: check_rows.py PROGRAM"""

import json
import math
import subprocess
import sys

KEYS = {
    "op": str,
    "shape": dict,
    "median_us": float,
    "p99_us": float,
    "bytes": int,
    "flops": int,
    "floor_us": float,
    "ceiling": str,
    "ratio": float,
    "device": str,
}
CEILINGS = {"hbm-copy", "h2d", "d2h", "flops"}


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def check_row(row):
    for key, kind in KEYS.items():
        assert isinstance(row[key], kind), f"{key} is {row[key]!r}, not {kind.__name__}"
    assert row["driver"] is None, "the host backend has no driver"
    assert row["ceiling"] in CEILINGS, row["ceiling"]
    assert 0 < row["median_us"] <= row["p99_us"], row
    assert row["bytes"] > 0 and row["floor_us"] > 0, row
    assert math.isclose(row["ratio"], row["floor_us"] / row["median_us"], rel_tol=1e-9), row


def main():
    program = sys.argv[1]
    result = run(program, "--backend", "host", "--ops", "select,fetch,attend,step,kmeans",
                 "--contexts", "2k", "--batches", "1", "--repeats", "3", "--format", "json")
    assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr}"
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n"), "not one line"
    report = json.loads(result.stdout)
    assert report["backend"] == "host"
    assert all(report["ceilings"][name] > 0 for name in CEILINGS), report["ceilings"]
    rows = report["rows"]
    for row in rows:
        check_row(row)
    count = {op: sum(row["op"] == op for row in rows) for op in {row["op"] for row in rows}}
    assert count == {"select": 2, "attend": 2, "fetch": 8, "step": 8, "kmeans": 2}, count
    for row in rows:
        if row["op"] in ("fetch", "step"):
            wanted, found = row["shape"]["misses"] / 100, row["missed_clusters_share"]
            assert abs(found - wanted) < 0.01, (row["op"], wanted, found)
            assert (row["gathered_bytes"] > 0) == (wanted > 0), row
    # Errors and exit codes.
    assert run(program, "--ops", "best").returncode == 2
    unavailable = run(program, "--backend", "cuda", "--ops", "h2d")
    assert unavailable.returncode in (0, 3), unavailable.stderr
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
