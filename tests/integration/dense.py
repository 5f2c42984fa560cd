"""K, V and queries of a test, packed as the wire wants them, and exact attention in float64."""

import numpy as np

from wire import v1

ELEMENT_BYTES = {v1.DTYPE_BF16: 2, v1.DTYPE_FP16: 2, v1.DTYPE_FP32: 4}


def shape_of(layers=2, kv_heads=2, group=2, head_dim=64, dtype=v1.DTYPE_FP16):
    return v1.Shape(layers=layers, kv_heads=kv_heads, q_heads=kv_heads * group, head_dim=head_dim,
                    dtype=dtype)


def method_of(**changed):
    """A small method: every parameter travels in the request."""
    values = {"sink_tokens": 4, "min_window_tokens": 16, "decode_segment_tokens": 32,
              "prompt_segment_tokens": 128, "tokens_per_cluster": 8, "kmeans_iterations": 4,
              "group": v1.GROUP_RULE_SOFTMAX, "window_lag_segments": 3, "budget_tokens": 64,
              "seed": 7}
    return v1.Method(**{**values, **changed})


def rounded(values, dtype):
    """float64 `values` as `dtype` stores them, in float64."""
    if dtype == v1.DTYPE_FP16:
        return values.astype(np.float16).astype(np.float64)
    if dtype == v1.DTYPE_FP32:
        return values.astype(np.float32).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return nearest.view(np.float32).astype(np.float64)


def encoded(values, dtype):
    """Little-endian bytes of values that `rounded` gave."""
    if dtype == v1.DTYPE_FP16:
        return values.astype("<f2").tobytes()
    if dtype == v1.DTYPE_FP32:
        return values.astype("<f4").tobytes()
    bits = np.ascontiguousarray(values.astype("<f4")).view("<u4")
    return (bits >> 16).astype("<u2").tobytes()


class Kv:
    """Random k, v [layers, tokens, kv_heads, head_dim] and q [layers, tokens, q_heads, head_dim].

    Keys lie in topics of some 12 tokens, and queries look for one of them, so that a selection
    has something to find.
    """

    def __init__(self, shape, tokens, seed=1):
        rng = np.random.default_rng(seed)
        self.shape, self.tokens, self.dtype = shape, tokens, shape.dtype
        topics = rng.standard_normal((max(2, tokens // 12), shape.head_dim))
        topic = rng.integers(len(topics), size=tokens)
        size = (shape.layers, tokens, shape.kv_heads, shape.head_dim)
        self.k = rounded(topics[topic][None, :, None] + 0.5 * rng.standard_normal(size),
                         self.dtype)
        self.v = rounded(rng.standard_normal(size), self.dtype)
        sought = topics[rng.integers(len(topics), size=tokens)]
        self.q = rounded(sought[None, :, None] + 0.5 * rng.standard_normal(
            (shape.layers, tokens, shape.q_heads, shape.head_dim)), self.dtype)

    def token_bytes(self):
        """Of K and V of one token, all layers."""
        shape = self.shape
        return shape.layers * shape.kv_heads * shape.head_dim * 2 * ELEMENT_BYTES[self.dtype]

    def pack(self, layer_begin, layer_count, position, count):
        """[layer][K, V][token][kv_head][head_dim], as bytes."""
        layers = slice(layer_begin, layer_begin + layer_count)
        tokens = slice(position, position + count)
        return encoded(np.stack([self.k[layers, tokens], self.v[layers, tokens]], axis=1),
                       self.dtype)

    def fetch_item(self, sequence_id, position, layer, /, **changed):
        """A FetchItem with everything inline."""
        tensors = {name: v1.TensorRef(inline=encoded(values[layer, position], self.dtype))
                   for name, values in (("q", self.q), ("k", self.k), ("v", self.v))}
        return v1.FetchItem(**{"sequence_id": sequence_id, "position": position, **tensors,
                               **changed})

    def attention(self, layer, position, attended=None):
        """(out [q_heads, head_dim], lse [q_heads]) of the query of `position`, over 0..position
        or, per KV head, over the positions in `attended`."""
        group = self.shape.q_heads // self.shape.kv_heads
        out = np.empty((self.shape.q_heads, self.shape.head_dim))
        lse = np.empty(self.shape.q_heads)
        for head in range(self.shape.q_heads):
            kv_head = head // group
            rows = np.arange(position + 1) if attended is None else attended[kv_head]
            scores = self.k[layer, rows, kv_head] @ self.q[layer, position, head]
            scores /= np.sqrt(self.shape.head_dim)
            most = scores.max()
            weights = np.exp(scores - most)
            out[head] = weights @ self.v[layer, rows, kv_head] / weights.sum()
            lse[head] = most + np.log(weights.sum())
        return out, lse


def output_of(result, shape):
    """(out, lse) of a FetchResult, float64."""
    out = np.frombuffer(result.output, "<f4").reshape(shape.q_heads, shape.head_dim)
    return out.astype(np.float64), np.frombuffer(result.lse, "<f4").astype(np.float64)


def relative_error(found, expected):
    """‖found − expected‖₂ / ‖expected‖₂, the worst of the rows."""
    return float(np.max(np.linalg.norm(found - expected, axis=-1) /
                        np.linalg.norm(expected, axis=-1)))


TOLERANCE = {v1.DTYPE_FP16: 1e-3, v1.DTYPE_BF16: 1e-3, v1.DTYPE_FP32: 1e-5}


def check_output(result, kv, layer, position, attended=None):
    """Asserts that a FetchResult is exact attention over what was attended."""
    out, lse = output_of(result, kv.shape)
    expected, expected_lse = kv.attention(layer, position, attended)
    error = relative_error(out, expected)
    assert error < TOLERANCE[kv.dtype], f"layer {layer} position {position}: error {error:.2e}"
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-4, atol=1e-4)


def attended_positions(result, kv, position, sinks, budget):
    """Per KV head what a step attends to: sinks, selected, window; asserts they are disjoint."""
    lists = np.array(result.selected_positions).reshape(kv.shape.kv_heads, budget)
    attended = []
    for selected in lists:
        count = int((selected >= 0).sum())
        assert (selected[count:] == -1).all(), "a position behind the end of the list"
        chosen = selected[:count]
        assert ((chosen >= sinks) & (chosen < result.cut)).all(), "not among the candidates"
        rows = np.concatenate([np.arange(min(sinks, position + 1)), chosen,
                               np.arange(min(result.cut, position + 1), position + 1)])
        assert len(set(rows.tolist())) == len(rows), "a token attended twice"
        attended.append(rows)
    return attended


def decode_step(worker, sequence, kv, position):
    """One served step over all layers with output, checked against dense attention: the budget
    must hold all candidates."""
    for layer in range(kv.shape.layers):
        result = worker.fetch(sequence, kv, position, layer)
        check_output(result, kv, layer, position)
