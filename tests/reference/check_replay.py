#!/usr/bin/env python3
"""Recomputes what clusterkv-replay reports, in float64, from the trace and the contract alone.

    check_replay.py TRACE REPLAY.json [--outputs DUMP.safetensors] [--steps N]

Shares nothing with the program under test. For the methods `quest`, `window` and `oracle` it makes
the selection itself and compares recall, output_error, mass, window_tokens_mean and
candidate_tokens_mean of every row, and quest_group. With --outputs it checks clusterkv's dumped
selection and outputs (the first budget) and recomputes clusterkv's row from the selection; the
dump is of one sequence, so that row is comparable for a replay of one sequence (the default).
Needs numpy.

Exit codes: 0 ok, 1 a check failed, 2 usage, 5 bad input file.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass

# The products here are small: BLAS threads would cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

PAGE_TOKENS = 16
QUEST_GROUPS = ("softmax", "mean", "max")
BASELINES = ("quest", "window", "oracle")
MEASURES = ("recall", "output_error", "mass")


class InputError(Exception):
    """A file that cannot be used; the message says which and why."""


# --- Files.


def read_safetensors(path):
    """({name: float64 or int64 array}, metadata) of F64, F32, F16, BF16, I64 or I32 tensors."""
    try:
        with open(path, "rb") as source:
            data = source.read()
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise InputError(f"{path}: the header is cut off")
        header = json.loads(data[8 : 8 + length])
        metadata, arrays = header.pop("__metadata__", {}), {}
        for name, entry in header.items():
            arrays[name] = _decode(data[8 + length :], entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a safetensors file: {error!r}") from error
    return arrays, metadata


def _decode(data, entry):
    begin, end = entry["data_offsets"]
    raw, kind = data[begin:end], entry["dtype"]
    if kind == "BF16":
        flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        known = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
        flat = np.frombuffer(raw, known[kind])
    target = np.int64 if kind.startswith("I") else np.float64
    return flat.reshape(entry["shape"]).astype(target)


@dataclass(frozen=True)
class Layer:
    """One layer: k, v [tokens, kv_heads, d] and q [steps, q_heads, d], float64."""

    k: np.ndarray
    v: np.ndarray
    q: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A KV trace; `layers` {layer index: Layer} in ascending order."""

    layers: dict
    prompt_tokens: int
    steps: int
    scale: float


def read_trace(path):
    """Reads a `clusterkv-trace/1`. Raises InputError if it is not one."""
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != "clusterkv-trace/1":
        raise InputError(f"{path}: format is {metadata.get('format')!r}")
    try:
        prompt, steps = int(metadata["prompt_tokens"]), int(metadata["decode_tokens"])
        scale = float(metadata["softmax_scale"])
        indices = sorted(int(part) for part in metadata["layers"].split(","))
        layers = {i: Layer(*(arrays[f"layers.{i}.{part}"] for part in "kvq")) for i in indices}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: bad metadata or missing tensor: {error}") from error
    for i, layer in layers.items():
        tokens, kv_heads, dim = layer.k.shape
        q_steps, q_heads, q_dim = layer.q.shape
        if (tokens, q_steps, q_dim) != (prompt + steps, steps, dim) or q_heads % kv_heads:
            raise InputError(f"{path}: layer {i}: k {layer.k.shape}, q {layer.q.shape} do not fit")
        if layer.v.shape != layer.k.shape:
            raise InputError(f"{path}: layer {i}: v {layer.v.shape}, k {layer.k.shape}")
    return Trace(layers, prompt, steps, scale)


# --- Who may be selected.


def cut_schedule(prompt_tokens, steps, sinks, min_window, segment):
    """`cut` at the start of each step: a list of `steps` positions."""
    cut, cuts = max(sinks, prompt_tokens - min_window), []
    for t in range(steps):
        while prompt_tokens + t - cut >= min_window + segment:
            cut += segment
        cuts.append(cut)
    return cuts


