#!/usr/bin/env python3
"""Tests cache_simulation.py by hand-made and random selections, and cache_policies.py with a
program that stands in for clusterkv-replay and has a cache of its own."""

import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import stat
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import cache_policies  # noqa: E402
import cache_scores  # noqa: E402
import cache_simulation as cache  # noqa: E402
from check_replay import Layer  # noqa: E402

ALL = (cache.Belady, *cache_policies.OTHERS.values())

# Clusters of 2 to 4 tokens, the later positions first, two of which come later. Scores, rankings
# and the cache are computed anew here, and know nothing of the simulation.
STAND_IN = f"""#!{sys.executable}
import json, math, os, sys
import numpy as np

def value(name):
    return sys.argv[sys.argv.index(name) + 1]

budget, cache = int(value("--budgets")), int(value("--cache-tokens"))
sizes = [2, 3, 4, 2, 3, 4, 2, 3]
begins = [15, 12, 8, 6, 3, 17, 21, 0]
cache = cache or 10**9
trace = open(sys.argv[1], "rb").read()
length = int.from_bytes(trace[:8], "little")
entries = json.loads(trace[8 : 8 + length])

def tensor(name):
    begin, end = entries[name]["data_offsets"]
    raw = trace[8 + length + begin : 8 + length + end]
    return np.frombuffer(raw, "<f4").reshape(entries[name]["shape"])

rows, tensors, data = [], {{}}, b""
for layer in (3, 9):
    keys, queries = tensor(f"layers.{{layer}}.k")[:, 0], tensor(f"layers.{{layer}}.q")
    selected = np.full((40, 1, budget), -1, "<i4")
    mean, held, hits, chosen, read = [0.0] * 8, set(), 0, 0, 0
    for step in range(40):
        count = 8 if step >= 10 else 6
        scores = [0.0] * count
        for query in queries[step]:
            powers = [math.exp(query @ keys[b : b + s].mean(axis=0)) for b, s in
                      zip(begins[:count], sizes)]
            scores = [score + power / sum(powers) for score, power in zip(scores, powers)]
        order = sorted(range(count), key=lambda c: -scores[c])
        taken, used = [], []
        for c in order:
            if len(taken) < budget:
                used.append(c)
                taken += range(begins[c], begins[c] + sizes[c])
        selected[step, 0, : len(taken[:budget])] = taken[:budget]
        for c in range(count):
            mean[c] = 0.8 * mean[c] + 0.2 * scores[c]
        for c in used:
            chosen += 1
            hits += c in held
            read += 0 if c in held else sizes[c]
        held |= set(used)
        while sum(sizes[c] for c in held) > cache:
            held.remove(min(held - set(used), key=lambda c: mean[c] / sizes[c] ** 0.5))
    hit_rate = hits / chosen + float(os.environ.get("STAND_IN_ERROR", 0))
    rows.append({{"method": "clusterkv", "budget": budget, "layer": layer, "hit_rate": hit_rate,
                 "host_bytes_per_step": read * 16 / 40}})
    raw = selected.tobytes()
    tensors[f"layers.{{layer}}.selected"] = {{"dtype": "I32", "shape": list(selected.shape),
                                           "data_offsets": [len(data), len(data) + len(raw)]}}
    data += raw
rows.append({{"method": "clusterkv", "budget": budget, "layer": "all",
             "hit_rate": (rows[0]["hit_rate"] + rows[1]["hit_rate"]) / 2,
             "host_bytes_per_step": sum(row["host_bytes_per_step"] for row in rows)}})
header = json.dumps(tensors).encode()
with open(value("--dump-outputs"), "wb") as out:
    out.write(len(header).to_bytes(8, "little") + header + data)
preset = {{"name": value("--preset"), "tokens_per_cluster": 1,
          "group": os.environ.get("STAND_IN_GROUP", "softmax")}}
print(json.dumps({{"preset": preset, "results": rows}}))
"""


