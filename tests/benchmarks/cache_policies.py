#!/usr/bin/env python3
"""Compares policies of the cluster cache at several sizes, over the selections of a KV trace.

    cache_policies.py TRACE [--replay clusterkv-replay] [--output cache_policies.md] [--plot FILE]

Replays the trace for each preset with a budget of all its tokens, and again with queries of zeros;
from what they select come the clusters, their numbers and every smaller budget's selections
(cache_simulation.py says how); their scores come from the trace itself (cache_scores.py). Then
simulates each (layer, KV head)'s cache: the product's policy; LRU; Belady's rule, which knows the
future; the paper's cache, which keeps what the last one or two steps selected; and other policies
where LRU is more than --points below Belady.

Sizes are in budgets, or "least" (2 budgets + the largest cluster, the smallest cache_tokens there
are) and "auto" (4 budgets + the largest cluster: cache_tokens 0). Where the product has a size it
is replayed too: its selections must be the same, and its hit rates and bytes the simulated ones
within --tolerance, in every layer.

Deterministic: the same programs, trace and options give the same table. Needs numpy; --plot needs
matplotlib. Exit codes: 0 ok, 1 a replay failed or differs from the simulation, 2 usage, 5 bad input
file.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "reference"))

import cache_report  # noqa: E402
import cache_scores  # noqa: E402
import cache_simulation as cache  # noqa: E402
from check_replay import InputError, read_safetensors, read_trace  # noqa: E402

LARGEST = 4  # a cluster has at most so many times tokens_per_cluster
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PRODUCT = cache.MeanScoreByRoot
OTHERS = {
    "mean score / √tokens": PRODUCT,
    "LRU": cache.Lru,
    "LRU-2": cache.Lru2,
    "LFU with aging": cache.AgedFrequency,
    "segmented LRU": cache.SegmentedLru,
    "S3-FIFO": cache.S3Fifo,
    "GDSF": cache.GreedyDual,
    "mean score": cache.MeanScore,
    "mean score / tokens": cache.MeanScoreBySize,
    "Belady × tokens": cache.BeladySize,
}


class StudyError(Exception):
    """A replay that failed or does not agree with the simulation; the message says which."""


@dataclass(frozen=True)
class Recording:
    """One preset's clusters and rankings."""

    preset: dict
    heads: dict     # {(layer, KV head): cache.Head}
    row_bytes: int  # K and V of a token in the host store

    @property
    def layers(self):
        return sorted({layer for layer, _ in self.heads})

    @property
    def largest(self):
        return LARGEST * self.preset["tokens_per_cluster"]


def read_header(path):
    """(metadata, tensors, where their data begins) of a safetensors file."""
    try:
        with open(path, "rb") as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
            return header.pop("__metadata__"), header, source.tell()
    except (OSError, ValueError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path}: not a KV trace: {error!r}") from error


def write_without_queries(path, tensors, begin, target):
    """Copies a trace; its queries are zeros."""
    with open(path, "rb") as source:
        data = bytearray(source.read())
    for name, tensor in tensors.items():
        if name.endswith(".q"):
            first, end = (begin + offset for offset in tensor["data_offsets"])
            data[first:end] = bytes(end - first)
    with open(target, "wb") as out:
        out.write(data)


def replay(options, trace, preset, budget, cache_tokens):
    """(report, {layer: selected [steps, kv_heads, budget]}) of one run of clusterkv."""
    with tempfile.TemporaryDirectory() as folder:
        dump = os.path.join(folder, "outputs.safetensors")
        command = [options.replay, trace, "--methods", "clusterkv", "--format", "json",
                   "--preset", preset, "--budgets", str(budget), "--seed", str(options.seed),
                   "--cache-tokens", str(cache_tokens), "--dump-outputs", dump]
        if options.steps:
            command += ["--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              check=False)
        if done.returncode != 0:
            raise StudyError(f"{' '.join(command)}\nexit code {done.returncode}: {done.stderr}")
        arrays, _ = read_safetensors(dump)
    selected = {int(name.split(".")[1]): array for name, array in arrays.items()
                if name.endswith(".selected")}
    return json.loads(done.stdout), selected


def record(options, preset):
    metadata, tensors, begin = read_header(options.trace)
    tokens = int(metadata["prompt_tokens"]) + int(metadata["decode_tokens"])
    report, selected = replay(options, options.trace, preset, tokens, 0)
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "without-queries.safetensors")
        write_without_queries(options.trace, tensors, begin, trace)
        numbered = {layer: positions[-1]
                    for layer, positions in replay(options, trace, preset, tokens, 0)[1].items()}
    heads = {}
    for layer, positions in selected.items():
        for head, order in enumerate(numbered[layer]):
            heads[layer, head] = cache.recover(positions[:, head], order[order >= 0])
    read, keys = read_trace(options.trace), tensors[f"layers.{min(selected)}.k"]
    for (layer, number), head in heads.items():
        scores = cache_scores.scores_of(read.layers[layer], head, read.scale, number,
                                        report["preset"], keys["dtype"])
        heads[layer, number] = replace(head, scores=scores)
    return Recording(report["preset"], heads,
                     2 * keys["shape"][-1] * ELEMENT_BYTES[keys["dtype"]])