def softmax(x):
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def combine(scores, group):
    """Shared score of each item: `scores` [kv_heads, group size, items] to [kv_heads, items]."""
    if group == "softmax":
        return softmax(scores).sum(axis=1)
    return scores.mean(axis=1) if group == "mean" else scores.max(axis=1)


def falling(scores):
    """Indices in falling order over the last axis; equal scores in rising index."""
    return np.argsort(-scores, axis=-1, kind="stable")


def top(scores, count):
    """Indices of the `count` largest along the last axis, in no order."""
    if count >= scores.shape[-1]:
        return np.broadcast_to(np.arange(scores.shape[-1]), scores.shape).copy()
    return np.argpartition(-scores, count - 1, axis=-1)[..., :count]


class Pages:
    """Quest's view of the candidates [first, cut): per page and channel min and max of the keys.

    Pages are of 16 consecutive candidates from `first` on; the last one may be shorter.
    """

    def __init__(self, keys):
        """`keys` [candidates, kv_heads, d]."""
        starts = np.arange(0, len(keys), PAGE_TOKENS)
        self.low = np.minimum.reduceat(keys, starts, axis=0).swapaxes(0, 1)  # [kv_heads, pages, d]
        self.high = np.maximum.reduceat(keys, starts, axis=0).swapaxes(0, 1)

    def scores(self, q):
        """Σ_c max(q_c·min_c, q_c·max_c) for q [kv_heads, group, d]: [kv_heads, group, pages].

        The larger product is with max where q_c > 0 and with min where q_c < 0.
        """
        return (np.maximum(q, 0) @ self.high.swapaxes(1, 2)
                + np.minimum(q, 0) @ self.low.swapaxes(1, 2))