def write_trace(path):
    """Two layers, one KV head, two query heads of two elements."""
    random = np.random.default_rng(4)
    tensors, data = {}, b""
    for layer in (3, 9):
        for name, shape in (("k", (60, 1, 2)), ("v", (60, 1, 2)), ("q", (40, 2, 2))):
            raw = random.normal(0.0, 1.5, shape).astype("<f4").tobytes()
            tensors[f"layers.{layer}.{name}"] = {"dtype": "F32", "shape": shape,
                                                 "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    metadata = {"format": "clusterkv-trace/1", "layers": "3,9", "prompt_tokens": "20",
                "decode_tokens": "40", "softmax_scale": "1"}
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    with open(path, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header + data)


def random_head(seed, clusters=9, steps=30, sizes=(1, 2, 3, 5)):
    random = np.random.default_rng(seed)
    favour = random.random(clusters)
    rankings = [np.argsort(favour + random.random(clusters)).tolist() for _ in range(steps)]
    return head_of([int(random.choice(sizes)) for _ in range(clusters)], rankings)


def head_of(sizes, rankings):
    """A Head whose scores fall by half from rank to rank."""
    scores = np.zeros((len(rankings), len(sizes)), np.float32)
    for row, ranking in zip(scores, rankings):
        row[ranking] = 0.5 ** np.arange(len(ranking))
    return cache.Head(sizes, rankings, scores=scores)


def hits_of(sizes, selections, capacity, policy, bypass=False):
    outcome = cache.simulate(head_of(sizes, selections), selections, capacity, policy, bypass)
    return outcome.hits.tolist()


def most_hits(selections, capacity):
    """By trying everything: clusters of one token, any of them may be evicted after any step."""
    best = {frozenset(): 0}
    for selected in selections:
        after = {}
        for kept, hits in best.items():
            pool, found = kept | set(selected), hits + len(kept & set(selected))
            for chosen in itertools.combinations(sorted(pool), min(capacity, len(pool))):
                key = frozenset(chosen)
                after[key] = max(after.get(key, 0), found)
        best = after
    return max(best.values())


class RecoverTest(unittest.TestCase):
    def test_finds_clusters_and_rankings(self):
        # {0, 2, 5}, {1, 4}, {3}; from the second step on also {6, 7}.
        head = cache.recover(np.array([[0, 2, 5, 3, 1, 4, -1, -1], [6, 7, 1, 4, 0, 2, 5, 3],
                                       [3, 6, 7, 0, 2, 5, 1, 4]]),
                             np.array([1, 4, 0, 2, 5, 3, 6, 7]))
        self.assertEqual(head.positions, [[1, 4], [0, 2, 5], [3], [6, 7]])
        self.assertEqual(head.sizes, [2, 3, 1, 2])
        self.assertEqual(head.rankings, [[1, 2, 0], [3, 0, 1, 2], [2, 3, 1, 0]])

    def test_keeps_what_came_later_apart(self):
        head = cache.recover(np.array([[0, 1, -1, -1], [0, 1, 2, 3]]), np.arange(4))
        self.assertEqual(head.positions, [[0, 1], [2, 3]])
        head = cache.recover(np.array([[1, -1], [0, 1]]), np.array([1, 0]))
        self.assertEqual(head.positions, [[1], [0]])

    def test_refuses_a_dump_that_is_no_ranking(self):
        for positions in ([[0, 1], [1, 2]], [[0, 1, -1], [0, 0, -1]], [[0, 1, -1], [0, -1, -1]]):
            with self.assertRaises(cache.RecoveryError):
                cache.recover(np.array(positions), np.arange(2))

    def test_refuses_numbers_that_are_of_other_clusters(self):
        positions = np.array([[0, 2, 1], [1, 0, 2]])
        self.assertEqual(cache.recover(positions, np.array([1, 0, 2])).positions, [[1], [0, 2]])
        for numbered in ([0, 1, 2], [0, 2], [2, 0, 1], [0, 2, 1, 3]):
            with self.assertRaises(cache.RecoveryError):
                cache.recover(positions, np.array(numbered))

    def test_undoes_a_random_ranking(self):
        random = np.random.default_rng(1)
        labels = random.integers(0, 12, 100)
        clusters = [np.flatnonzero(labels == label) for label in range(12)]
        rows = [np.concatenate([clusters[c] for c in random.permutation(12)]) for _ in range(20)]
        found = cache.recover(np.array(rows), np.concatenate(clusters)).positions
        self.assertEqual(found, [cluster.tolist() for cluster in clusters])

    def test_selects_the_shortest_prefix(self):
        head = cache.Head([3, 2, 1], [[0, 1, 2], [2, 1, 0]])
        self.assertEqual(cache.select(head, 3), [[0], [2, 1]])
        self.assertEqual(cache.select(head, 4), [[0, 1], [2, 1, 0]])
        self.assertEqual(cache.select(head, 9), [[0, 1, 2], [2, 1, 0]])


