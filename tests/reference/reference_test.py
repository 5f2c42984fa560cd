#!/usr/bin/env python3
"""Tests check_replay's own arithmetic against brute-force loops, and that it notices corruption.

Run: python3 tests/reference/reference_test.py (needs numpy).
"""

import contextlib
import io
import json
import math
import os
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import check_replay  # noqa: E402
import make_trace  # noqa: E402

SINKS, MIN_WINDOW, SEGMENT, BUDGETS = 4, 8, 16, [24, 48, 1000]
PRESET = {"sink_tokens": SINKS, "min_window": MIN_WINDOW, "decode_segment_tokens": SEGMENT,
          "estimate": False, "quest_group": "softmax"}


def slow_softmax(values):
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_group(rows, group):
    """Shared scores of the items from one KV head's rows, one list of scores per query head."""
    if group == "softmax":
        soft = [slow_softmax(row) for row in rows]
        return [sum(row[i] for row in soft) for i in range(len(rows[0]))]
    if group == "mean":
        return [sum(row[i] for row in rows) / len(rows) for i in range(len(rows[0]))]
    return [max(row[i] for row in rows) for i in range(len(rows[0]))]


def slow_choice(layer, trace, t, cut, method, group, budget, kv_head):
    """Chosen positions of one KV head, straight from the contract's table."""
    candidates = list(range(SINKS, cut))
    count = min(budget, len(candidates))
    if count == 0:
        return []
    per_group = layer.q.shape[1] // layer.k.shape[1]
    queries = [layer.q[t, kv_head * per_group + g] for g in range(per_group)]
    if method == "window":
        return candidates[-count:]
    if method == "oracle":
        rows = [[float(q @ layer.k[p, kv_head]) * trace.scale for p in candidates] for q in queries]
        shared = slow_group(rows, "softmax")
        order = sorted(range(len(candidates)), key=lambda i: -shared[i])
        return [candidates[i] for i in order[:count]]
    pages = [candidates[i : i + 16] for i in range(0, len(candidates), 16)]
    rows = []
    for q in queries:
        row = []
        for page in pages:
            total = 0.0
            for c in range(len(q)):
                channel = [layer.k[p, kv_head, c] for p in page]
                total += max(q[c] * min(channel), q[c] * max(channel))
            row.append(total * trace.scale)
        rows.append(row)
    shared = slow_group(rows, group)
    order = sorted(range(len(pages)), key=lambda i: -shared[i])
    return [p for i in order for p in pages[i]][:count]


def slow_measures(layer, trace, t, cut, chosen_by_head):
    """(recall, output_error, mass) of one step, means over query heads, by loops."""
    position = trace.prompt_tokens + t
    per_group = layer.q.shape[1] // layer.k.shape[1]
    sums = [0.0, 0.0, 0.0]
    for h in range(layer.q.shape[1]):
        kv_head, chosen = h // per_group, set(chosen_by_head[h // per_group])
        dots = [float(layer.q[t, h] @ layer.k[p, kv_head]) for p in range(position + 1)]
        weights = slow_softmax([dot * trace.scale for dot in dots])
        exact = sum(weights[p] * layer.v[p, kv_head] for p in range(position + 1))
        attended = [p for p in range(position + 1) if p < SINKS or p >= cut or p in chosen]
        mass = sum(weights[p] for p in attended)
        output = sum(weights[p] * layer.v[p, kv_head] for p in attended) / mass
        own = sorted(range(SINKS, cut), key=lambda p: -dots[p])[: len(chosen)]
        sums[0] += len(chosen & set(own)) / len(chosen) if chosen else 1.0
        sums[1] += np.linalg.norm(output - exact) / np.linalg.norm(exact)
        sums[2] += mass
    return np.array(sums) / layer.q.shape[1]


def make(path, **changes):
    """A small trace at `path`, as check_replay reads it."""
    arguments = {"seed": 3, "tokens": 120, "decode-tokens": 40, "layers": "2,5", "kv-heads": 2,
                 "q-heads": 6, "head-dim": 8, "topics": 5, "dtype": "F32", **changes}
    make_trace.main([path] + [f"--{key}={value}" for key, value in arguments.items()])
    return check_replay.read_trace(path)


