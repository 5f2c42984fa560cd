#!/usr/bin/env python3
"""Checks a captured trace with a second, deliberately different implementation of the model.

    check_model.py MODEL TRACE [--tokens N] [--chunk C] [--engine N]

Shares no code with capture.py: an own GGUF parser and own unpacking of the quantised blocks,
float64 throughout, a KV cache that is filled --chunk positions at a time (1: token by token), and
half-split RoPE over un-permuted W_q and W_k. It reruns the trace's token_ids and compares

  * the trace's K, V and Q with its own (relative L2 per tensor, and the largest difference),
  * its mean next-token loss with that of capture.py's forward pass, and their log-probabilities,
  * with --engine N, the full next-token distributions after N contexts, spread evenly over the
    positions, with llama.cpp's (PyPI `xllamacpp`, which bundles it as a binary), and the tokens
    with its tokenizer: once from the file as it is, once from a copy unpacked to F32.

Needs numpy; for the second comparison also capture.py's packages (skipped, and said so, if absent).
Exit codes: 0 ok, 1 a difference is beyond its bound, 2 usage, 5 bad input file.
"""

import argparse
import json
import mmap
import struct
import sys
import tempfile
import time
import urllib.request
import zipfile

import numpy as np

# Bounds. F16 keeps 11 bits, so a rounded tensor differs by about 2.4e-4 (relative L2); the float32
# pass itself adds about 1e-6. llama.cpp multiplies with activations rounded to 8 bits in blocks of
# 32, which moves log-probabilities by a few hundredths.
TRACE_BOUND = 1e-3
LOSS_BOUND = 1e-3
ENGINE_LOSS_BOUND = 0.05


class InputError(Exception):
    """A file that this script cannot use; the message says why."""


# --- GGUF, after its specification (ggml/docs/gguf.md): header, key-values, tensor infos, data.

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
            10: "Q", 11: "q", 12: "d"}