class ScoresTest(unittest.TestCase):
    def setUp(self):
        self.keys = np.array([[1, 0], [3, 0], [0, 2], [0, 4]], float)
        self.layer = Layer(self.keys[:, None], self.keys[:, None],
                           np.array([[[1, 0], [0, 0]], [[0, 1], [0, 0]]], float))

    def scores(self, rankings, group="softmax"):
        head = cache.Head([2, 2], rankings, [[0, 1], [2, 3]])
        return cache_scores.scores_of(self.layer, head, 0.5, 0, {"name": "p", "group": group},
                                      "F16")

    def test_are_the_shares_of_the_query_heads(self):
        # Centroids (2, 0) and (0, 3); the second query head finds all equal.
        found = self.scores([[0], [1, 0]])
        share = math.exp(1.5) / (1 + math.exp(1.5))
        np.testing.assert_allclose(found, [[2, 0], [1.5 - share, 0.5 + share]], rtol=1e-6)
        self.assertEqual(found.dtype, np.float32)

    def test_centroids_are_rounded_as_they_are_stored(self):
        keys = np.array([[1.0], [1.0 + 2.0**-8]])
        for dtype, expected in (("F32", 1 + 2.0**-9), ("F16", 1 + 2.0**-9), ("BF16", 1.0)):
            self.assertEqual(cache_scores.centroid(keys, dtype), [expected])

    def test_refuses_what_they_do_not_explain(self):
        for rankings, group in (([[0], [0, 1]], "softmax"), ([[0], [1, 0]], "max")):
            with self.assertRaises(cache_scores.ScoreError):
                self.scores(rankings, group)