class Selection(unittest.TestCase):
    def test_cut_moves_by_segments_and_leaves_the_window(self):
        cuts = check_replay.cut_schedule(100, 60, SINKS, MIN_WINDOW, SEGMENT)
        self.assertEqual(cuts[0], 92)
        for t, cut in enumerate(cuts):
            self.assertEqual((cut - 92) % SEGMENT, 0)
            self.assertTrue(MIN_WINDOW <= 100 + t - cut < MIN_WINDOW + SEGMENT)
        self.assertEqual(cuts.index(92 + SEGMENT), SEGMENT)

    def test_cut_never_falls_below_the_sinks(self):
        self.assertEqual(check_replay.cut_schedule(10, 3, 16, 0, 320), [16, 16, 16])

    def test_quest_scores_agree_with_their_definition(self):
        rng = np.random.default_rng(0)
        keys, q = rng.standard_normal((37, 2, 5)), rng.standard_normal((2, 3, 5))
        got = check_replay.Pages(keys).scores(q)
        self.assertEqual(got.shape, (2, 3, 3))
        for h, g, page in np.ndindex(got.shape):
            part = keys[16 * page : 16 * page + 16, h]
            expected = sum(max(q[h, g, c] * part[:, c].min(), q[h, g, c] * part[:, c].max())
                           for c in range(5))
            self.assertAlmostEqual(got[h, g, page], expected, places=12)

    def test_groups_agree_with_their_definition(self):
        scores = np.random.default_rng(1).standard_normal((2, 3, 7)) * 4
        for group in check_replay.QUEST_GROUPS:
            got = check_replay.combine(scores, group)
            for h in range(2):
                np.testing.assert_allclose(got[h], slow_group(scores[h].tolist(), group))

    def test_page_tokens_cut_the_last_page_and_skip_what_is_no_candidate(self):
        got = check_replay.page_tokens(np.array([[2, 0, 1]]), candidates=35, count=10)
        self.assertEqual(got.tolist(), [[32, 33, 34, 0, 1, 2, 3, 4, 5, 6]])

    def test_top_takes_the_largest(self):
        scores = np.array([[1.0, 5, 3, 4], [9, 2, 8, 1]])
        self.assertEqual([set(row) for row in check_replay.top(scores, 2)], [{1, 3}, {0, 2}])
        self.assertEqual(check_replay.top(scores, 4).shape, (2, 4))

    def test_selection_problems_are_named(self):
        problem = check_replay.selection_problem
        self.assertEqual(problem(np.array([5, 4, -1]), 2, 4, 9), "")
        self.assertIn("twice", problem(np.array([5, 5, -1]), 2, 4, 9))
        self.assertIn("outside", problem(np.array([5, 9, -1]), 2, 4, 9))
        self.assertIn("outside", problem(np.array([3, 5, -1]), 2, 4, 9))
        self.assertIn("fewer", problem(np.array([5, -1, -1]), 2, 4, 9))
        self.assertIn("beyond", problem(np.array([5, 6, 7]), 2, 4, 9))