class Reader:
    """A GGUF of version 2 or 3, little-endian: `fields` {key: value} and `matrix(name)`."""

    def __init__(self, data):
        self._data, self._at = data, 4
        if data[:4] != b"GGUF":
            raise InputError("not a GGUF file")
        version, tensors, pairs = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise InputError(f"GGUF version {version}")
        self.fields = {}
        for _ in range(pairs):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        self._infos, self._infos_at = {}, self._at
        for _ in range(tensors):
            name = self._string()
            shape = [self._scalar("Q") for _ in range(self._scalar("I"))]
            self._infos[name] = (shape[::-1], self._scalar("I"), self._scalar("Q"))
        self._alignment = self.fields.get("general.alignment", 32)
        self._start = -(-self._at // self._alignment) * self._alignment

    def __contains__(self, name):
        return name in self._infos

    def matrix(self, name):
        """The tensor as float64, outermost dimension first."""
        if name not in self._infos:
            raise InputError(f"tensor {name} is missing")
        shape, kind, offset = self._infos[name]
        if kind not in _BLOCKS:
            raise InputError(f"tensor {name}: GGML type {kind} is not known here")
        count, size, unpack = _BLOCKS[kind]
        blocks = int(np.prod(shape)) // count
        raw = np.frombuffer(self._data, np.uint8, blocks * size, self._start + offset)
        return unpack(raw.reshape(blocks, size)).astype(np.float64).reshape(shape)

    def write_unpacked(self, out):
        """Writes the same model with every tensor unpacked to F32, to a binary file."""
        out.write(self._data[: self._infos_at])
        offset, table = 0, b""
        for name, (shape, _, _) in self._infos.items():
            table += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
            table += struct.pack(f"<{len(shape)}QIQ", *shape[::-1], 0, offset)
            offset += -(-4 * int(np.prod(shape)) // self._alignment) * self._alignment
        out.write(table + bytes(-(self._infos_at + len(table)) % self._alignment))
        for name in self._infos:
            raw = self.matrix(name).astype("<f4").tobytes()
            out.write(raw + bytes(-len(raw) % self._alignment))
        out.flush()

    def _scalar(self, code):
        value, = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self):
        length = self._scalar("Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode("utf-8", "replace")

    def _value(self, kind):
        if kind == 8:
            return self._string()
        if kind == 9:
            inner, length = self._scalar("I"), self._scalar("Q")
            return [self._value(inner) for _ in range(length)]
        return self._scalar(_SCALARS[kind])


def _half(raw):
    """Two bytes per row as float64 [rows, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float64)


def _nibbles(raw):
    """ggml's order of 4-bit values: the low nibbles of all bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float64)


def _q6_k(raw):
    """Q6_K, 256 values: ql[128], qh[64], int8 scales[16], half d; value d·scale·(q − 32)."""
    low = raw[:, :128].reshape(-1, 2, 2, 32)  # halves of 128 values, two rows of 32 bytes
    high = raw[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    four = np.concatenate([low & 15, low >> 4], axis=2)  # rows 0..3 of 32 values
    quants = (four | (((high >> shifts) & 3) << 4)).astype(np.float64) - 32
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float64)
    return quants.reshape(-1, 16, 16) * (scales * _half(raw[:, 208:210]))[:, :, None]


# GGML type: (values per block, bytes per block, unpack).
_BLOCKS = {
    0: (1, 4, lambda raw: np.ascontiguousarray(raw).view("<f4")),  # F32
    1: (1, 2, _half),  # F16
    2: (32, 18, lambda raw: (_nibbles(raw[:, 2:]) - 8) * _half(raw[:, :2])),  # Q4_0: d, nibbles
    3: (32, 20, lambda raw: _nibbles(raw[:, 4:]) * _half(raw[:, :2]) + _half(raw[:, 2:4])),  # Q4_1
    8: (32, 34, lambda raw: raw[:, 2:].copy().view(np.int8) * _half(raw[:, :2])),  # Q8_0
    14: (256, 210, _q6_k),
}


# --- The model.


def unpermute(weight, heads):
    """Rows from interleaved pairs (2i, 2i+1) back to half-split pairs (i, i + d/2), per head."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def interleave(x):
    """Channels of x [..., d] from half-split order back to the GGUF's interleaved order."""
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


class CachedModel:
    """The model in float64 with a KV cache; `extend(ids)` adds positions."""

    def __init__(self, reader, capacity):
        field = reader.fields
        if field.get("general.architecture") != "llama":
            raise InputError("not a llama-architecture model")
        self.layers = field["llama.block_count"]
        self.heads = field["llama.attention.head_count"]
        self.kv_heads = field["llama.attention.head_count_kv"]
        self.width = field["llama.embedding_length"]
        self.dim = self.width // self.heads
        self._epsilon = field["llama.attention.layer_norm_rms_epsilon"]
        self._base = field["llama.rope.freq_base"]
        self._embedding = reader.matrix("token_embd.weight")
        tied = "output.weight" not in reader
        self._output = self._embedding if tied else reader.matrix("output.weight")
        self._last_norm = reader.matrix("output_norm.weight")
        names = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                 "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
        self._weights = []
        for layer in range(self.layers):
            parts = {name: reader.matrix(f"blk.{layer}.{name}.weight") for name in names}
            parts["attn_q"] = unpermute(parts["attn_q"], self.heads)
            parts["attn_k"] = unpermute(parts["attn_k"], self.kv_heads)
            self._weights.append(parts)
        shape = (self.layers, self.kv_heads, capacity, self.dim)
        self.keys, self.values, self.length = np.zeros(shape), np.zeros(shape), 0

    def extend(self, ids):
        """Appends `ids`. Returns (logits [n, vocab], q [layers, heads, n, d], half-split order)."""
        count, group = len(ids), self.heads // self.kv_heads
        begin, end = self.length, self.length + count
        at = np.arange(begin, end)
        x, queries = self._embedding[ids], []
        for layer, w in enumerate(self._weights):
            n = self._norm(x, w["attn_norm"])
            q = self._rope((n @ w["attn_q"].T).reshape(count, self.heads, -1).swapaxes(0, 1), at)
            k = self._rope((n @ w["attn_k"].T).reshape(count, self.kv_heads, -1).swapaxes(0, 1), at)
            self.keys[layer, :, begin:end] = k
            self.values[layer, :, begin:end] = (
                (n @ w["attn_v"].T).reshape(count, self.kv_heads, -1).swapaxes(0, 1))
            queries.append(q)
            mixed = np.empty((count, self.heads, self.dim))
            for head in range(self.heads):
                scores = q[head] @ self.keys[layer, head // group, :end].T / np.sqrt(self.dim)
                scores[np.arange(end)[None, :] > at[:, None]] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                mixed[:, head] = weights @ self.values[layer, head // group, :end]
            x = x + mixed.reshape(count, -1) @ w["attn_output"].T
            n = self._norm(x, w["ffn_norm"])
            gate = n @ w["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (n @ w["ffn_up"].T)) @ w["ffn_down"].T
        self.length = end
        return self._norm(x, self._last_norm) @ self._output.T, np.stack(queries)

    def _norm(self, x, weight):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self._epsilon) * weight

    def _rope(self, x, positions):
        """Half-split rotation as in Hugging Face's `apply_rotary_pos_emb`: x·cos + rot(x)·sin."""
        half = self.dim // 2
        angle = np.outer(positions, 1.0 / self._base ** (2 * np.arange(half) / self.dim))
        angle = np.concatenate([angle, angle], axis=-1)
        turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * np.cos(angle) + turned * np.sin(angle)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# --- Files.


def read_model(path):
    """The bytes of the GGUF at `path`, or of the one in the wheel at `path`."""
    if path.endswith(".whl"):
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(next(n for n in wheel.namelist() if n.endswith(".gguf")))
    with open(path, "rb") as source:
        return mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)


def read_trace(path):
    """(metadata, {name: array}) of a safetensors file in F32, F16, BF16 or I32."""
    with open(path, "rb") as source:
        data = source.read()
    length, = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata, arrays = header.pop("__metadata__"), {}
    for name, info in header.items():
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        raw = data[begin:end]
        if info["dtype"] == "BF16":
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            kind = {"F32": "<f4", "F16": "<f2", "I32": "<i4"}[info["dtype"]]
            flat = np.frombuffer(raw, kind)
        arrays[name] = flat.reshape(info["shape"])
    if "token_ids" not in arrays:
        raise InputError(f"{path}: without token_ids nothing can be rerun")
    return metadata, arrays


# --- The comparisons. Each returns True if within its bound.


def compare_tensors(model, queries, metadata, arrays):
    """Prints how far the trace's K, V, Q lie from this model's over the positions run so far."""
    prompt, good = int(metadata["prompt_tokens"]), True
    for layer in map(int, metadata["layers"].split(",")):
        mine = {"k": interleave(model.keys[layer, :, : model.length]).swapaxes(0, 1),
                "v": model.values[layer, :, : model.length].swapaxes(0, 1)}
        if model.length > prompt:
            mine["q"] = interleave(queries[layer][:, prompt:]).swapaxes(0, 1)
        for name, expected in mine.items():
            kept = arrays[f"layers.{layer}.{name}"][: len(expected)].astype(np.float64)
            error = np.linalg.norm(kept - expected) / np.linalg.norm(expected)
            good &= bool(error <= TRACE_BOUND)
            print(f"layers.{layer}.{name}: {len(expected)} positions, relative L2 {error:.2e}, "
                  f"largest difference {np.abs(kept - expected).max():.2e}")
    return good


def compare_capture(path, ids, picked, loss):
    """Compares with capture.py's pass: loss over `ids`, and the distributions `picked`.

    `picked` is {position: log-probabilities [vocab]}.
    """
    try:
        import llama_gguf
    except ImportError as error:
        print(f"capture.py's forward pass: skipped ({error})")
        return True
    with llama_gguf.gguf_path(path) as file:
        other = llama_gguf.Model(file)
        hidden = llama_gguf.forward(other, ids)
        other_loss = float(llama_gguf.next_token_losses(other, hidden, ids).mean())
        rows = np.array(sorted(picked))
        theirs = llama_gguf.log_probabilities(other, hidden[rows])
    mine = np.stack([picked[row] for row in rows])
    print(f"capture.py's forward pass: loss {other_loss:.6f}, difference {other_loss - loss:+.1e}; "
          f"log-probabilities of {len(rows)} positions x {mine.shape[1]} tokens: "
          f"largest difference {np.abs(theirs - mine).max():.2e}, "
          f"mean {np.abs(theirs - mine).mean():.2e}; "
          f"same likeliest token {np.mean(theirs.argmax(1) == mine.argmax(1)):.2%}")
    return abs(other_loss - loss) <= LOSS_BOUND


def compare_engine(label, path, ids, picked, loss_bound):
    """Compares with llama.cpp on the CPU: next-token distributions, and the tokens of the text.

    `picked` {position: log-probabilities [vocab]}: after position i the engine has seen ids[0..i].
    It keeps K and V in float32 here. Weights as they are packed it multiplies with activations
    rounded to 8 bits; from F32 weights it computes in float32.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = len(ids) + 8
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.verbosity = -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)

    def post(name, body):
        request = urllib.request.Request(server.listening_address + name, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)

    text = post("/detokenize", {"tokens": ids.tolist()})["content"]
    same = post("/tokenize", {"content": text})["tokens"] == ids.tolist()
    print(f"llama.cpp, {label}: its tokenizer gives {'the same' if same else 'OTHER'} tokens")
    mine, theirs = [], []
    for position in sorted(picked):
        reply = post("/completion", {
            "prompt": ids[: position + 1].tolist(), "n_predict": 1, "temperature": 0.0,
            "n_probs": len(picked[position]), "cache_prompt": True})
        row = np.full(len(picked[position]), np.nan)
        for entry in reply["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        mine.append(picked[position])
        theirs.append(row)
    mine, theirs = np.stack(mine), np.stack(theirs)
    if np.isnan(theirs).any():
        raise InputError("llama.cpp returned only a part of the vocabulary")
    following = ids[np.array(sorted(picked)) + 1]
    rows = np.arange(len(mine))
    true_mine, true_theirs = mine[rows, following], theirs[rows, following]
    difference = np.abs(true_mine - true_theirs)
    # llama.cpp normalises with a float32 sum over the vocabulary, which is off by about 1e-4.
    divergence = (np.exp(mine) * (mine - log_softmax(theirs))).sum(axis=1)
    print(f"llama.cpp, {label}: {len(rows)} contexts of {min(picked) + 1} to "
          f"{max(picked) + 1} tokens: loss {-true_theirs.mean():.4f}, here "
          f"{-true_mine.mean():.4f}; log-probability of the true next token: mean "
          f"difference {difference.mean():.1e}, largest {difference.max():.1e}; "
          f"KL mean {divergence.mean():.2e}, largest {divergence.max():.2e}; "
          f"same likeliest token {np.mean(mine.argmax(1) == theirs.argmax(1)):.2%}")
    return same and abs(true_mine.mean() - true_theirs.mean()) <= loss_bound


def run(options):
    """Runs the model over the trace's tokens and makes the comparisons. Returns the exit code."""
    metadata, arrays = read_trace(options.trace)
    ids = arrays["token_ids"][: options.tokens or None]
    data = read_model(options.model)
    reader = Reader(data)
    model = CachedModel(reader, len(ids))
    layers = [int(layer) for layer in metadata["layers"].split(",")]
    # Distributions are kept at evenly spread positions; the last position has no next token.
    rows = np.linspace(0, len(ids) - 2, min(len(ids) - 1, options.engine or 128)).astype(int)
    picked, losses, queries = {}, [], {layer: [] for layer in layers}
    started = time.monotonic()
    for begin in range(0, len(ids), options.chunk):
        part = ids[begin : begin + options.chunk]
        logits, q = model.extend(part)
        for layer in layers:
            queries[layer].append(q[layer].copy())
        table = log_softmax(logits)
        following = ids[begin + 1 : begin + 1 + len(part)]
        losses.extend(-table[np.arange(len(following)), following])
        for row in rows[(rows >= begin) & (rows < begin + len(part))]:
            picked[int(row)] = table[row - begin].copy()
    loss = float(np.mean(losses))
    print(f"second implementation: float64, {options.chunk} positions at a time, "
          f"{len(ids)} positions in {time.monotonic() - started:.0f} s: "
          f"loss {loss:.6f} nats over {len(losses)} tokens", flush=True)
    queries = {layer: np.concatenate(parts, axis=1) for layer, parts in queries.items()}
    good = compare_tensors(model, queries, metadata, arrays)
    good &= compare_capture(options.model, ids, picked, loss)
    if options.engine:
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(data)
            file.flush()
            good &= compare_engine("packed weights", file.name, ids, picked, ENGINE_LOSS_BOUND)
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            reader.write_unpacked(file)
            good &= compare_engine("unpacked weights", file.name, ids, picked, LOSS_BOUND)
    print("agrees" if good else "DIFFERS: a bound was exceeded")
    return 0 if good else 1


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a GGUF file, or a wheel that holds one")
    parser.add_argument("trace", help="a trace with token_ids")
    parser.add_argument("--tokens", type=int, default=512, help="positions to run (0: all)")
    parser.add_argument("--chunk", type=int, default=1, help="positions added at a time")
    parser.add_argument("--engine", type=int, default=0, metavar="N",
                        help="compare N next-token distributions with llama.cpp's (xllamacpp)")
    options = parser.parse_args(arguments)
    if options.tokens < 0 or options.chunk < 1 or options.engine < 0:
        parser.error("--tokens, --chunk and --engine must not be negative, --chunk not 0")
    try:
        return run(options)
    except (InputError, OSError, StopIteration, KeyError, struct.error, ValueError) as error:
        print(f"check_model.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 5


if __name__ == "__main__":
    sys.exit(main())