def page_tokens(order, candidates, count):
    """The first `count` candidate indices of the pages in `order` [kv_heads, pages]."""
    tokens = (order[:, :, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(len(order), -1)
    return np.stack([row[row < candidates][:count] for row in tokens])


# --- Measures.


class Step:
    """One step of one layer: exact attention, and the measures of any selection.

    Shapes: q_heads are split as [kv_heads, group]; positions are 0..position.
    """

    def __init__(self, layer, prompt_tokens, t, scale, sinks, cut):
        self.sinks, self.cut, self.position = sinks, cut, prompt_tokens + t
        self.candidates = cut - sinks
        kv_heads, dim = layer.k.shape[1:]
        self.q = layer.q[t].reshape(kv_heads, -1, dim) * scale
        end = self.position + 1
        self._values = layer.v[:end].swapaxes(0, 1)  # [kv_heads, tokens, d]
        self.scores = self.q @ layer.k[:end].transpose(1, 2, 0)  # [kv_heads, group, tokens]
        self._weights = np.exp(self.scores - self.scores.max(axis=-1, keepdims=True))
        self._total = self._weights.sum(axis=-1)
        self.exact = self._weights @ self._values / self._total[..., None]
        self.candidate_scores = self.scores[..., sinks:cut]
        self._own_top = {}  # count: indices [kv_heads, group, count]
        self._always = np.r_[: min(sinks, end), cut:max(cut, end)]

    def attended(self, chosen):
        """(output [kv_heads, group, d], mass [kv_heads, group]) over sinks, chosen and window.

        `chosen`: candidate indices (0 is position `sinks`), int [kv_heads, n].
        """
        always = np.broadcast_to(self._always, (len(chosen), len(self._always)))
        positions = np.concatenate([always, chosen + self.sinks], axis=1)
        kept = np.take_along_axis(self._weights, positions[:, None, :], axis=2)
        values = np.take_along_axis(self._values, positions[:, :, None], axis=1)
        total = kept.sum(axis=-1)
        return kept @ values / total[..., None], total / self._total

    def recall(self, chosen):
        """|chosen ∩ own top n| / n of each query head, [kv_heads, group]; 1 where n = 0."""
        count = chosen.shape[1]
        if count == 0:
            return np.ones(self.q.shape[:2])
        mine = np.zeros((len(chosen), self.candidates), bool)
        np.put_along_axis(mine, chosen, True, axis=1)
        if count not in self._own_top:
            self._own_top[count] = top(self.candidate_scores, count)
        own = self._own_top[count]
        return np.stack([mine[h][own[h]].mean(axis=-1) for h in range(len(mine))])

    def measure(self, chosen):
        """[recall, output_error, mass], each the mean over query heads."""
        output, mass = self.attended(chosen)
        error = np.linalg.norm(output - self.exact, axis=-1) / np.linalg.norm(self.exact, axis=-1)
        return np.array([self.recall(chosen).mean(), error.mean(), mass.mean()])


def choices(step, pages, wanted, budgets):
    """Yields ((method, budget), candidate indices [kv_heads, n]) for every wanted baseline.

    Methods are named as in the report, Quest's three as ("quest", group).
    """
    kv_heads, candidates = len(step.q), step.candidates
    orders = {}
    if "quest" in wanted and candidates:
        scores = pages.scores(step.q)
        orders = {("quest", g): falling(combine(scores, g)) for g in QUEST_GROUPS}
    if "oracle" in wanted and candidates:
        orders["oracle"] = falling(combine(step.candidate_scores, "softmax"))
    for budget in budgets:
        count = min(budget, candidates)
        for group in QUEST_GROUPS if "quest" in wanted else ():
            name = ("quest", group)
            none = np.empty((kv_heads, 0), int)
            yield (name, budget), page_tokens(orders[name], candidates, count) if count else none
        if "oracle" in wanted:
            all_of_it = orders["oracle"] if count else np.empty((kv_heads, 0), int)
            yield ("oracle", budget), all_of_it[:, :count]
        if "window" in wanted:
            newest = np.arange(candidates - count, candidates)
            yield ("window", budget), np.tile(newest, (kv_heads, 1))


def recompute(trace, preset, steps, wanted, budgets, visit=None):
    """Means over steps and query heads: {(method, budget): {layer: [recall, error, mass]}}.

    Also returns (window_tokens_mean, candidate_tokens_mean). `visit(layer index, t, step)` sees
    every step.
    """
    sinks = preset["sink_tokens"]
    cuts = cut_schedule(trace.prompt_tokens, steps, sinks, preset["min_window"],
                        preset["decode_segment_tokens"])
    found = {}
    for index, layer in trace.layers.items():
        sums, pages, paged_cut = {}, None, None
        for t, cut in enumerate(cuts):
            step = Step(layer, trace.prompt_tokens, t, trace.scale, sinks, cut)
            if visit is not None:
                visit(index, t, step)
            if "quest" in wanted and cut != paged_cut and cut > sinks:
                pages, paged_cut = Pages(layer.k[sinks:cut]), cut
            for key, chosen in choices(step, pages, wanted, budgets):
                sums[key] = sums.get(key, 0) + step.measure(chosen)
        for key, total in sums.items():
            found.setdefault(key, {})[index] = total / steps
    window = np.mean([max(0, trace.prompt_tokens + t + 1 - cut) for t, cut in enumerate(cuts)])
    return found, (float(window), float(np.mean(cuts) - sinks))


def choose_quest_group(found, budgets):
    """The group with the lowest output_error over layers and budgets, and {group: that mean}."""
    errors = {}
    for group in QUEST_GROUPS:
        rows = [row for budget in budgets for row in found[("quest", group), budget].values()]
        errors[group] = float(np.mean([row[1] for row in rows]))
    return min(errors, key=errors.get), errors


# --- Comparison with the report.


class Verdict:
    """Collects comparisons and failures, and prints them."""

    def __init__(self, tolerance):
        self._tolerance, self._worst, self._counts = tolerance, {}, {}
        self.failures = []

    def compare(self, label, where, expected, reported, tolerance=None):
        """Compares one figure; `label` is the line of the table that it belongs to."""
        tolerance = self._tolerance if tolerance is None else tolerance
        if isinstance(reported, bool) or not isinstance(reported, (int, float)):
            self.failures.append(f"{label}: {where}: reported {reported!r}, not a number")
            return
        difference = abs(expected - reported)
        self._counts[label] = self._counts.get(label, 0) + 1
        self._worst[label] = max(self._worst.get(label, (0.0, "")), (difference, where))
        if not difference <= tolerance:
            self.failures.append(f"{label}: {where}: reported {reported:.6g}, expected "
                                 f"{expected:.6g}, off by {difference:.2g} (> {tolerance:g})")

    def show(self):
        print(f"{'compared':34} {'count':>7} {'worst':>10}  where")
        for label, count in self._counts.items():
            difference, where = self._worst[label]
            print(f"{label:34} {count:7} {difference:10.2e}  {where}")
        for failure in self.failures[:20]:
            print(f"FAILED {failure}")
        if len(self.failures) > 20:
            print(f"FAILED and {len(self.failures) - 20} more")
        print("ok" if not self.failures else f"{len(self.failures)} checks failed")


def layer_name(layer):
    """A row's layer as int, also where it is written as text; "all" as it is."""
    return int(layer) if isinstance(layer, str) and layer.isdigit() else layer


def compare_rows(verdict, rows, method, budget, by_layer, tokens):
    """Compares every row of one method and budget: each layer, and `all`, their mean."""
    expected = dict(by_layer)
    expected["all"] = np.mean(list(by_layer.values()), axis=0)
    reported = {layer_name(row.get("layer")): row for row in rows
                if row["method"] == method and row["budget"] == budget}
    if set(reported) != set(expected):
        verdict.failures.append(f"{method}: budget {budget}: rows for layers "
                                f"{sorted(map(str, reported))}, expected "
                                f"{sorted(map(str, expected))}")
    for layer in [layer for layer in expected if layer in reported]:
        where = f"budget {budget}, layer {layer}"
        for name, value in zip(MEASURES, expected[layer]):
            verdict.compare(f"{method} {name}", where, float(value), reported[layer].get(name))
        for name, value in zip(("window_tokens_mean", "candidate_tokens_mean"), tokens):
            verdict.compare(f"{method} {name}", where, value, reported[layer].get(name))


class DumpCheck:
    """Checks clusterkv's dump step by step, and gathers its measures."""

    def __init__(self, verdict, path, trace, steps, budget, tolerance):
        self._verdict, self._tolerance, self._budget = verdict, tolerance, budget
        self._steps, self.sums = steps, {}
        arrays, _ = read_safetensors(path)
        self._outputs, self._selected = {}, {}
        for index, layer in trace.layers.items():
            q_heads, dim = layer.q.shape[1:]
            for part, shape, kept in (
                    ("o", (steps, q_heads, dim), self._outputs),
                    ("selected", (steps, layer.k.shape[1], budget), self._selected)):
                name = f"layers.{index}.{part}"
                if name not in arrays or arrays[name].shape != shape:
                    got = arrays[name].shape if name in arrays else "nothing"
                    raise InputError(f"{path}: {name}: {got}, expected {shape} (--steps?)")
                kept[index] = arrays[name]

    def visit(self, index, t, step):
        """Checks the step's selection; where it is sound, also its outputs and measures."""
        where = f"layer {index}, step {t}"
        count = min(self._budget, step.candidates)
        rows = self._selected[index][t]
        for head, row in enumerate(rows):
            problem = selection_problem(row, count, step.sinks, step.cut)
            if problem:
                self._verdict.failures.append(f"selection: {where}, KV head {head}: {problem}")
        chosen = rows[:, :count] - step.sinks
        if chosen.size and (chosen.min() < 0 or chosen.max() >= step.candidates):
            return
        output, _ = step.attended(chosen)
        dumped = self._outputs[index][t].reshape(output.shape)
        errors = np.linalg.norm(dumped - output, axis=-1) / np.linalg.norm(output, axis=-1)
        for head, error in enumerate(errors.reshape(-1)):
            self._verdict.compare("clusterkv dumped outputs", f"{where}, query head {head}",
                                  0.0, float(error), self._tolerance)
        self.sums[index] = self.sums.get(index, 0) + step.measure(chosen)

    def measures(self):
        """{layer: [recall, output_error, mass]}, means over the steps."""
        return {index: total / self._steps for index, total in self.sums.items()}


def selection_problem(row, count, sinks, cut):
    """What is wrong with one KV head's selected positions `row` [budget]; "" if nothing."""
    chosen, rest = row[:count], row[count:]
    if (rest != -1).any():
        return f"more than min(budget, candidates) = {count} positions, or no -1 beyond them"
    if ((chosen < sinks) | (chosen >= cut)).any():
        bad = chosen[(chosen < sinks) | (chosen >= cut)][0]
        return f"position {bad} is outside [{sinks}, {cut}), or fewer than {count} positions"
    if len(np.unique(chosen)) != count:
        return "a position is there twice"
    return ""


def check(options):
    """Makes every comparison; returns the Verdict. Raises InputError."""
    trace = read_trace(options.trace)
    try:
        with open(options.replay, encoding="utf-8") as source:
            report = json.load(source)
        preset, rows = dict(report["preset"]), list(report["results"])
        budgets = list(dict.fromkeys(int(row["budget"]) for row in rows))
        methods = [m for m in BASELINES if any(row["method"] == m for row in rows)]
        clusterkv = [int(row["budget"]) for row in rows if row["method"] == "clusterkv"]
        for key in ("sink_tokens", "min_window", "decode_segment_tokens"):
            preset[key] = int(preset[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{options.replay}: not a replay report: {error!r}") from error
    steps = trace.steps if options.steps is None else options.steps
    if not 0 < steps <= trace.steps:
        raise InputError(f"{options.trace}: has {trace.steps} steps, not {steps}")
    if not rows:
        raise InputError(f"{options.replay}: no results")

    verdict, dump = Verdict(options.tolerance_figures), None
    if options.outputs and preset.get("estimate"):
        verdict.failures.append("outputs: preset.estimate is true: centroids take part in the "
                                "output, so it cannot be recomputed from the selection")
    elif options.outputs:
        if not clusterkv:
            raise InputError(f"{options.replay}: no clusterkv rows to go with --outputs")
        dump = DumpCheck(verdict, options.outputs, trace, steps, clusterkv[0],
                         options.tolerance_outputs)
    found, tokens = recompute(trace, preset, steps, methods, budgets, dump and dump.visit)
    for method in methods:
        key = method
        if method == "quest":
            best, errors = choose_quest_group(found, budgets)
            listing = ", ".join(f"{g} {errors[g]:.4f}" for g in QUEST_GROUPS)
            named = preset.get("quest_group")
            print(f"quest output_error by group: {listing}; reported {named}")
            # Nearly equal groups may be ranked either way by fp32.
            if named not in errors or errors[named] - errors[best] > 1e-4:
                verdict.failures.append(f"quest_group: reported {named!r}, expected {best!r}")
            key = ("quest", named if named in errors else best)
        for budget in budgets:
            compare_rows(verdict, rows, method, budget, found[key, budget], tokens)
    if dump is not None and set(dump.sums) == set(trace.layers):
        compare_rows(verdict, rows, "clusterkv", clusterkv[0], dump.measures(), tokens)
    return verdict


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", help="KV trace (safetensors)")
    parser.add_argument("replay", help="what clusterkv-replay --format json printed")
    parser.add_argument("--outputs", metavar="DUMP", help="file of clusterkv-replay --dump-outputs")
    parser.add_argument("--steps", type=int, help="the replay's --steps: the first N only")
    parser.add_argument("--tolerance-figures", type=float, default=0.01)
    parser.add_argument("--tolerance-outputs", type=float, default=5e-3)
    options = parser.parse_args(arguments)
    try:
        verdict = check(options)
    except InputError as error:
        print(f"check_replay.py: {error}", file=sys.stderr)
        return 5
    verdict.show()
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main())
