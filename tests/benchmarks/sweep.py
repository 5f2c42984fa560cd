#!/usr/bin/env python3
"""Compares settings of the method over KV traces, to choose the preset "default".

    sweep.py TRACE... [--replay clusterkv-replay] [--output sweep.md]

Starts from a base (preset "default" unless --base says otherwise) and varies one parameter at a
time, and tokens_per_cluster together with min_window; --grid full tries every combination. Each
setting is replayed by clusterkv-replay at every budget.

Settings are ranked by output error times host bytes per step, at the same budget, as a ratio to the
base's: the geometric mean over budgets and traces. 0.9 with an error of 1.0 means the same error for
a tenth less read from the host store. Error and bytes stand beside it, since a smaller product may
hide a larger error. (A curve of error over bytes, read at equal bytes, does not serve: with a cache of
some budgets the bytes hardly depend on the budget.) Window and sinks cost no host bytes: look at the
window's column too.

Needs only Python's standard library. --results keeps what has been run, so that a sweep can go on
where it stopped. Exit codes: 0 ok, 1 a replay failed, 2 usage.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time

AXES = {
    "tokens_per_cluster": ["8", "12", "16", "24", "32", "48", "80"],
    "group": ["softmax", "mean", "max"],
    "center_keys": ["false", "true"],
    "estimate": ["false", "true"],
    "min_window": ["0", "32", "64", "128"],
    # 65,536 is the largest segment: the whole prompt of most traces.
    "prompt_segment_tokens": ["1024", "2048", "4096", "8192", "65536"],
    "kmeans_iterations": ["3", "5", "10", "20"],
}
TOGETHER = ("tokens_per_cluster", "min_window")
FULL_GRID = ("tokens_per_cluster", "group", "center_keys", "estimate", "min_window",
             "prompt_segment_tokens")
MEASURES = ("output_error", "mass", "recall", "hit_rate", "host_bytes_per_step",
            "window_tokens_mean")


class ReplayError(Exception):
    """A replay that failed; the message says which and why."""


def replay(options, trace, settings):
    """Runs one setting over one trace: {budget: {measure: value}} of clusterkv's rows "all"."""
    command = [options.replay, trace, "--methods", "clusterkv", "--format", "json",
               "--budgets", ",".join(map(str, options.budgets)), "--preset", options.base,
               "--mode", options.mode, "--seed", str(options.seed)]
    if options.steps:
        command += ["--steps", str(options.steps)]
    for key, value in settings:
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode != 0:
        raise ReplayError(f"{' '.join(command)}\nexit code {done.returncode}: {done.stderr}")
    report = json.loads(done.stdout)
    rows = {row["budget"]: {name: row[name] for name in MEASURES}
            for row in report["results"] if row["layer"] == "all"}
    return rows, report["preset"]


class Results:
    """What has been run, in memory and, line by line, in a file."""

    def __init__(self, options):
        self._options, self._known = options, {}
        if options.results and os.path.exists(options.results):
            with open(options.results, encoding="utf-8") as source:
                for line in source:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry

    def get(self, trace, settings):
        """(rows by budget, preset as reported) of one setting, from the file or a new run."""
        options = self._options
        key = json.dumps([os.path.basename(trace), options.base, options.budgets, options.steps,
                          options.mode, options.seed, sorted(settings)])
        if key not in self._known:
            rows, preset = replay(options, trace, settings)
            entry = {"key": key, "rows": rows, "preset": preset}
            self._known[key] = entry
            if options.results:
                with open(options.results, "a", encoding="utf-8") as out:
                    out.write(json.dumps(entry) + "\n")
        entry = self._known[key]
        return {int(budget): row for budget, row in entry["rows"].items()}, entry["preset"]


def settings_to_try(options, base):
    """Tuples of (key, value) that differ from the base preset, the empty one first."""
    def differing(pairs):
        return tuple((k, v) for k, v in pairs if v != text(base.get(k)))

    tried = [()]
    if options.grid == "full":
        combinations = itertools.product(*(AXES[axis] for axis in FULL_GRID))
        tried += [differing(zip(FULL_GRID, values)) for values in combinations]
    else:
        for axis in options.axes:
            tried += [differing([(axis, value)]) for value in AXES[axis]]
        if all(axis in options.axes for axis in TOGETHER):
            pairs = itertools.product(*(AXES[axis] for axis in TOGETHER))
            tried += [differing(zip(TOGETHER, values)) for values in pairs]
    return list(dict.fromkeys(tried))


def text(value):
    """A preset's value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def ratio(measure, per_trace, base_per_trace):
    """A measure relative to the base's: geometric mean over traces and budgets."""
    logs = [math.log(max(rows[budget][measure], 1e-12) / max(base[budget][measure], 1e-12))
            for rows, base in zip(per_trace, base_per_trace) for budget in base]
    return math.exp(sum(logs) / len(logs))


