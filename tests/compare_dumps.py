#!/usr/bin/env python3
"""Compares two files of clusterkv-replay --dump-outputs: compare_dumps.py A B [--tolerance 1e-3].

Every `layers.{L}.o` must agree to the tolerance, as ‖a − b‖₂ / ‖a‖₂ of each step and query head.
Prints the largest difference, and in how many of (step, KV head) the same tokens were chosen.
Exit codes: 0 they agree, 1 they do not, 2 usage, 5 bad input file.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "reference"))

import numpy as np  # noqa: E402
from check_replay import InputError, read_safetensors  # noqa: E402


def compare(a, b, tolerance):
    """Two dumps as {name: array}. Returns whether they agree; raises InputError if they cannot."""
    if a.keys() != b.keys() or not a:
        raise InputError(f"different tensors: {sorted(a)} and {sorted(b)}")
    agree = True
    for name in sorted(a):
        if a[name].shape != b[name].shape or not a[name].size:
            raise InputError(f"{name}: shapes {a[name].shape} and {b[name].shape}")
        if name.endswith(".selected"):
            same = (np.sort(a[name], axis=-1) == np.sort(b[name], axis=-1)).all(axis=-1)
            print(f"{name}: the same tokens in {same.sum()} of {same.size}")
            continue
        norm = np.linalg.norm(a[name], axis=-1)
        difference = np.linalg.norm(a[name] - b[name], axis=-1) / np.maximum(norm, 1e-30)
        # Not-a-number is no agreement.
        fits = bool((difference <= tolerance).all())
        print(f"{name}: largest relative difference {difference.max():.2e}"
              f"{'' if fits else f', above {tolerance:g}'}")
        agree = agree and fits
    return agree


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    try:
        dumps = [read_safetensors(path)[0] for path in (options.a, options.b)]
        return 0 if compare(*dumps, options.tolerance) else 1
    except InputError as error:
        print(f"compare_dumps: {error}", file=sys.stderr)
        return 5


if __name__ == "__main__":
    sys.exit(main())
