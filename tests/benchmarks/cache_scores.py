"""Scores of recorded clusters, from the trace and as the product computes them (group softmax).

clusterkv-replay's dump has no scores, but the clusters' tokens are known, and so are their
centroids. Sums and roundings are the host backend's where it has fused multiply-add; elsewhere a
centroid's element may round the other way, which moves a score by a percent at most."""

import numpy as np

import make_trace
from check_replay import combine

ROUNDING = 0.05  # of a score, relative; a ranking that is off by more is not of these scores


class ScoreError(Exception):
    """Another group rule, or a ranking that is not that of the scores; the message says which."""


def stored(values, dtype):
    """float32 rounded as the product stores it, in float64."""
    _, data = make_trace.encode(values, dtype)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(float)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(float)


def centroid(keys, dtype):
    """Mean of keys [tokens, head_dim]: in float32, weights before the sum."""
    weight, total = float(np.float32(1) / np.float32(len(keys))), np.zeros(keys.shape[1])
    for key in keys:
        total = (weight * key + total).astype(np.float32).astype(float)
    return stored(total.astype(np.float32), dtype)


def scores_of(layer, head, scale, number, preset, dtype):
    """[steps, clusters] float32 of KV head `number` of `layer`; 0 of what is no candidate yet."""
    if preset["group"] != "softmax":
        raise ScoreError(f"preset {preset['name']}: group is {preset['group']}; known: softmax")
    means = np.array([centroid(layer.k[positions, number], dtype) for positions in head.positions])
    group = layer.q.shape[1] // layer.k.shape[1]
    queries = layer.q[:, number * group:(number + 1) * group]
    scores = np.zeros((len(head.rankings), len(head.sizes)), np.float32)
    for step, ranking in enumerate(head.rankings):
        own = combine(queries[None, step] @ means[ranking].T * scale, "softmax")[0]
        wrong = np.diff(own) > ROUNDING * own[1:]
        if wrong.any():
            raise ScoreError(f"KV head {number}, step {step}: the ranking's order is not that of "
                             f"the scores {own[wrong.argmax():][:2]}")
        scores[step, ranking] = own
    return scores
