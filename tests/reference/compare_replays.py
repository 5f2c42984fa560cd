"""Two replays of one trace, on different backends: do their figures agree?

    compare_replays.py A.json B.json [--tolerance 0.01]

Compares recall, output_error, mass and hit_rate of every row of clusterkv, and requires the rows of
the baselines, which share no device code, to agree to 1e-3. Exit 1 with the rows that differ.
"""

import argparse
import json
import sys

FIGURES = ("recall", "output_error", "mass", "hit_rate")


def rows(path):
    with open(path, encoding="utf-8") as file:
        results = json.load(file)["results"]
    return {(row["method"], row["budget"], str(row["layer"])): row for row in results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--tolerance", type=float, default=0.01)
    options = parser.parse_args()
    a, b = rows(options.a), rows(options.b)
    wrong = []
    if set(a) != set(b):
        wrong.append(f"rows differ: {sorted(set(a) ^ set(b))}")
    worst = dict.fromkeys(FIGURES, 0.0)
    for key in sorted(set(a) & set(b)):
        tolerance = options.tolerance if key[0] == "clusterkv" else 1e-3
        for figure in FIGURES:
            x, y = a[key][figure], b[key][figure]
            if (x is None) != (y is None):
                wrong.append(f"{key} {figure}: {x} and {y}")
            elif x is not None:
                worst[figure] = max(worst[figure], abs(x - y))
                if abs(x - y) > tolerance:
                    wrong.append(f"{key} {figure}: {x} and {y}")
    print("largest differences: " + ", ".join(f"{k} {v:.4f}" for k, v in worst.items()))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