class BudgetStudy:
    """Everything at one budget of one preset."""

    def __init__(self, recording, budget):
        self.recording, self.budget = recording, budget
        self.selections = {key: cache.select(head, budget) for key, head in recording.heads.items()}

    def _by_layer(self, outcome_of):
        """{layer: Outcome, summed over KV heads}."""
        outcomes = {}
        for key, head in self.recording.heads.items():
            outcome = outcome_of(head, self.selections[key])
            outcomes[key[0]] = outcomes[key[0]] + outcome if key[0] in outcomes else outcome
        return outcomes

    def simulate(self, capacity, policy, bypass=False):
        return self._by_layer(lambda head, selections: cache.simulate(head, selections, capacity,
                                                                      policy, bypass))

    def keep_last(self, steps):
        """({layer: Outcome}, most tokens that one (layer, KV head) holds)."""
        most = 0

        def outcome_of(head, selections):
            nonlocal most
            outcome = cache.keep_last(head, selections, steps)
            most = max(most, int(outcome.held_tokens.max()))
            return outcome

        return self._by_layer(outcome_of), most

    def upper_bound(self, capacity):
        """Hit rate, mean over layers, that no policy exceeds."""
        hits, selected = {}, {}
        for key, head in self.recording.heads.items():
            hits[key[0]] = hits.get(key[0], 0) + cache.upper_bound(head, self.selections[key],
                                                                   capacity)
            selected[key[0]] = selected.get(key[0], 0) + sum(map(len, self.selections[key]))
        return sum(hits[layer] / selected[layer] for layer in hits) / len(hits)

    def check_selections(self, selected):
        """The product at this budget must have chosen the first tokens of the recorded ranking."""
        for (layer, number), head in self.recording.heads.items():
            for step, clusters in enumerate(self.selections[layer, number]):
                row = selected[layer][step, number]
                wanted = [position for cluster in clusters for position in head.positions[cluster]]
                if row[row >= 0].tolist() != wanted[: self.budget]:
                    raise StudyError(f"budget {self.budget}, layer {layer}, KV head {number}, step "
                                     f"{step}: chosen are not the first of the recorded ranking")


def hit_rate(outcomes, begin=0, end=None):
    """Mean over layers, of the steps [begin, end)."""
    rates = [rate(outcome, begin, end) for outcome in outcomes.values()]
    return sum(rates) / len(rates)


def rate(outcome, begin=0, end=None):
    return outcome.hits[begin:end].sum() / max(1, outcome.selected[begin:end].sum())


def missed_tokens(outcomes):
    """Tokens read from the host store per step, over all layers."""
    return sum(outcome.missed_tokens.mean() for outcome in outcomes.values())


def compare_with_product(options, study, tokens, outcomes):
    """The product's hit rate at this size, and how far at most it and the bytes are from the
    simulated ones; StudyError if that is too far."""
    preset = study.recording.preset["name"]
    report, selected = replay(options, options.trace, preset, study.budget, tokens)
    study.check_selections(selected)
    rows = {row["layer"]: row for row in report["results"]}
    largest = 0.0
    for layer, outcome in outcomes.items():
        simulated = outcome.missed_tokens.mean() * study.recording.row_bytes
        for name, ours, product in (
                ("hit rate", rate(outcome), rows[layer]["hit_rate"]),
                ("bytes per step", simulated, rows[layer]["host_bytes_per_step"])):
            difference = abs(product - ours) / max(1.0, ours)
            if not difference <= options.tolerance:
                raise StudyError(f"preset {preset}, budget {study.budget}, {tokens} tokens, layer "
                                 f"{layer}: the product's {name} is {product:.7g}, the simulated "
                                 f"one {ours:.7g}")
            largest = max(largest, difference)
    return {"hit_rate": rows["all"]["hit_rate"], "difference": largest}