class Measures(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.trace = make(os.path.join(directory.name, "trace"))

    def test_recomputed_figures_agree_with_loops(self):
        steps = 20
        found, tokens = check_replay.recompute(
            self.trace, PRESET, steps, list(check_replay.BASELINES), BUDGETS)
        cuts = check_replay.cut_schedule(80, steps, SINKS, MIN_WINDOW, SEGMENT)
        self.assertGreater(len(set(cuts)), 1)
        self.assertAlmostEqual(tokens[0], sum(81 + t - cut for t, cut in enumerate(cuts)) / steps)
        self.assertAlmostEqual(tokens[1], sum(cut - SINKS for cut in cuts) / steps)
        for (method, budget), by_layer in found.items():
            name, group = method if isinstance(method, tuple) else (method, None)
            for index, got in by_layer.items():
                layer, total = self.trace.layers[index], 0
                for t, cut in enumerate(cuts):
                    chosen = [slow_choice(layer, self.trace, t, cut, name, group, budget, h)
                              for h in range(2)]
                    total = total + slow_measures(layer, self.trace, t, cut, chosen)
                np.testing.assert_allclose(got, total / steps, rtol=1e-9, atol=1e-12,
                                           err_msg=f"{method} {budget} {index}")

    def test_everything_chosen_is_exact(self):
        found, _ = check_replay.recompute(self.trace, PRESET, 5, ["oracle"], [1000])
        for recall, error, mass in found["oracle", 1000].values():
            self.assertEqual(recall, 1)
            self.assertLess(error, 1e-12)
            self.assertAlmostEqual(mass, 1)

    def test_no_candidates_give_recall_one(self):
        preset = {**PRESET, "sink_tokens": 200}
        methods = list(check_replay.BASELINES)
        found, tokens = check_replay.recompute(self.trace, preset, 5, methods, [16])
        for by_layer in found.values():
            for recall, error, mass in by_layer.values():
                self.assertEqual((recall, error), (1, 0))
                self.assertAlmostEqual(mass, 1)
        self.assertEqual(tokens[1], 0)

    def test_narrow_dtypes_are_read(self):
        for dtype, bound in (("F16", 1e-3), ("BF16", 8e-3)):
            with tempfile.TemporaryDirectory() as directory:
                narrow = make(os.path.join(directory, "trace"), dtype=dtype)
            for index, layer in narrow.layers.items():
                wide = self.trace.layers[index]
                self.assertLess(np.abs(layer.k - wide.k).max(), bound * np.abs(wide.k).max())


class Report(unittest.TestCase):
    """A report and a dump made from the script's own figures pass; each corruption fails."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.paths = {name: os.path.join(directory.name, name)
                      for name in ("trace", "json", "dump")}
        self.trace = make(self.paths["trace"])
        self.report, self.dump = self.build(steps=12)

    def build(self, steps):
        found, tokens = check_replay.recompute(
            self.trace, PRESET, steps, list(check_replay.BASELINES), BUDGETS)
        best, _ = check_replay.choose_quest_group(found, BUDGETS)
        budget, dump = BUDGETS[0], {}
        for index, layer in self.trace.layers.items():
            dump[f"layers.{index}.o"] = np.zeros((steps, 6, 8), np.float32)
            dump[f"layers.{index}.selected"] = np.full((steps, 2, budget), -1, np.int32)

        def choose(index, t, step):
            chosen = np.stack([np.random.default_rng(t).permutation(step.candidates)[:budget]] * 2)
            dump[f"layers.{index}.selected"][t, :, : chosen.shape[1]] = chosen + SINKS
            dump[f"layers.{index}.o"][t] = step.attended(chosen)[0].reshape(6, 8)
            key = ("clusterkv", budget)
            sums = found.setdefault(key, {})
            sums[index] = sums.get(index, 0) + step.measure(chosen) / steps

        check_replay.recompute(self.trace, PRESET, steps, [], BUDGETS, choose)
        rows = []
        for (method, row_budget), by_layer in found.items():
            if isinstance(method, tuple):
                if method[1] != best:
                    continue
                method = "quest"
            by_layer["all"] = np.mean(list(by_layer.values()), axis=0)
            for layer, (recall, error, mass) in by_layer.items():
                rows.append({"method": method, "budget": row_budget, "layer": layer,
                             "recall": recall, "output_error": error, "mass": mass,
                             "hit_rate": None, "host_bytes_per_step": None,
                             "window_tokens_mean": tokens[0], "candidate_tokens_mean": tokens[1]})
        return {"preset": {**PRESET, "quest_group": best}, "results": rows}, dump

    def run_check(self, *arguments):
        """(exit code, what was printed) for the report and the dump as they are now."""
        with open(self.paths["json"], "w", encoding="utf-8") as out:
            json.dump(self.report, out)
        make_trace.write_safetensors(self.paths["dump"], self.dump, {}, "F32")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = check_replay.main([self.paths["trace"], self.paths["json"], "--outputs",
                                      self.paths["dump"], "--steps", "12", *arguments])
        return code, printed.getvalue()

    def row(self, method, layer="all"):
        return next(row for row in self.report["results"]
                    if row["method"] == method and row["layer"] == layer)

    def test_a_true_report_passes(self):
        code, printed = self.run_check()
        self.assertEqual(code, 0, printed)
        self.assertIn("clusterkv dumped outputs", printed)

    def test_a_wrong_figure_fails(self):
        for method in ("clusterkv", "quest", "window", "oracle"):
            for name in ("recall", "output_error", "mass", "window_tokens_mean"):
                for layer in ("all", 5):
                    row = self.row(method, layer)
                    kept, row[name] = row[name], row[name] + 0.011
                    code, printed = self.run_check()
                    self.assertEqual(code, 1, printed)
                    self.assertIn(f"FAILED {method} {name}", printed)
                    row[name] = kept

    def test_a_missing_row_or_figure_fails(self):
        self.row("oracle")["recall"] = None
        self.assertEqual(self.run_check()[0], 1)
        self.report["results"].remove(self.row("oracle"))
        self.assertEqual(self.run_check()[0], 1)

    def test_a_wrong_quest_group_fails(self):
        best = self.report["preset"]["quest_group"]
        for group in [g for g in (*check_replay.QUEST_GROUPS, None) if g != best]:
            self.report["preset"]["quest_group"] = group
            code, printed = self.run_check()
            self.assertEqual(code, 1, printed)
            self.assertIn("quest_group", printed)

    def test_a_wrong_output_fails(self):
        self.dump["layers.5.o"][3, 2] *= 1.01
        code, printed = self.run_check()
        self.assertEqual(code, 1, printed)
        self.assertIn("layer 5, step 3, query head 2", printed)

    def test_an_output_that_is_not_a_number_fails(self):
        self.dump["layers.5.o"][3, 2, 1] = np.nan
        self.assertEqual(self.run_check()[0], 1)

    def test_a_wrong_selection_fails(self):
        for value in (-1, SINKS - 1, 110, None):
            selected = self.dump["layers.2.selected"][7, 1]
            kept, selected[0] = selected[0], selected[1] if value is None else value
            code, printed = self.run_check()
            self.assertEqual(code, 1, printed)
            self.assertIn("layer 2, step 7, KV head 1", printed)
            selected[0] = kept

    def test_an_estimate_cannot_be_recomputed(self):
        self.report["preset"]["estimate"] = True
        code, printed = self.run_check()
        self.assertEqual(code, 1)
        self.assertIn("estimate", printed)

    def test_bad_files_are_named(self):
        self.assertEqual(self.run_check("--steps", "13")[0], 5)  # the dump has 12
        self.assertEqual(self.run_check("--steps", "41")[0], 5)
        self.dump["layers.5.o"] = self.dump["layers.5.o"][:5]
        self.assertEqual(self.run_check()[0], 5)
        with open(self.paths["trace"], "wb") as out:
            out.write(b"\xff" * 20)
        self.assertEqual(self.run_check()[0], 5)


if __name__ == "__main__":
    unittest.main()