def summarize(settings, per_trace, base_per_trace):
    """One line of the table."""
    error = ratio("output_error", per_trace, base_per_trace)
    host_bytes = ratio("host_bytes_per_step", per_trace, base_per_trace)
    budgets = sorted(per_trace[0])
    mean = {name: sum(rows[b][name] for rows in per_trace for b in budgets)
            / (len(per_trace) * len(budgets)) for name in MEASURES}
    return {"settings": settings, "relative": error * host_bytes, "error": error,
            "host_bytes": host_bytes, "mean": mean,
            "errors": [sum(rows[b]["output_error"] for rows in per_trace) / len(per_trace)
                       for b in budgets]}


def run(options):
    """Runs everything; returns (lines of the table, best first; the base's preset)."""
    results = Results(options)
    base_per_trace, base = [], None
    for trace in options.traces:
        rows, base = results.get(trace, ())
        base_per_trace.append(rows)
    tried, lines, started = settings_to_try(options, base), [], time.monotonic()
    for number, settings in enumerate(tried, 1):
        per_trace = [results.get(trace, settings)[0] for trace in options.traces]
        lines.append(summarize(settings, per_trace, base_per_trace))
        print(f"{number}/{len(tried)}, {time.monotonic() - started:.0f} s: {name_of(settings)}: "
              f"{lines[-1]['relative']:.3f}", file=sys.stderr)
    return sorted(lines, key=lambda line: line["relative"]), base


def name_of(settings):
    return ", ".join(f"{key} {value}" for key, value in settings) or "(base)"


def markdown(options, lines, base):
    """The table, as it is committed."""
    budgets = sorted(options.budgets)
    traces = ", ".join(f"`{os.path.basename(trace)}`" for trace in options.traces)
    preset = ", ".join(f"{key} {text(value)}" for key, value in base.items()
                       if key not in ("name", "quest_group"))
    steps = f"the first {options.steps} steps" if options.steps else "all steps"
    out = [
        "# Sweep of the method's parameters", "",
        f"Traces: {traces}; {steps}, {options.mode} fetch, seed {options.seed}.",
        f"Base: preset `{options.base}` ({preset}).", "",
        "`error` and `bytes` are the output error and the bytes read from the host store per step, as "
        "ratios to the base's at the same budget (geometric means over budgets and traces); `product` "
        "is theirs. The other figures are means over traces, layers and, where no budget is named, "
        "budgets.", "",
        "| product | error | bytes | setting | "
        + " | ".join(f"error at {b}" for b in budgets)
        + " | mass | recall | hit rate | host KiB/step | window |",
        "|---:|---:|---:|---|" + "---:|" * (len(budgets) + 5),
    ]
    for line in lines:
        mean = line["mean"]
        errors = " | ".join(f"{error:.4f}" for error in line["errors"])
        out.append(f"| {line['relative']:.3f} | {line['error']:.3f} | {line['host_bytes']:.3f} | "
                   f"{name_of(line['settings'])} | {errors} | "
                   f"{mean['mass']:.4f} | {mean['recall']:.3f} | {mean['hit_rate']:.3f} | "
                   f"{mean['host_bytes_per_step'] / 1024:.1f} | "
                   f"{mean['window_tokens_mean']:.0f} |")
    return "\n".join(out) + "\n"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="KV traces (safetensors)")
    parser.add_argument("--replay", default="clusterkv-replay", help="the program")
    parser.add_argument("--output", help="write the table here instead of to stdout")
    parser.add_argument("--results", help="file of finished runs, one JSON object a line")
    parser.add_argument("--base", default="default", help="preset to start from")
    parser.add_argument("--budgets", default="128,256,512,1024",
                        type=lambda s: [int(part) for part in s.split(",")])
    parser.add_argument("--axes", default=list(AXES), type=lambda s: s.split(","),
                        help="parameters to vary: " + ", ".join(AXES))
    parser.add_argument("--grid", choices=["axes", "full"], default="axes")
    parser.add_argument("--steps", type=int, default=0, help="only the first N; 0 = all")
    parser.add_argument("--mode", choices=["direct", "served"], default="direct")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = [axis for axis in options.axes if axis not in AXES]
    if unknown:
        parser.error(f"--axes: unknown {', '.join(unknown)}; allowed: {', '.join(AXES)}")
    if min(options.budgets) < 1 or options.steps < 0:
        parser.error("--budgets and --steps must not be negative, budgets not 0")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        lines, base = run(options)
    except (ReplayError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 1
    table = markdown(options, lines, base)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as out:
            out.write(table)
    else:
        sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