def study_size(options, study, name, tokens):
    """One line of the main table, and what the other tables need."""
    ours = study.simulate(tokens, PRODUCT)
    lru = study.simulate(tokens, cache.Lru)
    belady = study.simulate(tokens, cache.Belady)
    bypassed = study.simulate(tokens, cache.Belady, bypass=True)
    line = {"preset": study.recording.preset["name"], "budget": study.budget, "size": name,
            "tokens": tokens, "ours": hit_rate(ours), "lru": hit_rate(lru),
            "belady": hit_rate(belady),
            "our_layers": {layer: rate(outcome) for layer, outcome in ours.items()},
            "belady_layers": {layer: rate(outcome) for layer, outcome in belady.items()},
            "bypass": hit_rate(bypassed), "bound": study.upper_bound(tokens),
            "kib_per_step": missed_tokens(ours) * study.recording.row_bytes / 1024,
            "product": None, "others": []}
    if tokens >= 2 * study.budget + study.recording.largest:
        line["product"] = compare_with_product(options, study, tokens, ours)
    # With less than two budgets every policy keeps the step itself and little else.
    bypass = tokens < 2 * study.budget
    reference = bypassed if bypass else belady
    if 100 * (hit_rate(reference) - line["lru"]) > options.points:
        steps = len(next(iter(lru.values())).hits)
        edges = [steps * i // options.ranges for i in range(options.ranges + 1)]
        for other, policy in OTHERS.items():
            # LRU keeps the step's own.
            outcomes = lru if policy is cache.Lru else study.simulate(tokens, policy, bypass)
            gaps = [hit_rate(reference, *edge) - hit_rate(outcomes, *edge)
                    for edge in zip(edges, edges[1:])]
            line["others"].append({
                "policy": other, "bypass": bypass,
                "gap": hit_rate(reference) - hit_rate(outcomes), "ranges": gaps,
                "read": missed_tokens(outcomes) / missed_tokens(lru)})
    return line


def study_paper(study):
    """Lines for the paper's cache."""
    lines = []
    for steps in (1, 2):
        outcomes, most = study.keep_last(steps)
        ours = study.simulate(most, PRODUCT)
        held = [outcome.held_tokens.mean() for outcome in outcomes.values()]
        lines.append({"preset": study.recording.preset["name"], "budget": study.budget,
                      "steps": steps, "hit_rate": hit_rate(outcomes),
                      "worst": min(rate(outcome) for outcome in outcomes.values()),
                      "mean_tokens": sum(held) / len(study.recording.heads), "most_tokens": most,
                      "ours": hit_rate(ours),
                      "read": missed_tokens(outcomes) / missed_tokens(ours)})
    return lines


def sizes_of(options, recording, budget):
    """[(name, tokens)], rising."""
    named = {"least": 2 * budget + recording.largest, "auto": 4 * budget + recording.largest}
    sizes = [(name, named[name] if name in named else int(float(name) * budget))
             for name in options.sizes]
    return sorted(sizes, key=lambda size: size[1])


def run(options):
    """(main lines, paper's lines)."""
    lines, paper = [], []
    for preset in options.presets:
        recording = record(options, preset)
        for budget in options.budgets:
            study = BudgetStudy(recording, budget)
            paper += study_paper(study)
            for name, tokens in sizes_of(options, recording, budget):
                lines.append(study_size(options, study, name, tokens))
                print(f"{preset}, budget {budget}, {tokens} tokens: {lines[-1]['ours']:.4f}, "
                      f"Belady {lines[-1]['belady']:.4f}", file=sys.stderr)
    return lines, paper


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("trace", metavar="TRACE", help="KV trace (safetensors)")
    parser.add_argument("--replay", default="clusterkv-replay", help="the program")
    parser.add_argument("--presets", default="default,paper", type=words)
    parser.add_argument("--budgets", default="128,256,512,1024",
                        type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--sizes", default="1,2,least,4,auto,6", type=words,
                        help="of the cache: budgets, least or auto")
    parser.add_argument("--steps", type=int, default=0, help="only the first N; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of k-means")
    parser.add_argument("--ranges", type=int, default=4, help="of steps, judged apart as well")
    parser.add_argument("--points", type=float, default=3.0,
                        help="try other policies where LRU is further below Belady")
    parser.add_argument("--tolerance", type=float, default=1e-9,
                        help="between the product and the simulation; of bytes relative (a host "
                        "without fused multiply-add may need 0.005)")
    parser.add_argument("--output", help="write the tables here instead of to stdout")
    parser.add_argument("--plot", help="also draw hit rate over size (.svg or .png; matplotlib)")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        try:
            fits = size in ("least", "auto") or 0 < float(size) <= 1e6
        except ValueError:
            fits = False
        if not fits:
            parser.error(f"--sizes: {size} is neither a number above 0 nor least or auto")
    if min(options.budgets) < 1 or options.ranges < 1 or options.steps < 0:
        parser.error("--budgets and --ranges must be above 0, --steps not negative")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        lines, paper = run(options)
    except InputError as error:
        print(f"cache_policies.py: {error}", file=sys.stderr)
        return 5
    except (StudyError, cache.RecoveryError, cache_scores.ScoreError, OSError) as error:
        print(f"cache_policies.py: {error}", file=sys.stderr)
        return 1
    tables = cache_report.markdown(options, lines, paper)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as out:
            out.write(tables)
    else:
        sys.stdout.write(tables)
    if options.plot:
        cache_report.plot(options.plot, lines, paper)
    return 0


if __name__ == "__main__":
    sys.exit(main())