class SimulateTest(unittest.TestCase):
    def test_lru_evicts_the_least_recently_used(self):
        outcome = cache.simulate(cache.Head([2, 2, 2], []), [[0], [1], [0], [2], [0], [1]], 4,
                                 cache.Lru)
        self.assertEqual(outcome.hits.tolist(), [0, 0, 1, 0, 1, 0])
        self.assertEqual(outcome.missed_tokens.tolist(), [2, 2, 0, 2, 0, 2])
        self.assertEqual(outcome.held_tokens.tolist(), [2, 4, 4, 4, 4, 4])

    def test_ties_go_to_the_lower_number(self):
        self.assertEqual(hits_of([1, 1, 1], [[0, 1], [2], [1], [0]], 2, cache.Lru), [0, 0, 1, 0])

    def test_a_step_evicts_nothing_of_its_own(self):
        # 0 and 1 would otherwise be older than 2, which is selected last.
        self.assertEqual(hits_of([1] * 4, [[0, 1], [0, 1, 2], [3], [2]], 3, cache.Lru),
                         [0, 2, 0, 1])

    def test_of_a_step_larger_than_the_cache_the_highest_scores_stay(self):
        for policy in ALL:
            self.assertEqual(hits_of([2, 2, 2], [[1, 2, 0], [0], [1], [1, 2, 0]], 4, policy)[0:2],
                             [0, 0], policy.__name__)
        self.assertEqual(hits_of([2, 2, 2], [[1, 2, 0], [2]], 4, cache.Lru), [0, 1])

    def test_nothing_holds_more_than_its_capacity(self):
        for seed, policy, bypass in itertools.product(range(5), ALL, (False, True)):
            head = random_head(seed)
            for capacity in (2, 5, 9, 14):
                outcome = cache.simulate(head, cache.select(head, 6), capacity, policy, bypass)
                self.assertLessEqual(outcome.held_tokens.max(), capacity, policy.__name__)

    def test_with_room_for_all_only_the_first_use_misses(self):
        head = random_head(3)
        selections = cache.select(head, 6)
        first = len(set(itertools.chain(*selections)))
        for policy in ALL:
            outcome = cache.simulate(head, selections, sum(head.sizes), policy)
            self.assertEqual(outcome.selected.sum() - outcome.hits.sum(), first, policy.__name__)

    def test_belady_is_optimal_for_one_size(self):
        for seed in range(12):
            head = random_head(seed, clusters=6, steps=12, sizes=(1,))
            selections = [ranking[: 1 + seed % 3] for ranking in head.rankings]
            for capacity in (1, 2, 3, 4):
                found = sum(hits_of(head.sizes, selections, capacity, cache.Belady, bypass=True))
                self.assertEqual(found, most_hits(selections, capacity), (seed, capacity))

    def test_no_policy_exceeds_the_bound(self):
        for seed, policy, bypass in itertools.product(range(5), ALL, (False, True)):
            head = random_head(seed)
            selections = cache.select(head, 6)
            for capacity in (3, 8, 14):
                found = cache.simulate(head, selections, capacity, policy, bypass).hits.sum()
                self.assertLessEqual(found, cache.upper_bound(head, selections, capacity),
                                     policy.__name__)

    def test_policies_keep_what_they_promise(self):
        # 0 is used twice early on, 1 and 2 later once each; then one must go for 3.
        selections = [[0], [0], [1], [2], [3], [0], [1]]
        self.assertEqual(hits_of([1] * 4, selections, 3, cache.Lru)[-2:], [0, 0])
        for policy in (cache.Lru2, cache.AgedFrequency, cache.SegmentedLru, cache.GreedyDual):
            self.assertEqual(hits_of([1] * 4, selections, 3, policy)[-2], 1, policy.__name__)
        # The largest goes first.
        self.assertEqual(hits_of([1, 9, 1, 9], [[0], [1], [2], [3], [0]], 11, cache.GreedyDual)[-1],
                         1)
        # What scores well under every query stays, though it was selected longest ago.
        head = head_of([1] * 4, [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2],
                                 [0, 1, 2, 3]])
        selections = [ranking[:1] for ranking in head.rankings]
        for policy, last in ((cache.Lru, 0), (cache.MeanScore, 1)):
            self.assertEqual(cache.simulate(head, selections, 3, policy).hits[-1], last)

    def test_mean_scores_are_a_fifth_of_each_step(self):
        selections = [[0], [1], [2], [0]]
        rankings = [[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 1, 2]]
        policy = cache.MeanScore(head_of([1, 1, 4], rankings), selections, 2)
        for step in range(3):
            policy.uses(step, set())
        for cluster, scores in enumerate(((1, 0.25, 0.25), (0.5, 1, 0.5), (0.25, 0.5, 1))):
            mean = 0.2 * (0.64 * scores[0] + 0.8 * scores[1] + scores[2])
            self.assertAlmostEqual(policy.value(cluster), mean, places=6)
        for by, worth in ((cache.MeanScoreByRoot, 2), (cache.MeanScoreBySize, 4)):
            divided = by(head_of([1, 1, 4], rankings), selections, 2)
            for step in range(3):
                divided.uses(step, set())
            self.assertAlmostEqual(divided.value(2) * worth, policy.value(2), places=6)

    def test_s3_fifo_readmits_a_ghost_to_the_main_queue(self):
        policy = cache.S3Fifo(cache.Head([1] * 12, []), [[0], list(range(1, 11)), [0]], 10)
        policy.uses(0, set())
        policy.uses(1, set())
        self.assertEqual(next(policy.victims(frozenset(range(11)))), 0)
        policy.uses(2, set())
        self.assertEqual(list(policy.main), [0])

    def test_keeps_what_the_last_steps_selected(self):
        head, selections = cache.Head([2, 3, 4], []), [[0, 1], [1, 2], [0], [1]]
        one, two = (cache.keep_last(head, selections, steps) for steps in (1, 2))
        self.assertEqual(one.hits.tolist(), [0, 1, 0, 0])
        self.assertEqual(two.hits.tolist(), [0, 1, 1, 1])
        self.assertEqual(one.held_tokens.tolist(), [5, 7, 2, 3])
        self.assertEqual(two.held_tokens.tolist(), [5, 9, 9, 5])
        self.assertEqual(two.missed_tokens.tolist(), [5, 4, 0, 0])


class StudyTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = lambda name: os.path.join(folder.name, name)
        with open(self.path("replay"), "w", encoding="utf-8") as out:
            out.write(STAND_IN)
        os.chmod(self.path("replay"), stat.S_IRWXU)
        write_trace(self.path("trace"))

    def run_study(self, *more, trace="trace"):
        arguments = [self.path(trace), "--replay", self.path("replay"), "--presets", "p",
                     "--budgets", "5", "--sizes", "1,2,3,least", "--output", self.path("out.md"),
                     *more]
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cache_policies.main(arguments)
        return code, errors.getvalue()

    def test_agrees_with_the_program(self):
        code, errors = self.run_study("--tolerance", "1e-12")
        self.assertEqual(code, 0, errors)
        with open(self.path("out.md"), encoding="utf-8") as out:
            tables = out.read()
        self.assertIn("2 sizes were replayed", tables)
        rows = [line for line in tables.split("\n") if line.startswith("| 5 | ")]
        self.assertEqual([row.split("|")[2].strip() for row in rows],
                         ["1 ×", "2 ×", "2.8 × (least)", "3 ×"])
        self.assertEqual([row.split("|")[5].strip() == "-" for row in rows],
                         [True, True, False, False])

    def test_is_repeatable(self):
        texts = []
        for _ in range(2):
            self.run_study()
            with open(self.path("out.md"), encoding="utf-8") as out:
                texts.append(out.read())
        self.assertEqual(*texts)

    def test_reports_another_group_rule(self):
        os.environ["STAND_IN_GROUP"] = "max"
        self.addCleanup(os.environ.pop, "STAND_IN_GROUP")
        code, errors = self.run_study()
        self.assertEqual(code, 1)
        self.assertIn("group is max", errors)

    def test_reports_a_product_that_differs(self):
        os.environ["STAND_IN_ERROR"] = "0.01"
        self.addCleanup(os.environ.pop, "STAND_IN_ERROR")
        code, errors = self.run_study()
        self.assertEqual(code, 1)
        self.assertIn("the product's hit rate is", errors)

    def test_reports_a_failed_replay_and_a_bad_trace(self):
        with open(self.path("replay"), "w", encoding="utf-8") as out:
            out.write(f"#!{sys.executable}\nraise SystemExit('no such thing')\n")
        code, errors = self.run_study()
        self.assertEqual(code, 1)
        self.assertIn("no such thing", errors)
        self.assertEqual(self.run_study(trace="replay")[0], 5)

    def test_refuses_a_size_that_is_none(self):
        for size in ("0", "most", "-1", "inf", "nan"):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                cache_policies.parse_arguments(["t", f"--sizes={size}"])


if __name__ == "__main__":
    unittest.main()
