#!/usr/bin/env python3
"""Makes a small random KV trace with the structure that selection lives on, for tests.

    make_trace.py OUT --seed 1 --tokens 640 --decode-tokens 128 --layers 2,5

Keys lie in topics that come back and drift, the first tokens are attention sinks, and queries look
for the topic of their own position and now and then for an older one. The same arguments give the
same file. Needs numpy. Exit codes: 0 ok, 2 usage.
"""

import argparse
import json
import struct
import sys

import numpy as np

SINKS = 4  # positions that every query likes
STAY = 0.95  # chance that the next token keeps the topic: runs of 20 tokens on average
DRIFT = 0.02  # how far a topic's centre moves per token, relative to its length


def topics_of(rng, tokens, topics):
    """The topic of each token, int [tokens]: a chain that mostly stays."""
    out = np.empty(tokens, int)
    out[0] = rng.integers(topics)
    for i in range(1, tokens):
        out[i] = out[i - 1] if rng.random() < STAY else rng.integers(topics)
    return out


def unit(x):
    """`x` scaled to length √d over the last axis, so that its channels are of order 1."""
    return x * np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)


def make_head(rng, topic, steps, group, dim):
    """One KV head: (k [tokens, dim], v [tokens, dim], q [steps, group, dim]), float64."""
    tokens, count = len(topic), int(topic.max()) + 1
    centres = unit(rng.standard_normal((count, dim)))
    meanings = rng.standard_normal((count, dim))
    shared = unit(rng.standard_normal(dim))  # what all queries have in common; only sinks have it
    k, v = np.empty((tokens, dim)), np.empty((tokens, dim))
    q = np.empty((steps, group, dim))
    for i in range(tokens):
        now = topic[i]
        centres[now] = unit(centres[now] + DRIFT * rng.standard_normal(dim))
        k[i] = centres[now] + 0.6 * rng.standard_normal(dim)
        v[i] = meanings[now] + 0.5 * rng.standard_normal(dim)
        if i < SINKS:
            k[i] = shared + 0.2 * rng.standard_normal(dim)
            v[i] *= 0.1
        t = i - (tokens - steps)
        for head in range(group if t >= 0 else 0):
            sought = now if rng.random() < 0.7 else topic[rng.integers(i + 1)]
            # q·k/√d is about 0.6·√d within the topic and about 0.6 to other topics.
            q[t, head] = 0.6 * centres[sought] + 0.4 * shared + 0.4 * rng.standard_normal(dim)
    return k, v, q


def make_tensors(options):
    """{tensor name: float32 or int32 array} in the shapes of the trace format."""
    rng = np.random.default_rng(options.seed)
    topic = topics_of(rng, options.tokens, options.topics)
    group = options.q_heads // options.kv_heads
    tensors = {}
    for layer in options.layers:
        heads = [make_head(rng, topic, options.decode_tokens, group, options.head_dim)
                 for _ in range(options.kv_heads)]
        k, v = (np.stack([head[i] for head in heads], axis=1) for i in (0, 1))
        q = np.concatenate([head[2] for head in heads], axis=1)
        for part, values in (("k", k), ("v", v), ("q", q)):
            tensors[f"layers.{layer}.{part}"] = values.astype(np.float32)
    tensors["token_ids"] = topic.astype(np.int32)  # the topic stands in for a token
    return tensors


def encode(values, dtype):
    """(dtype name, little-endian bytes) of a float32 or int32 array."""
    if values.dtype == np.int32:
        return "I32", values.astype("<i4").tobytes()
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
        return "BF16", rounded.astype("<u2").tobytes()
    return dtype, values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_safetensors(path, tensors, metadata, dtype):
    """Writes u64 header length, JSON header padded to 8 bytes, data; floats as `dtype`."""
    header, blobs, offset = {"__metadata__": metadata}, [], 0
    for name, values in tensors.items():
        kind, blob = encode(np.ascontiguousarray(values), dtype)
        header[name] = {"dtype": kind, "shape": list(values.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=640, help="prompt and decode together")
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--layers", default="2,5", type=lambda s: [int(p) for p in s.split(",")])
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--q-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--topics", type=int, default=12)
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16"], default="F16")
    options = parser.parse_args(arguments)
    if not 0 < options.decode_tokens < options.tokens:
        parser.error("need 0 < --decode-tokens < --tokens")
    if min(options.kv_heads, options.head_dim, options.topics) < 1:
        parser.error("--kv-heads, --head-dim and --topics must be positive")
    if options.q_heads < 1 or options.q_heads % options.kv_heads:
        parser.error("--q-heads must be a multiple of --kv-heads")
    if sorted(set(options.layers)) != options.layers or options.layers[0] < 0:
        parser.error("--layers must be ascending, distinct and not negative")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    write_safetensors(options.output, make_tensors(options), {
        "format": "clusterkv-trace/1",
        "model": f"random, seed {options.seed}",
        "layers": ",".join(map(str, options.layers)),
        "prompt_tokens": str(options.tokens - options.decode_tokens),
        "decode_tokens": str(options.decode_tokens),
        "softmax_scale": repr(options.head_dim**-0.5),
    }, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
