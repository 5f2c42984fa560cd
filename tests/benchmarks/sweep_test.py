#!/usr/bin/env python3
"""Tests sweep.py with a program that stands in for clusterkv-replay."""

import contextlib
import io
import json
import math
import os
import stat
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import sweep  # noqa: E402

# Error falls with the square root of the bytes; group max costs twice the bytes.
STAND_IN = f"""#!{sys.executable}
import json, sys
arguments = sys.argv[1:]
budgets = [int(b) for b in arguments[arguments.index("--budgets") + 1].split(",")]
preset = {{"name": "default", "group": "softmax", "estimate": False, "quest_group": None}}
for key, value in [a.split("=") for a, flag in zip(arguments[1:], arguments) if flag == "--set"]:
    if key not in preset:
        sys.exit(f"no key {{key}}")
    preset[key] = value
factor = 2 if preset["group"] == "max" else 1
rows = [{{"method": "clusterkv", "budget": b, "layer": layer, "output_error": b ** -0.5,
         "mass": 1, "recall": 0.5, "hit_rate": 0.75, "host_bytes_per_step": b * factor,
         "window_tokens_mean": 8}} for b in budgets for layer in (3, "all")]
open(arguments[0], "a").write("x")
print(json.dumps({{"preset": preset, "results": rows}}))
"""


class SweepTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = lambda name: os.path.join(folder.name, name)
        with open(self.path("replay"), "w", encoding="utf-8") as out:
            out.write(STAND_IN)
        os.chmod(self.path("replay"), stat.S_IRWXU)

    def run_sweep(self, *more):
        arguments = [self.path("trace"), "--replay", self.path("replay"), "--output",
                     self.path("out.md"), "--results", self.path("runs"), *more]
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = sweep.main(arguments)
        return code, errors.getvalue()

    def runs(self):
        return os.path.getsize(self.path("trace"))

    def test_ranks_by_error_times_bytes(self):
        self.assertEqual(self.run_sweep("--axes", "group,estimate")[0], 0)
        with open(self.path("out.md"), encoding="utf-8") as table:
            rows = [line for line in table if line.startswith("| ")][1:]
        self.assertEqual(len(rows), 4)  # the base, mean, max, estimate
        self.assertIn("group max", rows[-1])
        self.assertTrue(rows[-1].startswith("| 2.000 | 1.000 | 2.000 |"))
        self.assertTrue(rows[0].startswith("| 1.000 |"))

    def test_goes_on_where_it_stopped(self):
        self.run_sweep("--axes", "group")
        first = self.runs()
        self.run_sweep("--axes", "group,estimate")
        self.assertEqual((first, self.runs()), (3, 4))

    def test_reports_a_failed_replay(self):
        code, errors = self.run_sweep("--axes", "group,kmeans_iterations")
        self.assertEqual(code, 1)
        self.assertIn("kmeans_iterations", errors)

    def test_takes_geometric_means(self):
        base = {1: {"output_error": 0.1}, 2: {"output_error": 0.2}}
        rows = {1: {"output_error": 0.4}, 2: {"output_error": 0.2}}
        self.assertAlmostEqual(sweep.ratio("output_error", [rows], [base]), 2.0)
        self.assertAlmostEqual(sweep.ratio("output_error", [rows, base], [base, base]), 2 ** 0.5)

    def test_full_grid_has_every_combination_once(self):
        base = {"tokens_per_cluster": 16, "group": "softmax", "center_keys": True,
                "estimate": False, "min_window": 64, "prompt_segment_tokens": 8192}
        options = sweep.parse_arguments(["t", "--grid", "full"])
        tried = sweep.settings_to_try(options, base)
        self.assertEqual(len(tried), math.prod(len(sweep.AXES[a]) for a in sweep.FULL_GRID))
        self.assertEqual(tried[0], ())
        json.dumps(tried)


if __name__ == "__main__":
    unittest.main()
