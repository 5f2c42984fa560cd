#!/usr/bin/env python3
"""Tests cache_simulation.py by hand-made and random selections, and cache_policies.py with a
program that stands in for clusterkv-replay and has a cache of its own."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import stat
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import cache_policies  # noqa: E402
import cache_simulation as cache  # noqa: E402

ALL = (cache.Lru, cache.Belady, *cache_policies.OTHERS.values())

# Clusters of 2 to 4 tokens, the later positions first; at every step a random ranking that favours
# some, or by number if the trace ends in zeros. Its LRU counts steps since the last use, and knows
# nothing of the simulation.
STAND_IN = f"""#!{sys.executable}
import json, os, random, sys
import numpy as np

def value(name):
    return sys.argv[sys.argv.index(name) + 1]

budget, cache = int(value("--budgets")), int(value("--cache-tokens"))
sizes = [2, 3, 4, 2, 3, 4, 2, 3]
begins = [15, 12, 8, 6, 3, 17, 21, 0]
cache = cache or 10**9
blind = not any(open(sys.argv[1], "rb").read()[-8:])
rows, tensors, data = [], {{}}, b""
for layer in (3, 9):
    draw = random.Random(layer)
    selected = np.full((40, 1, budget), -1, "<i4")
    age, hits, chosen, read = {{}}, 0, 0, 0
    for step in range(40):
        count = 8 if step >= 10 else 6  # two clusters come later
        order = sorted(range(count), key=lambda c: draw.random() * (1 + c % 3))
        if blind:
            order.sort()
        taken, used = [], []
        for c in order:
            if len(taken) < budget:
                used.append(c)
                taken += range(begins[c], begins[c] + sizes[c])
        selected[step, 0, : len(taken[:budget])] = taken[:budget]
        age = {{c: a + 1 for c, a in age.items()}}
        for c in used:
            chosen += 1
            hits += c in age
            read += 0 if c in age else sizes[c]
            age[c] = 0
        while sum(sizes[c] for c in age) > cache:
            del age[max((c for c in age if c not in used), key=lambda c: (age[c], -c))]
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
preset = {{"name": value("--preset"), "tokens_per_cluster": 1}}
print(json.dumps({{"preset": preset, "results": rows}}))
"""


def random_head(seed, clusters=9, steps=30, sizes=(1, 2, 3, 5)):
    random = np.random.default_rng(seed)
    favour = random.random(clusters)
    rankings = [np.argsort(favour + random.random(clusters)).tolist() for _ in range(steps)]
    return cache.Head([int(random.choice(sizes)) for _ in range(clusters)], rankings)


def hits_of(sizes, selections, capacity, policy, bypass=False):
    outcome = cache.simulate(cache.Head(sizes, selections), selections, capacity, policy, bypass)
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
        head = cache.Head([1] * 4, [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2],
                                    [0, 1, 2, 3]])
        selections = [ranking[:1] for ranking in head.rankings]
        for policy, last in ((cache.Lru, 0), (cache.MeanScore, 1)):
            self.assertEqual(cache.simulate(head, selections, 3, policy).hits[-1], last)

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
        header = {"__metadata__": {"prompt_tokens": "20", "decode_tokens": "40"},
                  "layers.3.k": {"dtype": "F32", "shape": [60, 1, 2], "data_offsets": [0, 480]},
                  "layers.3.q": {"dtype": "F32", "shape": [40, 1, 2], "data_offsets": [480, 800]}}
        text = json.dumps(header).encode()
        with open(self.path("trace"), "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text + b"x" * 800)

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
